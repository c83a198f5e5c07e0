"""Where a rank stands: its stage, its place in the stage's tensor group, and who its peers are.

A `Mesh` is a value. It is made without any process group (layouts are computed on such meshes);
`collectives.join` gives it a tensor group that can communicate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from bireme.kernels.functional import add_rms_norm, whole
from bireme.parallel.pipeline import stage_ranks


class TensorGroup(Protocol):
    """Collectives among the ranks that share each layer of one stage."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns `x`."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[tp_size, *x.shape], in the order of tp_rank."""
        ...

    def all_reduce_add_norm(
        self,
        addend: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + the sum over ranks of `addend` [T, D], or where the group `takes_parts` of its parts float32 [P, T, D],
        which may be overwritten, and its RMSNorm, which lies there until the next sum. Of x + the sum a rank may hold
        no more than what the next sum of this shape and dtype takes. x is older than the addend (`add_rms_norm`)."""
        return add_rms_norm(x, self.all_reduce(addend), weight, eps, offset)

    def all_reduce_add(self, addend: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x + the sum over ranks of `addend`, as above, whole; x may be what `all_reduce_add_norm` left of it."""
        return x + self.all_reduce(whole(addend, x.dtype))

    def place_of_addends(
        self, num_rows: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Where addends [num_rows, width] of the two methods above are best put; None: anywhere."""
        return None

    def takes_parts(self, num_rows: int) -> bool:
        """Whether addends of so many rows may come in parts because that is quicker in all."""
        return False


class Unjoined(TensorGroup):
    """The tensor group of a mesh that no process has joined: it has no one to talk to."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("all_reduce on a mesh that was not joined")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("all_gather on a mesh that was not joined")


class Alone(TensorGroup):
    """The tensor group of one rank."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(0)

    def takes_parts(self, num_rows: int) -> bool:
        return True


@dataclass(frozen=True)
class Mesh:
    """Rank `rank` in stages of `widths[stage]` ranks each; ranks are numbered stage by stage."""

    widths: tuple[int, ...]
    rank: int
    tensor: TensorGroup = field(default_factory=Unjoined, compare=False)

    @property
    def stage(self) -> int:
        return next(
            stage for stage, ranks in enumerate(stage_ranks(self.widths)) if self.rank in ranks
        )

    @property
    def tensor_ranks(self) -> range:
        return stage_ranks(self.widths)[self.stage]

    @property
    def tp_rank(self) -> int:
        return self.rank - self.tensor_ranks.start

    @property
    def tp_size(self) -> int:
        return self.widths[self.stage]

    @property
    def pp_size(self) -> int:
        return len(self.widths)

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp_size - 1

    @property
    def answers(self) -> bool:
        """True for the one rank that tells the engine what was sampled."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} (stage {self.stage}, tp {self.tp_rank})"
