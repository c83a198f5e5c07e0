"""Vision pipelines on CUDA: captured or not, over peer memory or NCCL, they are the model on one device."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bireme.chrome_trace import chrome_trace
from bireme.engine.pool import WorkerPool
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.trace import SpanKind
from bireme.vision.client import ImageClient, ImageSettings
from bireme.vision.live import Pixels
from bireme.vision.messages import VISION
from bireme.vision.model import VisionModel, find_model
from bireme.vision.pipeline import Passed, RankSettings, VisionPipeline, micro_batch_sizes
from bireme.vision.preprocessing import made_up_images
from bireme.vision.tracing import trace
from vision.reference import whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA devices"),
]
BATCH, NUM_MICRO_BATCHES = 13, 3  # 5, 4 and 4 images
# Largest difference as a share of the largest logit. float32 convolutions take TF32's 10 bits.
TO_ONE_GPU = {"float32": 1e-3, "bfloat16": 2e-2}
TO_A_CPU = {"float32": 5e-3, "bfloat16": 5e-2}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(VISION) as made:
        yield made


def passed(
    model: VisionModel, pool: WorkerPool, ranks: RankSettings, num_batches: int = 1
) -> tuple[Passed, VisionPipeline]:
    blocks = trace(model.build(), model.image_shape, model.torch_dtype)
    counts = micro_batch_sizes(len(blocks.blocks), len(ranks.devices))
    images = made_up_images(BATCH, model.image_shape)
    with VisionPipeline.open(model, blocks, counts, images, pool, ranks) as pipeline:
        return pipeline.run(NUM_MICRO_BATCHES, num_batches=num_batches), pipeline


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "dtype"), [("resnet-18", "float32"), ("resnet-50", "bfloat16"), ("vit-b16", "float32")]
)
def test_two_gpus_compute_what_one_and_a_cpu_compute(
    name: str, dtype: str, pool: WorkerPool, pair: tuple[int, int]
) -> None:
    model = find_model(None, name, image_size=64, dtype=dtype)
    devices = tuple(f"cuda:{index}" for index in pair)
    captured = RankSettings(devices=devices, num_threads=2)
    alone, _ = passed(model, pool, captured.alone())
    reference = whole(model, made_up_images(BATCH, model.image_shape).to(model.torch_dtype))
    assert difference(alone.logits, reference.float()) < TO_A_CPU[dtype]
    for ranks in (
        captured,
        dataclasses.replace(captured, is_captured=False),
        dataclasses.replace(captured, transport="distributed"),
    ):
        found, _ = passed(model, pool, ranks)
        assert difference(found.logits, alone.logits) < TO_ONE_GPU[dtype], ranks


def test_batches_follow_one_another(pool: WorkerPool, pair: tuple[int, int]) -> None:
    model = find_model(None, "resnet-18", image_size=64)
    ranks = RankSettings(devices=tuple(f"cuda:{index}" for index in pair), num_threads=2)
    found, pipeline = passed(model, pool, ranks, num_batches=20)
    batches = found.logits.view(20, BATCH, -1)
    assert all(difference(batch, batches[0]) == 0 for batch in batches)
    recorded = pipeline.recorded()
    ledger = make_ledger(recorded)
    assert all(abs(rank.share(Row.UNATTRIBUTED)) <= 0.01 for rank in ledger.ranks)
    sends = [span for span in recorded.ranks[0].spans if span.kind is SpanKind.SEND]
    assert len({span.step_id for span in sends}) == 20 * NUM_MICRO_BATCHES
    arrows = [event for event in chrome_trace(recorded)["traceEvents"] if event["ph"] == "s"]
    assert len(arrows) == 20 * NUM_MICRO_BATCHES


def test_live_micro_batches_of_any_size_are_filled_up_to_one_that_is_captured(
    pool: WorkerPool, pair: tuple[int, int]
) -> None:
    model = find_model("resnet-18", None, image_size=64)
    asked = ImageSettings(
        model=model, points=(), max_batch_size=5, max_queue_delay_s=0.0, max_queue_size=64,
        ranks=RankSettings(devices=tuple(f"cuda:{index}" for index in pair), num_threads=2),
        limit_bytes=1 << 32,
    )  # fmt: skip
    images = [made_up_images(size, model.image_shape, size).numpy() for size in (1, 2, 3, 5, 7)]

    async def infer(client: ImageClient, given: Pixels) -> Pixels:
        return np.concatenate((await client.callers.infer(given)).parts)

    async def run() -> list[Pixels]:
        client = ImageClient(asked, pool)
        await client.begin()
        try:
            await client.ready
            return [await infer(client, given) for given in images]
        finally:
            await client.aclose()

    for given, logits in zip(images, asyncio.run(run()), strict=True):
        expected = whole(model, torch.from_numpy(given))
        assert difference(torch.from_numpy(logits), expected) < TO_A_CPU["float32"]
