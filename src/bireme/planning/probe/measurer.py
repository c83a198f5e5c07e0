"""What a rank does that is measured: a piece of work, as often as it is asked."""

from __future__ import annotations

import torch

from bireme.parallel.collectives import Communicator
from bireme.planning.probe.messages import Measure, Samples, Work
from bireme.planning.probe.timing import Repeat, time_repeats
from bireme.planning.probe.work import Workshop


class Measurer:
    """Keeps what it made for the last work."""

    def __init__(self, comm: Communicator, device: torch.device) -> None:
        self._workshop, self._device = Workshop(comm, device), device
        self._prepared: tuple[Work, Repeat] | None = None

    @torch.inference_mode()
    def measure(self, asked: Measure) -> Samples:
        repeat = self._repeat(asked.work)
        for _ in range(asked.num_warmup):
            repeat.run()
        return Samples(time_repeats(repeat, asked.num_repeats, self._device), repeat.num_calls)

    def _repeat(self, work: Work) -> Repeat:
        if self._prepared is None or self._prepared[0] != work:
            self._prepared = None  # gives the memory back before more is taken
            self._prepared = work, self._workshop.prepare(work)
        return self._prepared[1]
