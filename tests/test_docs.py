"""Every fenced command of the docs runs, and what is shown below it is what it prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from doc_pages import OF_DELAYS, PAGES, ROOT, blocks, check_page, check_shown, run


@pytest.mark.parametrize(
    "page", [it for it in PAGES if it != OF_DELAYS], ids=lambda page: page.name
)
def test_commands_run_and_print_what_is_shown(page: Path, tmp_path: Path) -> None:
    check_page(page, tmp_path)


def test_the_readme_shows_what_the_demo_prints() -> None:
    shown = next(
        block.body for block in blocks((ROOT / "README.md").read_text()) if block.kind == "text"
    )
    check_shown(shown, run([sys.executable, str(ROOT / "examples" / "demo.py")], ROOT))


@pytest.mark.parametrize(
    "name", ["generate.py", "chat.py", "async_chat.py", "structured.py", "read_a_layout.py"]
)
def test_examples_run(name: str, tmp_path: Path) -> None:
    assert run([sys.executable, str(ROOT / "examples" / name)], tmp_path)


def test_made_up_checkpoints_are_ordinary_ones(tmp_path: Path) -> None:
    config = (ROOT / "src/bireme/assets/demo/config.json").read_text()
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(config)
    make = str(ROOT / "examples" / "make_checkpoint.py")
    run([sys.executable, make, str(tmp_path / "shape"), str(tmp_path / "made")], tmp_path)
    out = run(
        [sys.executable, "-m", "bireme", "shard", str(tmp_path / "made"), str(tmp_path / "out")],
        tmp_path,
    )
    assert "1 ranks at tp 1 x pp 1" in out


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("read 1.5 MiB in 3.5 s", "read 1.5 MiB in 77 s"),
        ("first after 73 ms, 20.2 tokens/s", "first after 9 ms, 3 tokens/s"),
        ("off by 1.24e-05; 1e-04 is allowed", "off by  7.3e-07; 1e-04 is allowed"),
    ],
)
def test_the_check_lets_times_rates_and_rounding_differ(shown: str, printed: str) -> None:
    check_shown(shown, f"first\n{printed}\n")


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("took 3.5 minutes", "took 77 s"),
        ("needs 39.0 MiB", "needs 39.1 MiB"),
        ("1e-04 is allowed", "1e-03 is allowed"),
        ("has xxh3 236464df494e483c", "has xxh3 236464df494e483d"),
        ("80 tokens, stop", "81 tokens, stop"),
    ],
)
def test_the_check_sees_a_line_that_was_not_printed(shown: str, printed: str) -> None:
    with pytest.raises(AssertionError, match="shown but not printed"):
        check_shown(shown, printed)
