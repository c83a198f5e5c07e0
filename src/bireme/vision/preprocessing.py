"""Images as a checkpoint wants them: its preprocessor_config.json, done with PIL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bireme.errors import ConfigError, RequestError
from bireme.hf_config import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_BILINEAR = 2  # in PIL's numbering
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # that strangers may send
_MOST_PIXELS = 1 << 25  # of a file, as it comes and resized: 100 MB
_WARP_SIDE = 384  # from here on ConvNeXt's processor, which ResNet uses, resizes without a crop


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize to `resize` (height, width), or the shorter edge to it; crop the middle to `side`."""

    resize: tuple[int, int] | int
    side: int
    resample: int = _BILINEAR
    scale: float = 1 / 255
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    @classmethod
    def of(cls, folder: Path | None, side: int) -> Preprocessing:
        """A folder's own, else ImageNet's at `side` pixels."""
        path = None if folder is None else folder / "preprocessor_config.json"
        if path is None or not path.exists():
            return cls(resize=_before_crop(side, 0.875), side=side)
        given = read_json(path)
        try:
            return cls._from(given, side)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{path} is not understood; it needs a size, and image_mean and image_std of 3 numbers"
            ) from None

    @classmethod
    def _from(cls, given: dict[str, Any], side: int) -> Preprocessing:
        size = given.get("size", side)
        if isinstance(size, dict) and "height" in size:
            resize: tuple[int, int] | int = (int(size["height"]), int(size["width"]))
            side = int(size["height"])
        else:
            side = int(size["shortest_edge"] if isinstance(size, dict) else size)
            resize = (side, side)
            if isinstance(given["size"], dict):
                resize = _before_crop(side, given.get("crop_pct") or 1.0)
        if given.get("do_center_crop"):
            crop = given["crop_size"]
            side = int(crop["height"] if isinstance(crop, dict) else crop)
        normalises = given.get("do_normalize", True)
        return cls(
            resize=resize,
            side=side,
            resample=int(given.get("resample", _BILINEAR)),
            scale=float(given.get("rescale_factor", 1 / 255))
            if given.get("do_rescale", True)
            else 1.0,
            mean=tuple(map(float, given["image_mean"])) if normalises else (0.0,) * 3,
            std=tuple(map(float, given["image_std"])) if normalises else (1.0,) * 3,
        )

    def __call__(self, image: Image) -> torch.Tensor:
        """[3, side, side] float32"""
        from PIL.Image import Resampling

        image = image.convert("RGB").resize(
            self._resized(image.width, image.height), Resampling(self.resample)
        )
        left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
        image = image.crop((left, top, left + self.side, top + self.side))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) * self.scale
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def num_pixels(self, width: int, height: int) -> int:
        """Of an image of this size, resized and not cropped yet."""
        return math.prod(self._resized(width, height))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height), as PIL has them."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        shorter = min(width, height)
        return width * self.resize // shorter, height * self.resize // shorter


def _before_crop(side: int, share: float) -> tuple[int, int] | int:
    """What the shorter edge becomes, of which the crop leaves `share`."""
    return (side, side) if side >= _WARP_SIDE else int(side / share)


def read_images(
    folder: Path, preprocessing: Preprocessing, most: int | None = None
) -> tuple[list[str], torch.Tensor]:
    """The names of a folder's files, in order, and their images [N, 3, H, W] in float32; the first
    `most` of them."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ConfigError("images are read with pillow; pip install 'bireme[vision]'") from None
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder of images")
    paths = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )
    if not paths:
        raise RequestError(f"{folder} holds no file; put at least one image there")
    images = []
    paths = paths[:most]
    for path in paths:
        try:
            with Image.open(path) as image:
                _num_pixels(image.size, preprocessing)
                images.append(preprocessing(image))
        except (
            UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError
        ) as error:  # fmt: skip
            raise RequestError(f"{path} is no image that can be read: {error}") from None
    return [path.name for path in paths], torch.stack(images)


def image_pixels(content: bytes, preprocessing: Preprocessing) -> int:
    """Of a file that a stranger sent, as it comes or resized, whichever is more; it is not decoded yet.
    RequestError where it is no image, or so large that it would take all memory."""
    with _opened(content) as image:
        size = image.size
    return _num_pixels(size, preprocessing)


def _num_pixels(size: tuple[int, int], preprocessing: Preprocessing) -> int:
    if min(size) > 0:
        num_pixels = max(math.prod(size), preprocessing.num_pixels(*size))
        if num_pixels <= _MOST_PIXELS:
            return num_pixels
    raise RequestError(
        f"an image of {size[0]} x {size[1]} pixels; at most {_MOST_PIXELS} are taken, "
        "also once its shorter edge has its size"
    )


def decode_image(content: bytes, preprocessing: Preprocessing) -> torch.Tensor:
    """[3, side, side] of a file that a stranger sent; RequestError as for `image_pixels`."""
    image_pixels(content, preprocessing)
    with _opened(content) as image:
        return preprocessing(image)


@contextmanager
def _opened(content: bytes) -> Iterator[Image]:
    from PIL import Image

    try:
        with Image.open(BytesIO(content), formats=_FORMATS) as image:
            yield image
    except Exception as error:  # whatever decoders raise of hostile bytes
        raise RequestError(
            f"no image that can be read ({', '.join(_FORMATS)}): {type(error).__name__}"
        ) from None


def made_up_images(num_images: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """[N, 3, H, W] float32, as normalised images are: about 0, about 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_images, *shape), generator=generator)
