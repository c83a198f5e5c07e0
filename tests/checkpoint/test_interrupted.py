"""A sharding run that is killed anywhere can be started again: what is finished and whole is kept,
what is damaged or of another source is written anew, and the manifest comes last and at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from bireme.checkpoint import sharder
from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.exporter import export
from bireme.checkpoint.manifest import is_artifact
from bireme.checkpoint.prepared import shard_model
from bireme.checkpoint.reader import SafetensorsFile
from bireme.config import ParallelConfig
from bireme.errors import CheckpointError
from checkpoint.making import Recipe, files_of, shard_folder, write_safetensors

RECIPE = Recipe(num_files=2, others={"tokenizer.json": b"{}"})
WIDTHS = (2, 1)

# Kills itself with SIGKILL when `progress` has seen so many bytes, or when a file gets its name.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from bireme.checkpoint.prepared import shard_model
from bireme.config import ParallelConfig

folder, out, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
done = 0

def progress(num_bytes, total):
    global done
    done += num_bytes
    if stop.isdigit() and done >= int(stop):
        os.kill(os.getpid(), signal.SIGKILL)

rename = Path.replace

def replace(path, target):
    if Path(target).name == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)

Path.replace = replace
shard_model(folder, out, ParallelConfig.of((2, 1), 2), progress)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    RECIPE.write(tmp_path / "source")
    return tmp_path / "source"


def shard_and_die(source: Path, out: Path, stop: str) -> None:
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(out), stop],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def finished_files(out: Path) -> dict[Path, tuple[int, int]]:
    """Rank files that have their name already, each with inode and mtime."""
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.safetensors")
    }


def check_is_whole(source: Path, out: Path) -> None:
    artifact = Artifact(out)
    assert artifact.check() == []
    left = [path.name for path in out.rglob("*") if path.suffix == ".partial"]
    assert not left
    assert not list(out.glob("*.finished.json"))
    export(artifact, out.parent / "exported")
    assert files_of(out.parent / "exported") == files_of(source)


@pytest.mark.parametrize(
    ("stop", "num_finished"),
    [
        ("1", 0),
        ("100000", 1),
        ("rank-00001-of-00003.safetensors", 1),
        ("rank-00001-of-00003.finished.json", 2),
        ("manifest.json", 3),
    ],
)
def test_a_killed_run_is_taken_up_where_it_ended(
    stop: str, num_finished: int, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shard_and_die(source, out, stop)
    before = finished_files(out)
    assert len(before) == num_finished
    assert not is_artifact(out)
    with_note = {path for path in before if path.with_suffix(".finished.json").exists()}
    assert len(with_note) >= num_finished - 1
    shard_folder(source, out, WIDTHS)
    after = finished_files(out)
    assert {path for path in before if after[path] == before[path]} == with_note
    check_is_whole(source, out)


def shard_but_the_manifest(source: Path, out: Path) -> None:
    """All rank files are finished, the manifest is not there; quicker than a process that dies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharder, "write_manifest", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard_folder(source, out, WIDTHS)


@pytest.fixture
def interrupted(source: Path, tmp_path: Path) -> Path:
    shard_but_the_manifest(source, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("damage", ["byte", "header", "cut", "gone", "note cut", "note gone"])
def test_a_finished_file_that_was_damaged_since_is_written_anew(
    damage: str, source: Path, interrupted: Path
) -> None:
    path = interrupted / "rank-00001-of-00003.safetensors"
    note = path.with_suffix(".finished.json")
    before = finished_files(interrupted)
    data = bytearray(path.read_bytes())
    if damage in ("byte", "header"):
        data[-1 if damage == "byte" else 20] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "note cut":
        note.write_bytes(note.read_bytes()[:-5])
    else:
        (path if damage == "gone" else note).unlink()
    shard_folder(source, interrupted, WIDTHS)
    after = finished_files(interrupted)
    assert [each for each in before if before[each] != after[each]] == [path]
    check_is_whole(source, interrupted)


def change_bytes(source: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_bytes_and_set_the_time_back(source: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[0]
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    change_bytes(source)
    os.utime(path, ns=times)


def change_the_order(source: Path) -> None:
    """The same tensors in the same file, the other way round."""
    path = sorted(source.glob("*.safetensors"))[0]
    names = reversed(SafetensorsFile(path).tensors)
    tensors = RECIPE.tensors()
    write_safetensors(path, {name: tensors[name] for name in names}, RECIPE.metadata)


@pytest.mark.parametrize(
    "change",
    [change_bytes, change_bytes_and_set_the_time_back, change_the_order],
)
def test_finished_files_of_a_changed_source_are_not_kept(
    change: Callable[[Path], None], source: Path, interrupted: Path
) -> None:
    before = finished_files(interrupted)
    change(source)
    shard_folder(source, interrupted, WIDTHS)
    after = finished_files(interrupted)
    assert not [path for path in before if before[path] == after[path]]
    check_is_whole(source, interrupted)


def test_a_changed_config_is_carried_beside_what_is_finished(
    source: Path, interrupted: Path
) -> None:
    before = finished_files(interrupted)
    (source / "tokenizer.json").write_bytes(b"[]")
    shard_folder(source, interrupted, WIDTHS)
    assert finished_files(interrupted) == before
    check_is_whole(source, interrupted)


def test_finished_files_of_another_layout_are_not_taken_for_ours(
    source: Path, interrupted: Path
) -> None:
    """(1, 2) has three ranks too, and files of the same names."""
    shard_folder(source, interrupted, (1, 2))
    check_is_whole(source, interrupted)


def test_an_artifact_as_source_is_known_by_its_hashes(source: Path, tmp_path: Path) -> None:
    """Copied between the runs, with other times: the same bytes, so the finished files are kept."""
    shard_folder(source, tmp_path / "artifact", (1,))
    shard_but_the_manifest(tmp_path / "artifact", tmp_path / "out")
    before = finished_files(tmp_path / "out")
    for path in (tmp_path / "artifact").glob("rank-*"):
        path.write_bytes(path.read_bytes())
    shard_folder(tmp_path / "artifact", tmp_path / "out", WIDTHS)
    assert finished_files(tmp_path / "out") == before
    check_is_whole(source, tmp_path / "out")


def test_a_source_that_changes_meanwhile_gives_no_artifact(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resume(*_: object) -> None:
        change_bytes(source)

    monkeypatch.setattr(sharder, "_resume", resume)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        shard_folder(source, tmp_path / "out", WIDTHS)
    assert not is_artifact(tmp_path / "out")


def test_progress_adds_up_to_the_plan_with_and_without_a_rest(
    source: Path, interrupted: Path
) -> None:
    (interrupted / "rank-00001-of-00003.safetensors").unlink()
    for out in (interrupted, interrupted.parent / "fresh"):
        progress = Mock()
        shard_model(source, out, ParallelConfig.of(WIDTHS, 2), progress)
        done, totals = zip(*(call.args for call in progress.call_args_list), strict=True)
        assert {sum(done)} == set(totals)
    exported: list[int] = []
    export(Artifact(interrupted), interrupted.parent / "exported", exported.append)
    assert sum(exported) == Artifact(interrupted).manifest.num_source_bytes
    checked: list[int] = []
    artifact = Artifact(interrupted)
    artifact.check(checked.append)
    assert sum(checked) == sum(file.num_bytes for file in artifact.manifest.files)
