"""The small residual network, in blocks that can be held up: by an operation, which outlives every trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vision.networks import Network

on_block: list[Callable[[int], None]] = []  # what a rank does as it comes to a block


@torch.library.custom_op(
    "planted::hold_up", mutates_args=(), schema="(Tensor x, int block) -> Tensor"
)
def hold_up(x: torch.Tensor, block: int) -> torch.Tensor:
    for act in on_block:
        act(block)
    return x.clone()


@hold_up.register_fake
def _(x: torch.Tensor, block: int) -> torch.Tensor:
    return torch.empty_like(x)


class HeldUp(nn.Module):
    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        self.block, self.index = block, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.block(hold_up(x, self.index))
        return made


class SlowNetwork(Network):
    def __init__(self) -> None:
        super().__init__()
        self.stem = HeldUp(self.stem, 0)  # type: ignore[assignment]
        self.blocks = nn.Sequential(
            *(HeldUp(block, index) for index, block in enumerate(self.blocks, 1))
        )
