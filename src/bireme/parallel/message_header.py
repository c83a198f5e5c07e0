"""What every message between stages states of itself."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bireme.errors import EngineError
from bireme.parallel.pipeline import Edge
from bireme.request import StepHeader

_HEADER = struct.Struct("<qqqq")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class Stated:
    """What a message says of itself."""

    step_id: int
    num_rows: int
    row_bytes: int
    incarnation: int

    @classmethod
    def of(cls, header: StepHeader, num_rows: int, row_bytes: int) -> Stated:
        incarnation, step_id = header
        return cls(step_id, num_rows, row_bytes, incarnation)

    @property
    def payload_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    def pack(self) -> bytes:
        return _HEADER.pack(self.step_id, self.num_rows, self.row_bytes, self.incarnation)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Stated:
        return cls(*_HEADER.unpack(data))

    def check(self, expected: Stated, edge: Edge) -> None:
        """EngineError names both where they differ."""
        if self != expected:
            raise EngineError(
                f"rank {edge.src} sent (step, rows, row bytes, incarnation) {self._values} "
                f"to rank {edge.dst}, which expected {expected._values}"
            )

    @property
    def _values(self) -> tuple[int, ...]:
        return self.step_id, self.num_rows, self.row_bytes, self.incarnation
