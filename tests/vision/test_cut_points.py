"""Where a module can be cut, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model

from bireme.errors import ConfigError
from bireme.vision.model import VisionModel, find_model
from bireme.vision.preprocessing import made_up_images
from bireme.vision.tracing import Traced, trace
from bireme.vision.weights import materialise, open_weights
from vision.networks import Unusual
from vision.reference import whole

NETWORKS = "vision.networks"


def of(name: str) -> VisionModel:
    return find_model(f"{NETWORKS}:{name}", None, image_size=8)


def traced(name: str) -> Traced:
    model = of(name)
    return trace(model.build(), model.image_shape, model.torch_dtype)


def test_cuts_are_where_one_activation_is_alive() -> None:
    found = traced("Network")
    assert [block.shape.name for block in found.blocks] == [
        "stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3",
    ]  # fmt: skip
    assert found.blocks[0].shape.out_bytes == 8 * 8 * 8 * 4
    assert found.blocks[-1].shape.out_shape == (5,)
    assert found.blocks[1].parameter_bytes == (8 * 8 * 9 + 8) * 4
    assert found.blocks[1].shape.peak_bytes == 3 * 8 * 8 * 8 * 4, "input, convolution, and its ReLU"


def test_a_convolution_is_not_cut_from_what_it_takes_upon_itself() -> None:
    found = traced("Flat")
    assert [block.shape.name for block in found.blocks] == ["0", "3", "6", "9", "10", "11"]
    with pytest.raises(ConfigError, match=r"split point 4 is no point to cut at: .* 3, 6, 9"):
        found.block_at("4")


@torch.inference_mode()
def in_blocks(model: VisionModel, images: torch.Tensor) -> torch.Tensor:
    module = model.build()
    weights, x = open_weights(model, module), images
    for block in trace(module, model.image_shape, model.torch_dtype).blocks:
        x = materialise(block.module, weights, torch.device("cpu"))(x)
    return x


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", ["Network", "Unusual", "Flat"])
def test_blocks_one_after_another_are_the_module_at_any_batch(name: str, batch: int) -> None:
    model = of(name)
    images = made_up_images(batch, model.image_shape)
    assert torch.equal(in_blocks(model, images), whole(model, images))


@torch.inference_mode()
def test_blocks_of_an_unusual_module_are_what_plain_torch_computes(tmp_path: Path) -> None:
    """With a file that holds the weights of its shared block once."""
    torch.manual_seed(0)
    module = Unusual().eval()
    save_model(module, str(tmp_path / "model.safetensors"))
    model = find_model(f"{NETWORKS}:Unusual", None, tmp_path, image_size=8)
    module.noise = constants(model)["noise"]  # which no file holds
    images = made_up_images(2, model.image_shape)
    assert torch.equal(in_blocks(model, images), module(images))


def constants(model: VisionModel) -> Mapping[str, torch.Tensor]:
    return open_weights(model, model.build()).constants


def test_constants_are_the_same_in_every_process_and_made_without_the_weights() -> None:
    model = of("Unusual")
    assert all(parameter.is_meta for parameter in model.build_constants().parameters())
    found = constants(model)
    assert {name for name in found if "batches_tracked" not in name} == {"mean", "noise"}
    assert torch.equal(found["noise"], constants(model)["noise"])
    assert torch.equal(found["mean"], Unusual().mean)
    with pytest.raises(ConfigError, match="OfWeights computes total from its weights"):
        constants(of("OfWeights"))


def test_points_have_short_names_and_unknown_ones_get_the_nearest(
    trace_once: Callable[[VisionModel], Traced],
) -> None:
    found = trace_once(find_model(None, "resnet-18", image_size=64))
    assert found.blocks[found.block_at("stages.2.layers.0")].shape.name.endswith(
        "stages.2.layers.0"
    )
    assert found.block_at("stages.2") == found.block_at("stages.2.layers.0")
    with pytest.raises(
        ConfigError, match=r"layer3\.0 is no point to cut at: .* nearest .*layers\.0"
    ):
        found.block_at("layer3.0")
    inside = "resnet.encoder.stages.2.layers.0.layer.1"
    with pytest.raises(
        ConfigError,
        match=r"more than one activation is alive there, or a BatchNorm or ReLU begins; the nearest",
    ):
        found.block_at(inside)
    with pytest.raises(ConfigError, match=r"layers\.1 names 4 points"):
        found.block_at("layers.1")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Branching", "Branching cannot be traced with images of 3x8x8: "),
        ("FixedBatch", r"FixedBatch .* constant of the batch size, as len\(x\) does; use x.shape"),
        ("TwoOutputs", "its forward returns 2 tensors; return the logits alone"),
        ("Counting", "it changes its tensor runs while it runs; .* may depend on that image alone"),
        (
            "Unregistered",
            r"uses a tensor \[3\] .* no attribute of a module; register it as a buffer",
        ),
        ("no_module", "makes a int, not an nn.Module"),
        ("missing", "has no function missing"),
    ],
)
def test_what_cannot_be_traced_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        traced(name)


def test_a_module_without_a_point_to_cut_at_is_one_block() -> None:
    assert len(traced("Dense").blocks) == 1


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config resnet-51; the closest is resnet-50"):
        find_model(None, "resnet-51")
    with pytest.raises(
        ConfigError, match="is no folder; give a folder, a name like resnet-50, torch"
    ):
        find_model(str(tmp_path / "nothing"), None)
    with pytest.raises(ConfigError, match="give either MODEL or --config NAME"):
        find_model(None, None)
    with pytest.raises(ConfigError, match="no_such:thing needs the module no_such"):
        find_model("no_such:thing", None).build()
