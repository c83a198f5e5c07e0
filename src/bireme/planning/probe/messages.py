"""What the driver asks of the ranks that it measures."""

from __future__ import annotations

import msgspec

from bireme.engine.messages import Common, CommonReply, Program


class Multiply(msgspec.Struct, frozen=True, tag=True):
    """Activations [num_tokens, in_features] by a weight [out_features, in_features]."""

    dtype: str
    num_tokens: int
    in_features: int
    out_features: int


class ReadMemory(msgspec.Struct, frozen=True, tag=True):
    num_bytes: int


class CopyMemory(msgspec.Struct, frozen=True, tag=True):
    """`num_bytes` are read, and as many written."""

    num_bytes: int


class Launch(msgspec.Struct, frozen=True, tag=True):
    """An operation on one number: host time until it is under way."""


class ReadPageCache(msgspec.Struct, frozen=True, tag=True):
    """The tensors of a checkpoint that was just written, into memory."""

    folder: str


ROW_BYTES = 8192  # of a token's hidden states, of which models sum some


class AllReduce(msgspec.Struct, frozen=True, tag=True):
    """A sum over the tensor group, of float32, in rows of at most `ROW_BYTES`."""

    num_bytes: int


class Send(msgspec.Struct, frozen=True, tag=True):
    """From stage 0 to stage 1, and as much back."""

    num_bytes: int


Work = Multiply | ReadMemory | CopyMemory | Launch | ReadPageCache | AllReduce | Send


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Asks for `Facts`."""


class EmptyStep(msgspec.Struct, frozen=True, tag=True):
    """Nothing; the rank that answers steps says that it is done."""


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Asks for `Samples`, after `num_warmup` more that do not count."""

    work: Work
    num_warmup: int
    num_repeats: int


class Facts(msgspec.Struct, frozen=True, tag=True):
    """Of a rank's device; a GPU has 0 threads."""

    model: str
    memory_bytes: int
    num_threads: int


class Samples(msgspec.Struct, frozen=True, tag=True):
    """Seconds of one piece of work, of which each repeat did `num_calls`."""

    seconds: list[float]
    num_calls: int


Command = Common | Describe | EmptyStep | Measure
Reply = CommonReply | Facts | Samples

PROBE = Program(
    "bireme.planning.probe.rank", msgspec.msgpack.Decoder(Command), msgspec.msgpack.Decoder(Reply)
)
