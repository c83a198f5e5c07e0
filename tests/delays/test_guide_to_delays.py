"""The guide whose findings are of where time goes, on a machine that does nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from doc_pages import OF_DELAYS, check_page


def test_commands_run_and_find_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ranks that nothing is planted into."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    check_page(OF_DELAYS, tmp_path)
