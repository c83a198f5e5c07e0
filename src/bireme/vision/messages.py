"""What the driver of a vision pipeline and its ranks say to each other, beside joining and leaving."""

from __future__ import annotations

import msgspec

from bireme.engine.messages import Common, CommonReply, Program, RankUsage, ReadUsage
from bireme.vision.model import VisionModel


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Time every block of the model, one after another, so that none has to fit beside another."""

    model: VisionModel
    micro_batch: int
    repeats: int
    is_captured: bool


class Load(msgspec.Struct, frozen=True, tag=True):
    """Hold this rank's stage of the model. Stage 0 takes images from memory at a path, which has room
    for `num_images`: now, or where `is_live` each time that it is told of some.

    `is_captured`: a GPU runs it as a CUDA graph.
    """

    model: VisionModel
    blocks_per_stage: tuple[int, ...]
    images_path: str
    num_images: int
    is_captured: bool
    is_live: bool = False


class Run(msgspec.Struct, frozen=True, tag=True):
    """Pass micro-batches of these sizes through; each rank does its row of the schedule (`2F0`).

    They are behind one another in the images' memory, from image `first_image` on, and from the first
    again behind the last. Micro-batch i is step `first_step + i`. The last stage answers with the
    logits, the others when they are through; not where images are live.
    """

    schedule: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    first_step: int
    first_image: int = 0


class Measured(msgspec.Struct, frozen=True, tag=True):
    """Seconds of each block, and of a copy of its result."""

    compute_s: list[float]
    transfer_s: list[float]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """Bytes of the tensors that a rank filled."""

    weight_bytes: int


class Logits(msgspec.Struct, frozen=True, tag=True):
    """[batch, num_classes] float32, of the last stage."""

    num_classes: int
    values: bytes


Command = Common | Measure | Load | Run | ReadUsage
Reply = CommonReply | Measured | Loaded | Logits | RankUsage

VISION = Program(
    "bireme.vision.worker", msgspec.msgpack.Decoder(Command), msgspec.msgpack.Decoder(Reply)
)
