"""What a rank tells the engine of a step, which may be there long before its device is over with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from bireme.kernels.host_copies import download
from bireme.request import StepOutput


@dataclass(frozen=True)
class Awaited:
    """A field of the answer, and how it is told of what the device makes."""

    name: str
    made: torch.Tensor
    tell: Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Answer:
    """All but what is awaited, and that on the host; on CUDA once `arrived` is over."""

    told: StepOutput
    awaited: list[Awaited]
    arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, told: StepOutput, awaited: list[Awaited]) -> Answer:
        """Of what is made on a device, in its stream; what follows there may overwrite it."""
        fetched = [replace(each, made=download(each.made)) for each in awaited]
        if not any(each.made.is_cuda for each in awaited):
            return cls(told, fetched)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(told, fetched, arrived)

    @property
    def is_there(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def output(self) -> StepOutput:
        """Waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found = {each.name: each.tell(each.made) for each in self.awaited}
        return msgspec.structs.replace(self.told, **found)
