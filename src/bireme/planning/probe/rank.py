"""The process of a rank that is measured: `python -m bireme.planning.probe.rank`, by a WorkerPool."""

from __future__ import annotations

import msgspec
import torch

from bireme.engine import rank
from bireme.engine.messages import Done
from bireme.errors import EngineError
from bireme.planning.probe.hardware import cpu_model, memory_bytes
from bireme.planning.probe.messages import (
    PROBE,
    Describe,
    EmptyStep,
    Facts,
    Measure,
    Samples,
    Work,
)
from bireme.planning.probe.timing import Repeat, time_repeats
from bireme.planning.probe.work import Workshop


class ProbedRank(rank.Rank[rank.Commands]):
    """Does what it is asked as often as it is asked; keeps what it made for the last work."""

    _workshop: Workshop | None = None
    _prepared: tuple[Work, Repeat] | None = None

    def handle(self, command: msgspec.Struct) -> msgspec.Struct | None:
        if self._comm is None:
            raise EngineError("a rank was asked to measure before it joined a world")
        match command:
            case EmptyStep():
                return Done() if self._comm.mesh.answers else None
            case Describe():
                return self._facts()
            case Measure(work, num_warmup, num_repeats):
                return self._measure(work, num_warmup, num_repeats)
        raise AssertionError("the program knows no other command")

    def drop(self, *, is_orderly: bool) -> None:
        self._workshop = self._prepared = None

    def _facts(self) -> Facts:
        if self._device.type == "cuda":
            facts = torch.cuda.get_device_properties(self._device)
            return Facts(facts.name, facts.total_memory, 0)
        return Facts(cpu_model(), memory_bytes(), torch.get_num_threads())

    @torch.inference_mode()
    def _measure(self, work: Work, num_warmup: int, num_repeats: int) -> Samples:
        repeat = self._repeat(work)
        for _ in range(num_warmup):
            repeat.run()
        return Samples(time_repeats(repeat, num_repeats, self._device), repeat.num_calls)

    def _repeat(self, work: Work) -> Repeat:
        if self._prepared is None or self._prepared[0] != work:
            self._prepared = None
            assert self._comm is not None
            self._workshop = self._workshop or Workshop(self._comm, self._device)
            self._prepared = work, self._workshop.prepare(work)
        return self._prepared[1]


def main() -> None:
    rank.serve(PROBE, ProbedRank, rank.Commands(PROBE))


if __name__ == "__main__":
    main()
