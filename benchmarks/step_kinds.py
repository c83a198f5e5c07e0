"""Where ranks' time went, by the kind of step that they were at: of new tokens alone or with prompts, and its size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from bireme.observe.ledger import Ledger, RankLedger
from bireme.observe.rates import phase_of
from bireme.observe.timeline import Key
from bireme.parallel.operations import context_tokens
from bireme.request import ScheduledBatch


def step_kinds(ledger: Ledger, batches: Mapping[Key, ScheduledBatch]) -> dict[str, Any]:
    """By rank and kind, which is a phase and the power of two that its tokens are at most: means of a step."""
    return {rank.name: _of_rank(rank, batches) for rank in ledger.ranks}


def _of_rank(rank: RankLedger, batches: Mapping[Key, ScheduledBatch]) -> dict[str, Any]:
    spent: dict[Key, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for piece in rank.pieces:
        if piece.key is not None and piece.key in batches:
            spent[piece.key][piece.row.value] += piece.end_ns - piece.start_ns
    kinds: dict[str, list[Key]] = defaultdict(list)
    for key in spent:
        size = 1 << (batches[key].num_tokens - 1).bit_length()
        kinds[f"{phase_of(batches[key])} of up to {size}"].append(key)
    return {kind: _mean(keys, spent, batches) for kind, keys in kinds.items()}


def _mean(
    keys: list[Key], spent: Mapping[Key, Mapping[str, int]], batches: Mapping[Key, ScheduledBatch]
) -> dict[str, Any]:
    rows = sorted({row for key in keys for row in spent[key]})
    count = len(keys)
    return {
        "num_steps": count,
        "num_seqs": sum(len(batches[key].pieces) for key in keys) / count,
        "num_tokens": sum(batches[key].num_tokens for key in keys) / count,
        "context_tokens": sum(context_tokens(batches[key].pieces) for key in keys) / count,
        "ms_by_row": {
            row: sum(spent[key].get(row, 0) for key in keys) / count / 1e6 for row in rows
        },
    }
