"""What the driver and its ranks say to each other: msgpack, and nothing is ever unpickled.

Join, and every reply, go over a rank's socket pair in frames: 4 bytes of length and one message.
What follows Join goes to all ranks at once (`channel.py`).
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import msgspec

from bireme.checkpoint.names import NameMap
from bireme.config import EngineConfig, format_bytes
from bireme.engine.channel import Steps
from bireme.model_config import ModelConfig
from bireme.parallel.broadcast import MAX_FRAME_BYTES
from bireme.parallel.layout import CacheKind
from bireme.parallel.peer_room import PeerRoom
from bireme.parallel.segment_plan import SegmentPlan
from bireme.request import ScheduledBatch, StepMasks, StepOutput

_LENGTH = struct.Struct("<I")


class Join(msgspec.Struct, frozen=True, tag=True):
    """Become `rank` of a world of sum(widths) ranks that meet at `store_path`, or share `segment`
    (its path and its plan); further commands come over `steps`. GPUs go through one another's
    memory for what they have `room` for, where they can."""

    widths: tuple[int, ...]
    rank: int
    store_path: str
    device: str
    num_threads: int
    timeout_s: float
    steps: Steps
    segment: tuple[str, SegmentPlan] | None = None
    room: PeerRoom = PeerRoom()


class Load(msgspec.Struct, frozen=True, tag=True):
    """Build and fill this rank's part of the model. `folder` None: made-up weights. `has_c_kernels`: the
    driver can load those of `kernels/cpu`, so this rank must."""

    model: ModelConfig
    config: EngineConfig
    layers_per_stage: tuple[int, ...]
    folder: str | None
    names: NameMap
    kinds: tuple[CacheKind, ...]
    max_model_len: int
    dtype: str
    has_c_kernels: bool


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


class ReadUsage(msgspec.Struct, frozen=True, tag=True):
    """Say what memory this process holds, once all steps so far are over and their spans written."""


class BeginProfile(msgspec.Struct, frozen=True, tag=True):
    """From the next step on note what every layer takes, or, with `kernels`, have torch.profiler write a
    trace to that file, `{rank}` in its name being this rank's number."""

    kernels: str | None


class EndProfile(msgspec.Struct, frozen=True, tag=True):
    """Stop it, and say what was seen."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Drop the model and leave the world; the process stays."""


class ReadClock(msgspec.Struct, frozen=True, tag=True):
    """Say what time it is."""


Common = Join | ReadClock | Leave
Command = Common | Load | Execute | Masks | Capture | ReadUsage | BeginProfile | EndProfile


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

    def describe(self) -> str:
        weights, cache = format_bytes(self.weight_bytes), format_bytes(self.cache_bytes)
        return f"weights {weights}, cache {cache}, {self._read} in {self.seconds:.2f} s"

    @property
    def _read(self) -> str:
        """What the rank needed of the files; of an artifact also what it fetched, in whole chunks, and
        verified."""
        needed = f"read {format_bytes(self.needed_bytes)}"
        if not self.verified_bytes:
            return needed
        fetched, verified = (format_bytes(n) for n in (self.fetched_bytes, self.verified_bytes))
        return f"{needed} (fetched {fetched}, verified {verified})"


class RankUsage(msgspec.Struct, frozen=True, tag=True):
    """Bytes that a rank's process holds between steps. `beyond_rest_bytes`: the most that it held beside
    since the profile began, None where the host does not tell. Those of a GPU are None on a CPU."""

    rss_bytes: int
    pss_bytes: int
    shared_bytes: int
    swapped_bytes: int
    num_major_faults: int  # since the process began
    weight_resident_bytes: int
    cache_resident_bytes: int
    communication_bytes: int
    beyond_rest_bytes: int | None
    device_used_bytes: int | None
    reserved_bytes: int | None
    num_alloc_retries: int | None


class LayerSeen(msgspec.Struct, frozen=True, array_like=True):
    """A layer, 'embedding' or 'head' in `count` steps; seconds, its collectives included."""

    name: str
    is_decode: bool
    count: int
    total_s: float
    median_s: float


class OperatorSeen(msgspec.Struct, frozen=True, array_like=True):
    """Or a kernel of a GPU. `self_s` without the operators inside it."""

    name: str
    count: int
    self_s: float
    total_s: float


class Profiled(msgspec.Struct, frozen=True, tag=True):
    layers: list[LayerSeen]
    operators: list[OperatorSeen]


class Output(msgspec.Struct, frozen=True, tag=True):
    output: StepOutput


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`is_secondary`: a peer was lost, so that the cause is likely elsewhere."""

    cause: str
    traceback: str
    is_user_error: bool
    is_secondary: bool


class Clock(msgspec.Struct, frozen=True, tag=True):
    """A rank's CLOCK_MONOTONIC."""

    ns: int


CommonReply = Done | Clock | Failed
Reply = CommonReply | Loaded | Output | RankUsage | Profiled


@dataclass(frozen=True)
class Program:
    """What a rank's process runs: a module with a `main`, what it can be told, and what it can say.

    Every program knows the common commands and replies.
    """

    module: str
    commands: msgspec.msgpack.Decoder[Any]
    replies: msgspec.msgpack.Decoder[Any]


LANGUAGE_MODEL = Program(
    "bireme.engine.worker", msgspec.msgpack.Decoder(Command), msgspec.msgpack.Decoder(Reply)
)
_ENCODER = msgspec.msgpack.Encoder()


def encode(command: msgspec.Struct) -> bytes:
    return _ENCODER.encode(command)


def decode(body: bytes | bytearray) -> Command:
    command: Command = LANGUAGE_MODEL.commands.decode(body)
    return command


def framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def frame(message: msgspec.Struct) -> bytes:
    return framed(_ENCODER.encode(message))


def send(sock: socket.socket, message: msgspec.Struct) -> None:
    sock.sendall(frame(message))


class FrameReader:
    """Frames of a socket, read to the byte: what follows a frame stays readable there."""

    def __init__(self, sock: socket.socket, most_bytes: int = MAX_FRAME_BYTES) -> None:
        self._sock, self._part, self._most_bytes = sock, bytearray(), most_bytes
        self._num_bytes, self._is_body = _LENGTH.size, False

    def read(self) -> bytes | None:
        """The next frame's body; of a socket that does not block None while it has not come whole.
        EOFError when the other side is gone."""
        while len(self._part) < self._num_bytes:
            missing = self._num_bytes - len(self._part)
            try:  # past the socket's own timeout, which would be waited for
                part = os.read(self._sock.fileno(), min(1 << 20, missing))
            except BlockingIOError:
                return None
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError("the other side is gone")
            self._part += part
            if len(self._part) == self._num_bytes and not self._is_body:
                self._begin_body()
        body = bytes(self._part)
        self._begin(_LENGTH.size, is_body=False)
        return body

    def _begin_body(self) -> None:
        (length,) = _LENGTH.unpack(self._part)
        if length > self._most_bytes:
            raise ValueError(f"a frame of {length} bytes exceeds the limit of {self._most_bytes}")
        self._begin(length, is_body=True)

    def _begin(self, num_bytes: int, *, is_body: bool) -> None:
        self._part, self._num_bytes, self._is_body = bytearray(), num_bytes, is_body


class CommandReader(FrameReader):
    def __init__(self, sock: socket.socket, program: Program = LANGUAGE_MODEL) -> None:
        super().__init__(sock)
        self._decoder = program.commands

    def next(self) -> msgspec.Struct:
        """Waits for it; EOFError when the driver is gone."""
        body = self.read()
        assert body is not None, "the socket blocks"
        command: msgspec.Struct = self._decoder.decode(body)
        return command


class ReplyReader(FrameReader):
    def __init__(
        self,
        sock: socket.socket,
        program: Program = LANGUAGE_MODEL,
        most_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        super().__init__(sock, most_bytes)
        self._decoder = program.replies

    def next(self) -> msgspec.Struct | None:
        """None while it has not come whole; EOFError when the rank is gone."""
        body = self.read()
        return None if body is None else self._decoder.decode(body)
