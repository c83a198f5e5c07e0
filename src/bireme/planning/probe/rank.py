"""The process of a rank that is measured: `python -m bireme.planning.probe.rank`, by a WorkerPool."""

from __future__ import annotations

import msgspec
import torch

from bireme.engine import rank
from bireme.engine.messages import Done
from bireme.errors import EngineError
from bireme.planning.probe.hardware import cpu_model, memory_bytes
from bireme.planning.probe.measurer import Measurer
from bireme.planning.probe.messages import PROBE, Describe, EmptyStep, Facts, Measure


class ProbedRank(rank.Rank[rank.Commands]):
    """Does what it is asked as often as it is asked."""

    _measurer: Measurer | None = None

    def handle(self, command: msgspec.Struct) -> msgspec.Struct | None:
        if self._comm is None:
            raise EngineError("a rank was asked to measure before it joined a world")
        match command:
            case EmptyStep():
                return Done() if self._comm.mesh.answers else None
            case Describe():
                return self._facts()
            case Measure():
                self._measurer = self._measurer or Measurer(self._comm, self._device)
                return self._measurer.measure(command)
        raise AssertionError("the program knows no other command")

    def drop(self, *, is_orderly: bool) -> None:
        self._measurer = None

    def _facts(self) -> Facts:
        if self._device.type == "cuda":
            facts = torch.cuda.get_device_properties(self._device)
            return Facts(facts.name, facts.total_memory, 0)
        return Facts(cpu_model(), memory_bytes(), torch.get_num_threads())


def main() -> None:
    rank.serve(PROBE, ProbedRank, rank.Commands(PROBE))


if __name__ == "__main__":
    main()
