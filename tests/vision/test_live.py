"""Images of many callers at once, in micro-batches of whatever waits, through real ranks."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from bireme.chrome_trace import Recorded
from bireme.config import Transport
from bireme.engine.pool import WorkerPool
from bireme.errors import CapacityError, ConfigError, EngineError, RankError, RequestError
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.trace import RankSpans, SpanKind, SpanRing
from bireme.vision.client import ImageClient, ImageSettings, ImageStats
from bireme.vision.live import Pixels
from bireme.vision.messages import VISION
from bireme.vision.model import VisionModel, find_model
from bireme.vision.pipeline import RankSettings
from bireme.vision.preprocessing import made_up_images
from vision.reference import whole
from vision.test_stages import TOLERANCE, difference


def settings(model: VisionModel, **more: object) -> ImageSettings:
    given: dict[str, object] = {
        "points": (), "max_batch_size": 4, "max_queue_delay_s": 0.0, "max_queue_size": 64,
        "ranks": RankSettings(devices=("cpu", "cpu"), num_threads=1),
        "limit_bytes": 1 << 32,
    }  # fmt: skip
    return ImageSettings(model=model, **(given | more))  # type: ignore[arg-type]


@asynccontextmanager
async def running(asked: ImageSettings, pool: WorkerPool) -> AsyncIterator[ImageClient]:
    client = ImageClient(asked, pool)
    await client.begin()
    try:
        await client.ready
        yield client
    finally:
        await client.aclose()


@pytest.fixture(scope="module")
def network() -> VisionModel:
    return find_model("vision.networks:Network", None, image_size=8)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Whose ranks find our networks."""
    with pytest.MonkeyPatch.context() as patch, WorkerPool(VISION) as shared:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent), prepend=os.pathsep)
        yield shared


async def infer(client: ImageClient, images: Pixels) -> Pixels:
    with client.callers.room(len(images)):
        return np.concatenate((await client.callers.infer(images)).parts)


async def at_rest(client: ImageClient) -> ImageStats:
    """Once each rank has ended the steps whose logits are back: a stage that has sent its part may still be
    in its step when a later one answers. The first three steps are made up."""
    async with asyncio.timeout(60):
        while True:
            stats = client.stats()
            ended = [rank.num_steps_total for rank in stats.ranks]
            if min(ended) >= stats.num_micro_batches_total + 3:
                return stats
            await asyncio.sleep(0)


def images_of(model: VisionModel, num_images: int, seed: int = 0) -> Pixels:
    found: Pixels = made_up_images(num_images, model.image_shape, seed).numpy()
    return found


@pytest.mark.parametrize(
    ("name", "transport"),
    [("network", "auto"), ("network", "distributed"), ("resnet-18", "auto")],
)
def test_every_caller_gets_the_logits_of_its_own_images(
    name: str, transport: Transport, network: VisionModel, pool: WorkerPool
) -> None:
    model = network if name == "network" else find_model("resnet-18", None, image_size=32)
    draw = random.Random(0)
    sizes = [draw.choice((1, 1, 2, 3, 4, 7, 11)) for _ in range(16)]
    images = [images_of(model, size, seed) for seed, size in enumerate(sizes)]

    async def run() -> list[Pixels]:
        ranks = RankSettings(devices=("cpu", "cpu"), num_threads=1, transport=transport)
        asked = settings(model, max_queue_size=sum(sizes), ranks=ranks)
        async with running(asked, pool) as client:
            found = await asyncio.gather(*(infer(client, one) for one in images))
            stats = await at_rest(client)
            assert (stats.num_waiting, stats.num_running) == (0, 0)
            assert stats.num_images_total == sum(sizes)
            least, most = -(-sum(sizes) // 4), len(sizes) + sum(size // 4 for size in sizes)
            assert least <= stats.num_micro_batches_total <= most
            assert [rank.num_steps_total for rank in stats.ranks] == [
                stats.num_micro_batches_total + 3
            ] * 2, "the first three were made up"
            return found

    for mine, logits in zip(images, asyncio.run(run()), strict=True):
        expected = whole(model, torch.from_numpy(mine))
        assert difference(torch.from_numpy(logits), expected) < TOLERANCE


def test_requests_that_come_within_the_delay_go_together(
    network: VisionModel, pool: WorkerPool
) -> None:
    async def run() -> None:
        async with running(settings(network, max_queue_delay_s=30.0), pool) as client:
            images = images_of(network, 1)
            await asyncio.gather(*(infer(client, images) for _ in range(8)))
            assert client.stats().num_micro_batches_total == 2
        async with running(settings(network, max_queue_delay_s=0.05), pool) as client:
            request = await client.callers.infer(images)
            assert request.scheduled_s is not None
            assert 0.05 <= request.scheduled_s - request.arrival_s < 1, "and no longer"

    asyncio.run(run())


def test_the_ledger_accounts_for_the_ranks_of_a_busy_server(
    network: VisionModel, pool: WorkerPool
) -> None:
    async def run() -> Recorded:
        async with running(settings(network), pool) as client:
            ready = client.ready.result()
            await asyncio.gather(*(infer(client, images_of(network, 4)) for _ in range(16)))
            await at_rest(client)
            driver = SpanRing(os.open(ready.engine_ring, os.O_RDWR)).read()
            rings = [(it, SpanRing(os.open(it.path, os.O_RDWR))) for it in ready.rings]
            since = min(span.start_ns for span in driver)
            ranks = [
                RankSpans(
                    it.name, it.stage, 0, [one for one in ring.read() if one.start_ns >= since]
                )
                for it, ring in rings
            ]
            return Recorded(ranks, driver)

    recorded = asyncio.run(run())
    assert {span.kind for span in recorded.engine} >= {SpanKind.SUBMIT, SpanKind.WAIT}
    for rank in make_ledger(recorded).ranks:
        assert rank.share(Row.COMPUTE) > 0
        assert rank.share(Row.UNATTRIBUTED) < 0.01


def test_a_caller_that_leaves_takes_its_images_along(
    network: VisionModel, pool: WorkerPool
) -> None:
    async def run() -> None:
        async with running(settings(network, max_queue_delay_s=30.0), pool) as client:
            leaving = asyncio.create_task(infer(client, images_of(network, 3)))
            await asyncio.sleep(0)  # it has asked; the engine is told all in this order
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            await infer(client, images_of(network, 4))
            stats = client.stats()
            assert (stats.num_images_total, stats.num_waiting) == (4, 0)

    asyncio.run(run())


def test_more_than_there_is_room_for_is_refused(network: VisionModel, pool: WorkerPool) -> None:
    async def run() -> None:
        async with running(
            settings(network, max_queue_size=5, max_queue_delay_s=30.0), pool
        ) as client:
            waiting = asyncio.create_task(infer(client, images_of(network, 3)))
            await asyncio.sleep(0)
            with pytest.raises(CapacityError, match="3 images of 5 are there"):
                await infer(client, images_of(network, 3))
            with pytest.raises(RequestError, match="6 images at once are too many; send at most 5"):
                await infer(client, images_of(network, 6))
            await infer(client, images_of(network, 1))  # with which the micro-batch is full
            await waiting
            await infer(client, images_of(network, 4))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"points": ("nowhere",)}, "nowhere is no point to cut at"),
        ({"limit_bytes": 100}, "does not fit 2 devices"),
    ],
)
def test_what_cannot_be_is_told_before_it_is_ready(
    network: VisionModel, pool: WorkerPool, more: dict[str, object], says: str
) -> None:
    async def run() -> None:
        async with running(settings(network, **more), pool):
            raise AssertionError("it must not be ready")

    with pytest.raises((ConfigError, CapacityError), match=says):
        asyncio.run(run())


def test_a_module_that_mixes_images_is_served_one_by_one_or_not_at_all(pool: WorkerPool) -> None:
    mixing = find_model("vision.networks:Mixing", None, image_size=8)

    async def run(**more: object) -> None:
        async with running(settings(mixing, **more), pool) as client:
            found = await infer(client, images_of(mixing, 3))
            assert difference(torch.from_numpy(found), torch.from_numpy(found[:1])) < TOLERANCE

    asyncio.run(run(max_batch_size=1))
    with pytest.raises(ConfigError, match="serve a module that computes each image alone"):
        asyncio.run(run())


def test_it_can_be_closed_while_it_starts(network: VisionModel, pool: WorkerPool) -> None:
    async def run() -> None:
        client = ImageClient(settings(network), pool)
        await client.begin()
        await client.aclose()
        with pytest.raises(EngineError, match="closed"):
            await client.ready

    asyncio.run(run())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0 must be at least 1"),
        ({"max_queue_size": 0}, "max_queue_size=0 must be at least 1"),
        ({"max_queue_delay_s": -1.0}, "max_queue_delay_ms=-1000 must be from 0"),
        ({"max_queue_delay_s": float("nan")}, "max_queue_delay_ms=nan must be from 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    network: VisionModel, more: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(network, **more)


def test_a_killed_rank_is_named_to_all_who_wait(network: VisionModel, pool: WorkerPool) -> None:
    async def run() -> None:
        async with running(settings(network, max_queue_delay_s=30.0), pool) as client:
            waiting = [asyncio.create_task(infer(client, images_of(network, 1))) for _ in range(2)]
            await asyncio.sleep(0)
            os.kill(pool.take(2)[1].process.pid, signal.SIGKILL)
            named = r"rank 1 \(stage 1, tp 0\): .*killed by signal 9"
            for one in waiting:
                with pytest.raises(RankError, match=named):
                    await one
            with pytest.raises(RankError, match=named):
                await infer(client, images_of(network, 1))

    asyncio.run(run())
