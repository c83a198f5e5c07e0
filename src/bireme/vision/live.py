"""A vision pipeline that takes micro-batches while others are on their way."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bireme.engine.deadline import StepsInFlight
from bireme.engine.rank_stats import RankBytes, RankStats, RankWatch
from bireme.engine.service_messages import RingPlace
from bireme.engine.world import World
from bireme.errors import ConfigError, EngineError
from bireme.parallel.counters import create_memory
from bireme.parallel.pipeline import forward_schedule
from bireme.vision.messages import Load, Logits, Run
from bireme.vision.model import VisionModel
from bireme.vision.pipeline import RankSettings
from bireme.vision.plan import PipelinePlan, StagePlan

_TOLERANCE = (
    3e-2  # of the largest logit: kernels of half precision may differ by their place in a batch
)
Pixels = npt.NDArray[np.float32]


class LivePipeline:
    """The driver of ranks that hold the stages of a plan. Logits come back in the order in which
    micro-batches were submitted; RankError names a rank that died or hangs.

    One more than there are stages may be in flight. Each has a place in memory, which stage 0 reads,
    until its logits are back.
    """

    def __init__(
        self, world: World, model: VisionModel, plan: PipelinePlan, settings: RankSettings
    ) -> None:
        self._world, self._steps = world, StepsInFlight(settings.step_timeout_s)
        self._devices = settings.devices
        self._next_step, self._was_awaited = 1, False
        num_stages = len(plan.stages)
        self.max_in_flight, self._micro_batch = num_stages + 1, plan.work.micro_batch
        is_captured = settings.is_captured and settings.devices[0].startswith("cuda")
        self._sizes = sizes_of_graphs(self._micro_batch) if is_captured else None
        self._num_images: deque[int] = deque()  # of each micro-batch in flight
        self._image_shape = model.image_shape
        schedule = forward_schedule(num_stages, 1)
        self._schedule = tuple(tuple(map(str, actions)) for actions in schedule)
        shape = self.max_in_flight, self._micro_batch, *model.image_shape
        fd, path = create_memory(4 * int(np.prod(shape)), "bireme-images")
        try:
            self._places: Pixels = np.frombuffer(mmap.mmap(fd, 0), np.float32).reshape(shape)
            num_images = self.max_in_flight * self._micro_batch
            world.send_all(
                Load(
                    model,
                    plan.blocks_per_stage,
                    path,
                    num_images,
                    settings.is_captured,
                    is_live=True,
                )
            )
            world.gather(settings.start_timeout_s, "loading its stage")
        finally:
            os.close(fd)
        self._watches = [
            RankWatch(stage.stage, stage.stage, rank.spans, _bytes_of(stage), rank.process.pid)
            for stage, rank in zip(plan.stages, world.ranks, strict=True)
        ]

    @property
    def num_in_flight(self) -> int:
        return len(self._steps)

    @property
    def next_step(self) -> int:
        """The step_id of the next micro-batch."""
        return self._next_step

    def warm_up(self) -> int:
        """The number of classes, of a micro-batch of each size that is captured; raises where a rank does
        not work."""
        num_classes = 0
        for size in self._sizes or [self._micro_batch]:
            self.submit([np.zeros((size, *self._image_shape), np.float32)])
            num_classes = self.collect().shape[1]
        self._check_images_alone()
        return num_classes

    def _check_images_alone(self) -> None:
        """ConfigError where what an image gets depends on another of its micro-batch."""
        if self._micro_batch == 1:
            return
        first, *others = np.random.default_rng(0).normal(size=(3, 1, *self._image_shape))
        logits = []
        for other in others:
            self.submit([first, 4 * other])
            logits.append(self.collect()[0])
        difference, largest = float(np.ptp(logits, axis=0).max()), float(np.abs(logits).max())
        if difference > _TOLERANCE * largest:
            raise ConfigError(
                f"an image's logits, up to {largest:.1e}, change by {difference:.1e} with the other of its "
                "micro-batch; serve a module that computes each image alone, or --max-batch-size 1"
            )

    def submit(self, images: Sequence[Pixels]) -> None:
        """One micro-batch, of parts that are [n, 3, H, W]. Where its size is not one that is captured,
        images of earlier ones fill it up."""
        step_id, self._next_step = self._next_step, self._next_step + 1
        place, num_images = step_id % self.max_in_flight, 0
        for part in images:
            self._places[place, num_images : num_images + len(part)] = part
            num_images += len(part)
        self._steps.begin(step_id, num_images)
        self._num_images.append(num_images)
        size = num_images
        if self._sizes is not None:
            size = self._sizes[bisect_left(self._sizes, num_images)]
        self._world.send_all(
            Run(self._schedule, (size,), step_id, place * self._micro_batch),
            self._steps.patience_with_all(),
        )

    def wait(self, wake: int, until: float | None) -> bool:
        """False if the descriptor `wake` can be read, or it is `until` (of the monotonic clock), before
        the oldest micro-batch's logits are there; notices ranks that are gone."""
        if not self._steps:
            return self._world.wait_idle(wake, until)
        self._was_awaited = not self._world.has_reply()
        patience = self._steps.patience_with_oldest()
        return self._world.wait(wake, patience, self._steps.oldest, until)

    def collect(self) -> Pixels:
        """The logits [n, classes] of the oldest micro-batch."""
        was_there, self._was_awaited = self._world.has_reply() and not self._was_awaited, False
        reply = self._world.step_reply(self._steps.patience_with_oldest(), self._steps.oldest)
        if not isinstance(reply, Logits):
            raise EngineError(f"a rank answered a micro-batch with {type(reply).__name__}")
        self._steps.end(is_bound=was_there)
        logits = np.frombuffer(reply.values, np.float32).reshape(-1, reply.num_classes)
        return logits[: self._num_images.popleft()]

    def rank_stats(self) -> list[RankStats]:
        """What every rank did since it was loaded; from one thread at a time, at any time."""
        return [watch.stats() for watch in self._watches]

    def ring_places(self) -> list[RingPlace]:
        """Where other processes find what the ranks write."""
        return [
            RingPlace(name, stage, 0, device, rank.spans.path)
            for stage, (name, device, rank) in enumerate(
                zip(self._world.names, self._devices, self._world.ranks, strict=True)
            )
        ]


def sizes_of_graphs(largest: int) -> list[int]:
    """Powers of two and the largest: each is captured before the first request, and takes memory."""
    return sorted({largest, *(1 << power for power in range(largest.bit_length()))})


def _bytes_of(stage: StagePlan) -> RankBytes:
    weights = stage.parameter_bytes
    return RankBytes(weights, 0, stage.memory_bytes - weights)
