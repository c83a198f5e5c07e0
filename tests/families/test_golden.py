"""The layout tables are those that were frozen; `golden.py` writes them anew."""

from __future__ import annotations

import golden
import pytest


@pytest.mark.parametrize("name", golden.TABLES)
def test_the_layout_table_is_the_frozen_one(name: str) -> None:
    assert golden.render(*golden.TABLES[name]) == (golden.FOLDER / f"{name}.txt").read_text()


def test_there_is_no_other_frozen_table() -> None:
    assert {path.stem for path in golden.FOLDER.iterdir()} == set(golden.TABLES)
