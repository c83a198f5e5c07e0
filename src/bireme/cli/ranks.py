"""What is told of the ranks when they have loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bireme.config import format_bytes

if TYPE_CHECKING:
    from bireme.engine.host import EngineHost
    from bireme.engine.messages import Loaded


def print_ranks(llm: EngineHost) -> None:
    plan = llm.plan
    print(
        f"{llm.model.name}: {plan.config.parallel}, {plan.dtype}, {plan.devices[0].partition(':')[0]}",
        file=sys.stderr,
    )
    for name, loaded in zip(plan.rank_names, llm.loaded, strict=True):
        print(
            f"  {name}: weights {format_bytes(loaded.weight_bytes)}, cache {format_bytes(loaded.cache_bytes)}, "
            f"{_read(loaded)} in {loaded.seconds:.2f} s",
            file=sys.stderr,
        )
    print(f"  {plan.budget.describe(plan.rank_names)}", file=sys.stderr)


def _read(loaded: Loaded) -> str:
    """What the rank needed of the files; of an artifact also what it fetched, in whole chunks, and
    verified."""
    needed = f"read {format_bytes(loaded.needed_bytes)}"
    if not loaded.verified_bytes:
        return needed
    fetched, verified = (format_bytes(n) for n in (loaded.fetched_bytes, loaded.verified_bytes))
    return f"{needed} (fetched {fetched}, verified {verified})"
