"""A vision model as its routes see it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from bireme.errors import RequestError
from bireme.server.config import ServerConfig
from bireme.server.errors import KSERVE, ClientGone
from bireme.server.exchange import Exchange
from bireme.server.kserve.metrics import ImageMetrics
from bireme.server.kserve.request import FILES, IMAGES, LOGITS, Inference, parse
from bireme.server.kserve.response import VERSION, respond
from bireme.server.leaving import unless_gone
from bireme.server.log import Log
from bireme.server.service import Service
from bireme.vision.client import ImageClient, ImageStats
from bireme.vision.engine import ImageRequest
from bireme.vision.live import Pixels
from bireme.vision.preprocessing import Preprocessing, decode_image, image_pixels

T = TypeVar("T")

_MOST_THREADS = 4  # that read what clients send; image files take milliseconds each
_MOST_PIXELS = 1 << 28  # of all files of a request: seconds of a core


class ImageServing(Service):
    dialect = KSERVE

    def __init__(self, config: ServerConfig, client: ImageClient, name: str, log: Log) -> None:
        super().__init__(config, client, name, log)
        model = client.settings.model
        self.client, self._side = client, model.image_size
        self._metrics = ImageMetrics(self.model_names[0])
        self._labels, self._preprocessing = model.labels, model.preprocessing
        self._inputs = {IMAGES: {"datatype": "FP32", "shape": [-1, *model.image_shape]}}
        if find_spec("PIL") is not None and self._preprocessing.side == self._side:
            self._inputs[FILES] = {"datatype": "BYTES", "shape": [-1]}
        num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(num_threads, "bodies")
        self._decoders = ThreadPoolExecutor(num_threads, "images")  # tensors do not wait for files

    @property
    def metrics(self) -> ImageMetrics:
        return self._metrics

    async def stats(self) -> ImageStats:
        return self.client.stats()

    def how_to_ask(self, url: str, headers: str) -> tuple[str, str]:
        name = self.model_names[0]
        return f"serving {name} at {url}/v2", f"curl {url}/v2/models/{name}{headers}"

    def metadata(self, name: str) -> dict[str, Any]:
        """Of the model."""
        self.check_ready()
        num_classes = self.client.ready.result().num_classes
        return {
            "name": name,
            "versions": [VERSION],
            "platform": "bireme_pytorch",
            "inputs": [{"name": name, **told} for name, told in self._inputs.items()],
            "outputs": [{"name": LOGITS, "datatype": "FP32", "shape": [-1, num_classes]}],
        }

    async def infer(self, request: Request, name: str) -> Response:
        """A client that leaves before it is answered frees what still waits of its images."""
        self.check_ready()
        loop = asyncio.get_running_loop()
        if encoding := request.headers.get("content-encoding"):
            raise RequestError(f"Content-Encoding {encoding:.30} is not taken; send it as it is")
        try:
            body = await request.body()
        except ClientDisconnect:
            raise ClientGone from None
        length = request.headers.get("inference-header-content-length")
        inference = await loop.run_in_executor(
            self._threads, parse, body, length, self._side, self._inputs
        )
        exchange = Exchange.of(request.scope)
        exchange.num_images = inference.num_images
        with self.client.callers.room(inference.num_images):
            done = await unless_gone(request, self._done(inference))
        if done.scheduled_s is not None:
            exchange.queue_s = done.scheduled_s - done.arrival_s
        self._metrics.note_done(done, time.monotonic())
        logits = np.concatenate(done.parts)
        content, headers = await loop.run_in_executor(
            self._threads, respond, inference, name, logits, self._labels
        )
        return Response(content, headers=headers)

    async def _done(self, inference: Inference) -> ImageRequest:
        loop = asyncio.get_running_loop()
        if inference.tensor.name == IMAGES:
            pixels = await loop.run_in_executor(self._threads, inference.pixels)
        else:
            pixels = await self._decoded(await loop.run_in_executor(self._threads, inference.files))
        return await self.client.callers.infer(pixels)

    async def _decoded(self, files: list[bytes]) -> Pixels:
        """File by file: who leaves has one more decoded at most, and others have their turn between."""
        num_pixels = sum([await self._of_file(image_pixels, *file) for file in enumerate(files)])
        if num_pixels > _MOST_PIXELS:
            raise RequestError(
                f"{FILES} have {num_pixels} pixels; at most {_MOST_PIXELS} are taken in one request"
            )
        found = [await self._of_file(decode_image, *file) for file in enumerate(files)]
        return torch.stack(found).numpy()

    async def _of_file(
        self, read: Callable[[bytes, Preprocessing], T], index: int, content: bytes
    ) -> T:
        def job() -> T:
            if (error := self.client.callers.error) is not None:  # nobody will compute them
                raise error
            try:
                return read(content, self._preprocessing)
            except RequestError as error:
                raise RequestError(f"{FILES}[{index}] is {error}") from None

        return await asyncio.get_running_loop().run_in_executor(self._decoders, job)

    async def aclose(self) -> None:
        await super().aclose()
        for threads in (self._threads, self._decoders):
            threads.shutdown(wait=False, cancel_futures=True)


def default_name(model: str) -> str:
    """A folder's own name: it is a part of paths."""
    return os.path.basename(os.path.normpath(model))
