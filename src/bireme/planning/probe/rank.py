"""The process of a rank that is measured: `python -m bireme.planning.probe.rank`, by a WorkerPool."""

from __future__ import annotations

import torch

from bireme.engine.messages import Result
from bireme.engine.worker import Worker, main
from bireme.errors import EngineError
from bireme.planning.probe.hardware import cpu_model, memory_bytes
from bireme.planning.probe.messages import (
    Describe,
    EmptyStep,
    Facts,
    Measure,
    Samples,
    Work,
    decode_question,
    encode,
)
from bireme.planning.probe.timing import Repeat, time_repeats
from bireme.planning.probe.work import Workshop


class ProbedRank(Worker):
    """Does what it is asked as often as it is asked; keeps what it made for the last work."""

    _workshop: Workshop | None = None
    _prepared: tuple[Work, Repeat] | None = None

    def perform(self, body: bytes) -> Result | None:
        comm = self._comm
        if comm is None:
            raise EngineError("a rank was asked to measure before it joined a world")
        match decode_question(body):
            case EmptyStep():
                return Result(b"") if comm.mesh.answers else None
            case Describe():
                return Result(encode(self._facts()))
            case Measure(work, num_warmup, num_repeats):
                return Result(encode(self._measure(work, num_warmup, num_repeats)))

    def leave(self) -> None:
        self._workshop = self._prepared = None
        super().leave()

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


if __name__ == "__main__":
    main(ProbedRank)
