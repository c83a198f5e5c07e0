"""How much cache the ranks can hold beside their weights and what a step takes: plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from bireme.config import DTYPE_BYTES, EngineConfig, format_bytes
from bireme.errors import ConfigError
from bireme.model_config import ModelConfig
from bireme.parallel.layout import CacheKind, ModelLayout
from bireme.parallel.memory import RankMemory, StepLimits, rank_memory

MOST_TILE_ROWS = 64  # that a deterministic step computes at a time (`engine/tiles.py`)
MOST_GATHERED_ROWS = 16  # where contexts are gathered, of every row, whether it is a token's or not


@dataclass(frozen=True, kw_only=True)
class CacheBudget:
    """The cache's blocks of each kind, the same on every rank, and why there are not more.

    `num_requests` of the longest length fit at once; `binding_rank` has the least room, and
    `limit_bytes` is what a rank may take.
    """

    kinds: tuple[CacheKind, ...]
    block_size: int
    max_model_len: int
    num_requests: Fraction
    ranks: tuple[RankMemory, ...]
    binding_rank: int
    limit_bytes: int
    max_num_seqs: int

    @property
    def num_tokens(self) -> int:
        return int(self.num_requests * self.max_model_len)

    @property
    def is_all(self) -> bool:
        """True where more could not be used."""
        return self.num_requests == self.max_num_seqs

    @property
    def cache_bytes(self) -> int:
        """Of the binding rank."""
        tokens = {kind.window: kind.num_blocks * self.block_size for kind in self.kinds}
        return self.ranks[self.binding_rank].cache_bytes(tokens)

    def describe(self, rank_names: Sequence[str]) -> str:
        """One line: the capacity, and the rank that binds."""
        rank, name = self.ranks[self.binding_rank], rank_names[self.binding_rank]
        capacity = (
            f"cache of {self.num_tokens} tokens: {float(self.num_requests):.1f} requests of "
            f"{self.max_model_len} at once"
        )
        held = (
            f"weights {format_bytes(rank.weight_bytes)}, steps {format_bytes(rank.activation_bytes)}, "
            f"cache {format_bytes(self.cache_bytes)}"
        )
        if self.is_all:
            return f"{capacity}, all that max_num_seqs can use; fullest is {name}: {held}"
        return f"{capacity}; {name} binds: {held} of {format_bytes(self.limit_bytes)}"


def resolve_max_model_len(config: ModelConfig, engine: EngineConfig) -> int:
    longest = config.max_model_len
    if engine.max_model_len is not None and engine.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={engine.max_model_len} exceeds the model's context of {longest} tokens; "
            f"use at most {longest}"
        )
    return engine.max_model_len or longest


def memory_of(
    config: ModelConfig, layout: ModelLayout, engine: EngineConfig, dtype: str
) -> list[RankMemory]:
    """What each rank of the layout needs."""
    limits = step_limits(config, engine)
    return [
        rank_memory(config, layout.widths, rank, DTYPE_BYTES[dtype], limits)
        for rank in layout.ranks
    ]


def step_limits(config: ModelConfig, engine: EngineConfig) -> StepLimits:
    longest = resolve_max_model_len(config, engine)
    rows = MOST_TILE_ROWS if engine.deterministic else 0
    return StepLimits(
        num_tokens=max(rows, min(engine.max_num_batched_tokens, longest * engine.max_num_seqs)),
        num_seqs=max(rows, engine.max_num_seqs),
        max_model_len=longest,
        workspace_bytes=engine.workspace_bytes,
    )


def _blocks_of_request(config: ModelConfig, engine: EngineConfig) -> dict[int | None, int]:
    """Cache blocks that one request of the longest length holds at once, by the layers' window.

    A windowed layer keeps what the first new token of a step looks back at, and the step's tokens.
    """
    longest, block = resolve_max_model_len(config, engine), engine.block_size
    most = {
        window: longest if window is None else window + engine.max_num_batched_tokens + block
        for window in set(config.windows)
    }
    return {window: -(-min(tokens, longest) // block) for window, tokens in most.items()}


def least_bytes(config: ModelConfig, engine: EngineConfig, rank: RankMemory) -> int:
    """With the cache of one request of the longest length and the null blocks."""
    blocks = _blocks_of_request(config, engine)
    tokens = {window: (count + 1) * engine.block_size for window, count in blocks.items()}
    return rank.total(0) + rank.cache_bytes(tokens)


def cache_budget(
    config: ModelConfig, engine: EngineConfig, ranks: Sequence[RankMemory], limit_bytes: int
) -> CacheBudget:
    """All the cache that can be used, or as much as fits the rank with least room, in the proportion
    in which the longest request holds it."""
    counts = _blocks_of_request(config, engine)
    null = dict.fromkeys(counts, engine.block_size)
    one = {window: count * engine.block_size for window, count in counts.items()}
    room = [
        Fraction(limit_bytes - rank.total(0) - rank.cache_bytes(null), rank.cache_bytes(one))
        for rank in ranks
    ]
    num_requests = min(*room, Fraction(engine.max_num_seqs))
    kinds = tuple(
        CacheKind(window, int(counts[window] * num_requests) + 1)
        for window in sorted(counts, key=lambda window: (window is not None, window))
    )
    return CacheBudget(
        kinds=kinds,
        block_size=engine.block_size,
        max_model_len=resolve_max_model_len(config, engine),
        num_requests=num_requests,
        ranks=tuple(ranks),
        binding_rank=room.index(min(room)),
        limit_bytes=limit_bytes,
        max_num_seqs=engine.max_num_seqs,
    )
