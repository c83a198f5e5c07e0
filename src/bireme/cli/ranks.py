"""Ranks that a command starts: early, and what is told of them when they have loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bireme.config import ParallelConfig

if TYPE_CHECKING:
    from bireme.engine.host import EngineHost
    from bireme.engine.pool import WorkerPool


def begin_ranks(keywords: dict[str, Any]) -> WorkerPool:
    """Processes that import what they need while this one does so itself; `keywords` are those of `LLM`."""
    from bireme.engine.pool import WorkerPool

    pool, widths = WorkerPool(), keywords["tensor_parallel_size"]
    if widths != "auto":
        layout = widths, keywords["pipeline_parallel_size"], keywords["layers_per_stage"]
        pool.start(ParallelConfig.of(*layout).world_size)
    return pool


def print_ranks(llm: EngineHost) -> None:
    print(*llm.describe(), sep="\n", file=sys.stderr)
