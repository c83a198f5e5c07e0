"""How the contexts of a step's sequences are split among the programs that attend to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ContextSplits:
    """int32 `items` [W, 3] of a row, which split of its context, and of how many; the last items, of 0, are none.
    `rows` [B, 2] holds where a row's items begin, which follow one another, and how many they are: at least one.
    A power of two of contexts of one length have `even` splits each, other numbers of them up to twice as many, and
    short ones of few blocks fewer. Contexts are gone through in blocks of `block` positions. `arrivals` [B, K] counts
    how many splits of a row's KV head are made, where these join themselves: 0 between launches."""

    items: torch.Tensor
    rows: torch.Tensor
    arrivals: torch.Tensor
    block: int
    even: int

    @property
    def join_themselves(self) -> bool:
        """Whether whichever program of a context ends last joins its splits: of so many contexts few have several, or
        all have two."""
        return self.even == 1
