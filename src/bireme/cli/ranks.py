"""What is told of the ranks that a command starts, when they have loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bireme.engine.host import EngineHost


def print_ranks(llm: EngineHost) -> None:
    print(*llm.describe(), sep="\n", file=sys.stderr)
