"""What a rank tells the engine of a step, which may be there long before its device has chosen the ids."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from bireme.request import StepOutput


@dataclass(frozen=True)
class Answer:
    """All but the ids, and these on the host; on CUDA once `arrived` is over."""

    told: StepOutput
    ids: torch.Tensor | None
    arrived: torch.cuda.Event | None = None

    @classmethod
    def of(cls, told: StepOutput, ids: torch.Tensor | None) -> Answer:
        """Of ids [S] on a device; what follows there may overwrite them."""
        if ids is None or not ids.is_cuda:
            return cls(told, ids)
        on_host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        on_host.copy_(ids, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(told, on_host, arrived)

    @property
    def is_there(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def output(self) -> StepOutput:
        """Waits for the ids."""
        if self.arrived is not None:
            self.arrived.synchronize()
        ids = [] if self.ids is None else [[id_] for id_ in self.ids.tolist()]
        return msgspec.structs.replace(self.told, token_ids=ids)
