"""Images become what the checkpoint's own processor makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bireme.errors import ConfigError, RequestError
from bireme.vision.preprocessing import Preprocessing, read_images


def draw(path: Path, width: int, height: int, mode: str = "RGB") -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 48, "width": 48}),
        ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3),
        ViTImageProcessorPil(do_normalize=False, do_rescale=False),
        ConvNextImageProcessorPil(size={"shortest_edge": 56}, crop_pct=0.875, resample=3),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    ],
)
def test_pixels_are_those_of_transformers(processor: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    draw(folder / "wide.png", 80, 60)
    draw(folder / "high.jpg", 61, 90)
    draw(folder / "grey.png", 100, 100, "L")
    processor.save_pretrained(tmp_path)
    names, images = read_images(folder, Preprocessing.of(tmp_path, 224))
    assert names == ["grey.png", "high.jpg", "wide.png"]
    opened = [Image.open(folder / name).convert("RGB") for name in names]
    expected = torch.stack(
        [torch.as_tensor(np.array(it)) for it in processor(opened)["pixel_values"]]
    )
    assert images.shape == expected.shape
    torch.testing.assert_close(images, expected.float(), atol=1e-4, rtol=1e-5)


def test_without_a_processor_images_are_as_for_imagenet(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 300, 400)
    image = read_images(tmp_path, Preprocessing.of(None, 64))[1]
    assert image.shape == (1, 3, 64, 64)
    assert abs(float(image.mean())) < 1


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    preprocessing = Preprocessing.of(None, 64)
    with pytest.raises(RequestError, match="holds no file"):
        read_images(tmp_path, preprocessing)
    with pytest.raises(RequestError, match="is no folder of images"):
        read_images(tmp_path / "nothing", preprocessing)
    draw(tmp_path / "a.png", 300, 400)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"b\.png is no image that can be read"):
        read_images(tmp_path, preprocessing)
    assert len(read_images(tmp_path, preprocessing, most=1)[0]) == 1
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(RequestError, match=r"b\.png is no image that can be read"):
        read_images(tmp_path, preprocessing)


@pytest.mark.parametrize("size", [(20_000, 20_000), (8_000, 8_000), (1, 60_000)])
def test_images_that_would_take_all_memory_are_refused_by_name(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    """Also such as grow when their shorter edge is resized."""
    Image.new("1", size).save(tmp_path / "large.png")
    with pytest.raises(RequestError, match=r"large\.png is no image that can be read: .* pixels"):
        read_images(tmp_path, Preprocessing.of(None, 64))


@pytest.mark.parametrize("text", ['{"size": "large"}', '{"size": 3, "image_mean": 3}'])
def test_a_processor_that_is_not_understood_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError, match="is not understood"):
        Preprocessing.of(tmp_path, 224)
