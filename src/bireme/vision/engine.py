"""The engine of a vision pipeline: makes micro-batches of what callers ask for, and keeps as many in
flight as the pipeline takes."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from bireme.engine.driver_spans import DriverSpans
from bireme.engine.inbox import Inbox
from bireme.errors import EngineError
from bireme.trace import SpanKind, SpanRing
from bireme.vision.batching import BatchQueue, Share
from bireme.vision.live import LivePipeline, Pixels


class ImageRequest:
    """[N, 3, H, W], and once it is done the logits [N, classes]. Seconds of the monotonic clock."""

    def __init__(self, images: Pixels) -> None:
        self.images, self.arrival_s = images, time.monotonic()
        self.scheduled_s: float | None = None  # when the first of them were submitted
        self.parts: list[Pixels] = []  # of the logits, in their order
        self.num_left = len(images)


@dataclass(frozen=True)
class Drop:
    """Nobody waits for it any more."""

    request: ImageRequest


Command = ImageRequest | Drop | None  # None: end


class Outbox(Protocol):
    """To whom the engine tells what happened; called in the engine's thread."""

    def deliver(self, requests: list[ImageRequest]) -> None: ...


class ImageEngine:
    """Everything runs in the thread that calls `run`; counts may be read from any."""

    def __init__(
        self,
        pipeline: LivePipeline,
        queue: BatchQueue[ImageRequest],
        spans: SpanRing,
        inbox: Inbox[Command],
        outbox: Outbox,
    ) -> None:
        self.pipeline, self.queue, self._spans = pipeline, queue, DriverSpans(spans)
        self._inbox, self._outbox = inbox, outbox
        self._in_flight: deque[list[Share[ImageRequest]]] = deque()
        self.num_images_running = self.num_images_total = self.num_micro_batches_total = 0

    def run(self) -> None:
        """Until told to end; then what is in flight still ends."""
        while self._obey():
            self._submit()
            self._collect()
        while self._in_flight:
            self._take()

    def _obey(self) -> bool:
        """What callers asked for since the last step; False: to end."""
        for command in self._inbox.take():
            match command:
                case None:
                    return False
                case Drop(request):
                    self.queue.drop(request)
                case ImageRequest():
                    self.queue.put(command, len(command.images), command.arrival_s)
        return True

    def _submit(self) -> None:
        """All that may go now."""
        pipeline = self.pipeline
        while pipeline.num_in_flight < pipeline.max_in_flight:
            now_s = time.monotonic()
            shares = self.queue.take(now_s)
            if not shares:
                return
            with self._spans.span(SpanKind.SUBMIT, (0, pipeline.next_step)):
                pipeline.submit([it.request.images[it.first : it.stop] for it in shares])
            self._in_flight.append(shares)
            for share in shares:
                self.num_images_running += share.num_images
                share.request.scheduled_s = share.request.scheduled_s or now_s

    def _collect(self) -> None:
        """The oldest micro-batch, unless something else can be done before it is there."""
        pipeline = self.pipeline
        is_full = pipeline.num_in_flight == pipeline.max_in_flight
        with self._spans.span(SpanKind.WAIT if self._in_flight else SpanKind.EMPTY):
            is_there = is_full or pipeline.wait(self._inbox.wake, self.queue.due_s)
        if is_there:
            self._take()

    def _take(self) -> None:
        with self._spans.span(SpanKind.WAIT):
            logits = self.pipeline.collect()
        shares, first = self._in_flight.popleft(), 0
        num_images = sum(share.num_images for share in shares)
        if len(logits) != num_images:
            raise EngineError(f"{num_images} images got {len(logits)} rows of logits")
        for share in shares:
            share.request.parts.append(logits[first : first + share.num_images])
            share.request.num_left -= share.num_images
            first += share.num_images
        self.num_images_running -= num_images
        self.num_images_total += num_images
        self.num_micro_batches_total += 1
        self._outbox.deliver([it.request for it in shares if not it.request.num_left])
