"""What the driver and its ranks say to each other: msgpack, and nothing is ever unpickled.

Join, and every reply, go over a rank's socket pair in frames: 4 bytes of length and one message.
What follows Join goes to all ranks at once (`channel.py`).
"""

from __future__ import annotations

import socket
import struct

import msgspec

from bireme.checkpoint.names import NameMap
from bireme.config import EngineConfig
from bireme.engine.channel import Steps
from bireme.model_config import ModelConfig
from bireme.parallel.broadcast import MAX_FRAME_BYTES
from bireme.parallel.layout import CacheKind
from bireme.parallel.shm import SegmentPlan
from bireme.request import ScheduledBatch, StepMasks, StepOutput

_LENGTH = struct.Struct("<I")


class Join(msgspec.Struct, frozen=True, tag=True):
    """Become `rank` of a world of sum(widths) ranks that meet at `store_path`, or share `segment`
    (its path and its plan); further commands come over `steps`."""

    widths: tuple[int, ...]
    rank: int
    store_path: str
    device: str
    num_threads: int
    timeout_s: float
    steps: Steps
    segment: tuple[str, SegmentPlan] | None = None


class Load(msgspec.Struct, frozen=True, tag=True):
    """Build and fill this rank's part of the model. `folder` None: made-up weights."""

    model: ModelConfig
    config: EngineConfig
    layers_per_stage: tuple[int, ...]
    folder: str | None
    names: NameMap
    kinds: tuple[CacheKind, ...]
    max_model_len: int
    dtype: str


class Execute(msgspec.Struct, frozen=True, tag=True):
    batch: ScheduledBatch


class Masks(msgspec.Struct, frozen=True, tag=True):
    """What a step in flight waits for before it samples its masked slots."""

    masks: StepMasks


class Capture(msgspec.Struct, frozen=True, tag=True):
    """Write each following step's logits, and with `probes` every layer's results, under `folder`;
    None stops it."""

    folder: str | None
    probes: bool


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Drop the model and leave the world; the process stays."""


Command = Join | Load | Execute | Masks | Capture | Leave


class Done(msgspec.Struct, frozen=True, tag=True):
    """Joined, left, or capturing as asked."""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """Bytes on this rank, and what it took to read its weights (bytes and seconds)."""

    weight_bytes: int
    cache_bytes: int
    needed_bytes: int
    fetched_bytes: int
    verified_bytes: int
    seconds: float


class Output(msgspec.Struct, frozen=True, tag=True):
    output: StepOutput


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`is_secondary`: a peer was lost, so that the cause is likely elsewhere."""

    cause: str
    traceback: str
    is_user_error: bool
    is_secondary: bool


Reply = Done | Loaded | Output | Failed

_ENCODER = msgspec.msgpack.Encoder()
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(command: Command) -> bytes:
    return _ENCODER.encode(command)


def decode(body: bytes | bytearray) -> Command:
    return _COMMANDS.decode(body)


def frame(message: Command | Reply) -> bytes:
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


def send(sock: socket.socket, message: Command | Reply) -> None:
    sock.sendall(frame(message))


def _receive(sock: socket.socket) -> bytes | None:
    """The next frame's body; None when the other side is gone."""
    header = _exactly(sock, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return _exactly(sock, length)


def _exactly(sock: socket.socket, num_bytes: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < num_bytes:
        try:
            part = sock.recv(min(1 << 20, num_bytes - len(parts)))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


def receive_command(sock: socket.socket) -> Command | None:
    body = _receive(sock)
    return None if body is None else _COMMANDS.decode(body)


def receive_reply(sock: socket.socket) -> Reply | None:
    body = _receive(sock)
    return None if body is None else _REPLIES.decode(body)
