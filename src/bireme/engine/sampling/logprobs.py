"""Log-probabilities of the model's own logits, which are cut by vocabulary.

Sums are of float64, so that they depend on the cut by their last bits only.
Shapes: R rows, V local vocabulary, K likeliest ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bireme.engine.sampling.shard import Shard, sortable
from bireme.request import TokenLogprobs

_BYTES_PER_LOGIT = 64  # of temporaries, the logits with them

_ID_BITS = 31


def in_tiles(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    targets: torch.Tensor,
    num_top: int,
    shard: Shard,
    workspace_bytes: int,
) -> torch.Tensor:
    """`token_logprobs` of `logits_of(rows)`, for as many rows at once as fit the workspace."""
    num_at_once = max(1, workspace_bytes // (_BYTES_PER_LOGIT * shard.width))
    parts = [
        token_logprobs(logits_of(some).float(), wanted, min(num_top, shard.vocab_size), shard)
        for some, wanted in zip(rows.split(num_at_once), targets.split(num_at_once), strict=True)
    ]
    return torch.cat(parts)


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, num_top: int, shard: Shard
) -> torch.Tensor:
    """float64 [R, 2 + 2K]: the target's log-probability and rank, the K likeliest ids, and theirs.

    logits float32 [R, V], -inf on padding; targets int64 [R]; K `num_top`, at most the vocabulary.
    The same on every rank.
    """
    group = shard.group
    top = group.all_gather(logits.amax(dim=1)).amax(dim=0).double()  # [R]
    sums = (logits.double() - top.unsqueeze(1)).exp_().sum(dim=1)
    column = shard.columns_or(targets, -1)
    own = logits.gather(1, column.clamp(min=0).unsqueeze(1)).squeeze(1).double()
    sums, target = group.all_reduce(torch.stack((sums, own.masked_fill(column < 0, 0))))
    rank = 1 + group.all_reduce((logits > target.unsqueeze(1)).sum(dim=1))
    offset = top + sums.log()
    ids, values = _likeliest(logits, num_top, shard)
    first = torch.stack((target - offset, rank.double()), dim=1)
    return torch.cat((first, ids.double(), values.double() - offset.unsqueeze(1)), dim=1)


def _likeliest(
    logits: torch.Tensor, num_top: int, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and logits float32, both [R, K], the likeliest first, of equals the lower id.

    A logit and its id are one key of 63 bits, so that no two are equal. Padding comes after all ids,
    for it is -inf and its ids would be the highest.
    """
    size = (1 << _ID_BITS) - 1
    order = sortable(logits + 0.0).long() + 2**31  # -0.0 becomes 0.0
    ids = torch.arange(logits.shape[1], device=logits.device) + shard.first_id
    keys = (order << _ID_BITS) | (size - ids)
    keys = keys.topk(min(num_top, keys.shape[1]), dim=1).values
    everyone = shard.group.all_gather(keys.contiguous()).transpose(0, 1).flatten(1)  # [R, tp * K]
    best = everyone.topk(num_top, dim=1).values
    bits = sortable(((best >> _ID_BITS) - 2**31).int().view(torch.float32))
    return size - (best & size), bits.view(torch.float32)


def to_records(rows: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """What `token_logprobs` gave, once it is on the host, with as many of the likeliest ids as each row asked for."""
    num_top = (rows.shape[1] - 2) // 2
    return [
        _of_row(row[:2], row[2 : 2 + num_top][:count], row[2 + num_top :][:count])
        for row, count in zip(rows.tolist(), counts, strict=True)
    ]


def _of_row(own: list[float], ids: list[float], logprobs: list[float]) -> TokenLogprobs:
    return TokenLogprobs(own[0], int(own[1]), [int(id_) for id_ in ids], logprobs)
