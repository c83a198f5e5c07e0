"""A model in stages is the model on one device, whatever the cut and the micro-batches."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from bireme.engine.pool import WorkerPool
from bireme.errors import CheckpointError, RankError
from bireme.parallel.pipeline import Action, Schedule, forward_schedule
from bireme.vision.messages import VISION
from bireme.vision.model import VisionModel, find_model
from bireme.vision.pipeline import RankSettings, VisionPipeline, micro_batch_sizes
from bireme.vision.preprocessing import made_up_images
from bireme.vision.tracing import Traced
from bireme.vision.weights import open_weights
from vision.reference import whole

TOLERANCE = 1e-5  # float32: the largest difference, as a share of the largest logit
BATCH, NUM_MICRO_BATCHES = 7, 3  # 3, 2 and 2 images

Trace = Callable[[VisionModel], Traced]


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ViT-B's width, as transformers writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(num_hidden_layers=4, image_size=32, num_labels=10)
    ViTForImageClassification(config).eval().save_pretrained(folder)
    return folder


@contextmanager
def staged(
    model: VisionModel, trace_once: Trace, num_stages: int, pool: WorkerPool, **settings: object
) -> Iterator[VisionPipeline]:
    """Blocks spread evenly by number, so that every stage holds at least one."""
    blocks = trace_once(model)
    counts = micro_batch_sizes(len(blocks.blocks), num_stages)
    images = made_up_images(BATCH, model.image_shape)
    ranks = RankSettings(devices=("cpu",) * num_stages, num_threads=1, **settings)  # type: ignore[arg-type]
    with VisionPipeline.open(model, blocks, counts, images, pool, ranks) as pipeline:
        yield pipeline


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def expected() -> Callable[[VisionModel], torch.Tensor]:
    known: dict[VisionModel, torch.Tensor] = {}

    def of(model: VisionModel) -> torch.Tensor:
        if model not in known:
            known[model] = whole(model, made_up_images(BATCH, model.image_shape))
        return known[model]

    return of


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("name", ["resnet-18", "resnet-50", "resnet-152", "vit-b16"])
def test_stages_compute_what_one_device_computes(
    name: str,
    num_stages: int,
    vision_pool: WorkerPool,
    trace_once: Trace,
    expected: Callable[[VisionModel], torch.Tensor],
) -> None:
    model = find_model(None, name, image_size=64)
    with staged(model, trace_once, num_stages, vision_pool) as pipeline:
        passed = pipeline.run(NUM_MICRO_BATCHES)
    all_bytes = sum(block.parameter_bytes for block in trace_once(model).blocks)
    assert sum(pipeline.weight_bytes) == all_bytes, "each tensor is on one rank"
    assert max(pipeline.weight_bytes) < all_bytes
    logits = expected(model)
    assert 0.01 < logits.std() < 100, "activations neither vanish nor explode"
    assert difference(passed.logits, logits) < TOLERANCE
    assert len(passed.times) == num_stages * NUM_MICRO_BATCHES
    assert all(0 <= bubble < 1 for bubble in passed.bubbles)


def test_a_checkpoint_of_transformers_gives_its_logits(vit: Path) -> None:
    model = find_model(str(vit), None)
    images = made_up_images(2, model.image_shape)
    with torch.inference_mode():
        theirs = ViTForImageClassification.from_pretrained(vit).eval()(images).logits
    assert torch.equal(whole(model, images), theirs)
    assert (model.image_size, model.dtype) == (32, "float32")


@torch.no_grad()
def test_a_resnet_of_transformers_gives_its_logits_with_any_statistics(
    tmp_path: Path, vision_pool: WorkerPool, trace_once: Trace
) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1], num_labels=10
    )
    module = ResNetForImageClassification(config)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var") or ("normalization" in name and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_(std=tensor[0].numel() ** -0.5)
    module.save_pretrained(tmp_path)
    model = find_model(str(tmp_path), None, image_size=32)
    images = made_up_images(BATCH, model.image_shape)
    theirs = ResNetForImageClassification.from_pretrained(tmp_path).eval()(images).logits
    assert torch.equal(whole(model, images), theirs)
    with staged(model, trace_once, 2, vision_pool) as pipeline:
        assert difference(pipeline.run(NUM_MICRO_BATCHES).logits, theirs) < TOLERANCE


def test_any_order_of_micro_batches_gives_the_same(
    vision_pool: WorkerPool, trace_once: Trace, expected: Callable[[VisionModel], torch.Tensor]
) -> None:
    model = find_model(None, "resnet-18", image_size=64)
    first, second = forward_schedule(2, NUM_MICRO_BATCHES)
    turned: Schedule = (first[::-1], second[::-1])
    with staged(model, trace_once, 2, vision_pool) as pipeline:
        passed = pipeline.run(NUM_MICRO_BATCHES, turned)
    assert difference(passed.logits, expected(model)) < TOLERANCE


def test_weights_of_another_block_are_noticed(
    vit: Path, tmp_path: Path, vision_pool: WorkerPool, trace_once: Trace
) -> None:
    """The comparison that the tests above make fails where it should."""
    model = find_model(str(vit), None)
    tensors = load_file(vit / "model.safetensors")
    (layers,) = {name.partition(".0.")[0] for name in tensors if ".0." in name}
    names = {f"{layers}.2.": f"{layers}.3.", f"{layers}.3.": f"{layers}.2."}
    for name in list(tensors):
        for old, new in names.items():
            if name.startswith(old) and old < new:
                other = name.replace(old, new)
                tensors[name], tensors[other] = tensors[other], tensors[name]
    for config in vit.glob("*.json"):
        (tmp_path / config.name).write_bytes(config.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with staged(find_model(str(tmp_path), None), trace_once, 2, vision_pool) as pipeline:
        logits = pipeline.run(1).logits
    images = made_up_images(BATCH, model.image_shape)
    assert difference(logits, whole(model, images)) > 100 * TOLERANCE


def test_what_a_checkpoint_lacks_is_named(vit: Path, tmp_path: Path) -> None:
    for config in vit.glob("*.json"):
        (tmp_path / config.name).write_bytes(config.read_bytes())
    tensors = load_file(vit / "model.safetensors")
    model = find_model(str(tmp_path), None, dtype="float32")
    whole_head = tensors.pop("classifier.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor classifier\.weight, which"):
        open_weights(model, model.build())
    save_file({**tensors, "classifier.weight": whole_head[:3]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has the shape \[3, 768\], but .* \[10, 768\]"):
        open_weights(model, model.build())


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> VisionModel:
    """Of our own, so that ranks of a pool of its own import little; they find it from here."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    return find_model("vision.networks:Network", None, image_size=8)


@pytest.mark.parametrize("transport", ["auto", "distributed"])
def test_a_killed_rank_is_named_and_its_spans_can_be_read(
    network: VisionModel, trace_once: Trace, transport: str
) -> None:
    with WorkerPool(VISION) as own:
        with pytest.raises(RankError, match=r"rank 1 \(stage 1, tp 0\): .*killed by signal 9"):  # noqa: PT012, SIM117
            with staged(network, trace_once, 2, own, transport=transport) as pipeline:
                pipeline.run(2)
                os.kill(own.take(2)[1].process.pid, signal.SIGKILL)
                pipeline.run(2)
        assert len(pipeline.recorded().ranks[1].spans) > 6


@pytest.mark.parametrize(
    ("first_rank", "says"),
    [
        ("0F1 0F0 0F2", r"rank 0 sent \(step, rows, row bytes, incarnation\) \(2, 2"),
        ("0F0 1F1 0F2", "rank 0 .*1F1 was given to a rank of stage 0"),
    ],
)
def test_a_schedule_that_the_others_do_not_follow_is_noticed(
    network: VisionModel, trace_once: Trace, first_rank: str, says: str
) -> None:
    second = forward_schedule(2, NUM_MICRO_BATCHES)[1]
    schedule = (tuple(map(Action.parse, first_rank.split())), second)
    with WorkerPool(VISION) as own, pytest.raises(RankError, match=says):  # noqa: SIM117
        with staged(network, trace_once, 2, own) as pipeline:
            pipeline.run(NUM_MICRO_BATCHES, schedule)


def test_a_rank_that_hangs_is_named(network: VisionModel, trace_once: Trace) -> None:
    with WorkerPool(VISION) as own, pytest.raises(RankError, match=r"rank 0 .*process is stopped"):  # noqa: PT012, SIM117
        with staged(network, trace_once, 2, own) as pipeline:
            pipeline.run(2)
            os.kill(own.take(2)[0].process.pid, signal.SIGSTOP)
            pipeline.run(2)


def test_a_module_that_changes_what_it_is_given_leaves_the_images_alone(
    network: VisionModel, trace_once: Trace
) -> None:
    model = find_model("vision.networks:InPlace", None, image_size=8)
    with WorkerPool(VISION) as own, staged(model, trace_once, 2, own) as pipeline:
        first, second = (pipeline.run(NUM_MICRO_BATCHES).logits for _ in range(2))
    assert torch.equal(first, second)
    assert difference(first, whole(model, made_up_images(BATCH, model.image_shape))) < TOLERANCE
