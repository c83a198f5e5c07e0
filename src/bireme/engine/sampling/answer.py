"""What a rank tells the engine of a step, which may be there long before its device is over with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
import torch

from bireme.kernels.host_copies import download
from bireme.request import PromptLogprobs, StepOutput, TokenLogprobs

T = TypeVar("T")


@dataclass(frozen=True)
class Awaited(Generic[T]):
    """What is told of a tensor once it is on the host."""

    fetched: torch.Tensor
    tell: Callable[[torch.Tensor], T]

    @classmethod
    def of(cls, made: torch.Tensor, tell: Callable[[torch.Tensor], T]) -> Awaited[T]:
        """Of what a device makes; what follows in its stream may overwrite it."""
        return cls(download(made), tell)

    def told(self) -> T:
        return self.tell(self.fetched)


@dataclass(frozen=True)
class Answer:
    """`rest` is known at once, the others once they are on the host: on CUDA when `arrived` is over."""

    rest: StepOutput
    ids: Awaited[list[list[int]]] | None
    logprobs: Awaited[list[list[TokenLogprobs]]] | None
    prompt_logprobs: Awaited[list[PromptLogprobs]] | None
    arrived: torch.cuda.Event | None

    @property
    def is_there(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def output(self) -> StepOutput:
        """Waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return msgspec.structs.replace(
            self.rest,
            token_ids=[] if self.ids is None else self.ids.told(),
            logprobs=[] if self.logprobs is None else self.logprobs.told(),
            prompt_logprobs=[] if self.prompt_logprobs is None else self.prompt_logprobs.told(),
        )


def arrival(device: torch.device) -> torch.cuda.Event | None:
    """Of all that is on its way from the device to the host."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
