"""The part of the vocabulary that a rank has logits of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bireme.parallel.cuts import vocabulary_range, vocabulary_width
from bireme.parallel.mesh import TensorGroup


@dataclass(frozen=True)
class Shard:
    """Ids [first_id, first_id + num_real), in the first of `width` columns of this rank's logits; the
    columns behind them are padding. `group` has the shards of all `vocab_size` ids, equally wide."""

    first_id: int
    num_real: int
    width: int
    vocab_size: int
    group: TensorGroup

    @classmethod
    def of(cls, vocab_size: int, tp_size: int, tp_rank: int, group: TensorGroup) -> Shard:
        first, last = vocabulary_range(vocab_size, tp_size, tp_rank)
        return cls(first, last - first, vocabulary_width(vocab_size, tp_size), vocab_size, group)

    def holds(self, id_: int) -> bool:
        return 0 <= id_ - self.first_id < self.num_real

    def columns(self, ids: Iterable[int]) -> list[int]:
        """Of those ids that are here."""
        return [id_ - self.first_id for id_ in ids if self.holds(id_)]

    def columns_or(self, ids: torch.Tensor, elsewhere: int) -> torch.Tensor:
        """The column of each id, `elsewhere` for an id that is not here."""
        columns = ids - self.first_id
        return columns.masked_fill_((columns < 0) | (columns >= self.num_real), elsewhere)


def sortable(x: torch.Tensor) -> torch.Tensor:
    """int32 keys in the order of float32 `x`. Applied to the keys' bits again, it gives `x`'s bits."""
    bits = x.contiguous().view(torch.int32)
    return bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
