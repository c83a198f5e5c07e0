"""Run folders: what is written is read back, and nothing else is taken for one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from runs import recorded_run

from bireme.errors import UserError
from bireme.observe.ledger import make_ledger
from bireme.observe.pipeline_records import RunPlan
from bireme.observe.profile_records import Profile
from bireme.observe.run_folder import RunFolder, prepare_run_folder, write_run_folder
from bireme.observe.run_records import RunAbout, RunLedger
from bireme.observe.told import ToldLedger, told_of_trace

DOCS = Path(__file__).parents[2] / "docs" / "run-folder.md"


def written(folder: Path) -> RunFolder:
    prepare_run_folder(folder)
    return write_run_folder(folder, *recorded_run())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    about, recorded, ledger, profile = recorded_run()
    again = RunFolder(written(tmp_path / "run").path)
    assert (again.about, again.ledger, again.profile) == (about, ledger, profile)
    assert make_ledger(again.recorded).ranks[1].ns == make_ledger(recorded).ranks[1].ns
    assert again.kernel_trace(0) is None


def test_its_ledger_is_that_of_its_trace(tmp_path: Path) -> None:
    run = written(tmp_path)
    assert run.ledger.told == told_of_trace(tmp_path / "trace.json")
    for rank, other in zip(run.ledger.ranks, make_ledger(run.recorded).ranks, strict=True):
        assert rank.ns == other.ns
        assert sum(rank.ns.values()) == rank.wall_ns


def test_a_later_run_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "rank-0.json").write_text("{}")
    prepare_run_folder(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_of_others_stays(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("x")
    with pytest.raises(UserError, match="is there and holds what is of no run"):
        prepare_run_folder(tmp_path)
    with pytest.raises(UserError, match="it is no folder"):
        prepare_run_folder(mine)
    assert mine.read_text() == "x"


def test_what_is_no_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing is no folder"):
        RunFolder(tmp_path / "missing")
    with pytest.raises(UserError, match=r"it has no run\.json"):
        RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"format_version": 1}', "of format 1, and 2 is read"),
        ("{}", r"run\.json is damaged: .*format_version"),
        ("[", r"run\.json is damaged"),
        (b"\xff", r"run\.json is damaged"),
    ],
)
def test_another_version_is_not_read(text: str | bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=told):
        RunFolder(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = written(tmp_path)
    for name in ("ledger", "profile"):
        path = tmp_path / f"{name}.json"
        path.write_text(path.read_text().replace("[", "{", 1))
        with pytest.raises(UserError, match=rf"{name}\.json is damaged"):
            getattr(run, name)
    (tmp_path / "profile.json").unlink()
    with pytest.raises(UserError, match=r"profile\.json cannot be read"):
        RunFolder(tmp_path).profile  # noqa: B018


def field_names(kind: Any) -> Iterator[str]:
    """Of a struct and of those in it; what is told elsewhere is left out."""
    for field in msgspec.structs.fields(kind):
        yield field.name
        inner = msgspec.inspect.type_info(field.type)
        for one in (inner, getattr(inner, "item_type", None), *getattr(inner, "types", ())):
            if isinstance(one, msgspec.inspect.StructType) and one.cls is not ToldLedger:
                yield from field_names(one.cls)


@pytest.mark.parametrize("kind", [RunAbout, RunLedger, Profile, RunPlan])
def test_every_field_is_in_the_docs(kind: Any) -> None:
    told = set(re.findall(r"`(\w+)`", DOCS.read_text(encoding="utf-8")))
    names = set(field_names(kind))
    assert len(names) > 5
    assert names <= told, names - told
