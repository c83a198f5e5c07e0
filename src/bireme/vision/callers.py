"""Callers on one asyncio loop who wait for the logits of their images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bireme.errors import CapacityError, EngineError, RequestError
from bireme.vision.engine import Command, Drop, ImageRequest
from bireme.vision.live import Pixels


class ImageCallers:
    """Any number of callers, whose images are `most_images` at once. `send` takes commands to the engine;
    `deliver` and `fail` are for what it says, on the loop."""

    def __init__(self, most_images: int, send: Callable[[Command], None]) -> None:
        self.most_images, self._send = most_images, send
        self._num_images = 0
        self._answers: dict[ImageRequest, asyncio.Future[None]] = {}
        self.error: Exception | None = EngineError("the engine does not run yet")
        self.on_failure: Callable[[Exception], None] = lambda _: None

    def begin(self) -> None:
        """From here on the engine runs."""
        self.error = None

    @contextmanager
    def room(self, num_images: int) -> Iterator[None]:
        """For so many images, before they are there: CapacityError where others take too much of it,
        RequestError for more than there ever is."""
        if num_images > self.most_images:
            raise RequestError(
                f"{num_images} images at once are too many; send at most {self.most_images}"
            )
        if self._num_images + num_images > self.most_images:
            raise CapacityError(
                f"{self._num_images} images of {self.most_images} are there; try again later"
            )
        self._num_images += num_images
        try:
            yield
        finally:
            self._num_images -= num_images

    async def infer(self, images: Pixels) -> ImageRequest:
        """Done. Where the caller is cancelled before, what still waits of it is dropped."""
        if self.error is not None:
            raise self.error
        request = ImageRequest(images)
        answer = self._answers[request] = asyncio.get_running_loop().create_future()
        self._send(request)
        try:
            await answer
        finally:
            if self._answers.pop(request, None) is not None:
                self._send(Drop(request))
        return request

    def deliver(self, requests: Sequence[ImageRequest]) -> None:
        for request in requests:
            if (answer := self._answers.pop(request, None)) is not None and not answer.done():
                answer.set_result(None)

    def fail(self, error: Exception) -> None:
        """Ends all requests, and refuses new ones."""
        self.error = error
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        self._answers.clear()
        self.on_failure(error)
