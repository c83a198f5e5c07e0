"""A run folder: what `bireme profile` and `bireme pipeline` write, and `bireme doctor` and `bireme report` read.

    run.json      what ran, on what, with which settings: RunAbout
    trace.json    the spans of the measured pass, as a Chrome trace: Recorded
    ledger.json   where each rank's time went: RunLedger
    profile.json  what was measured: Profile
    plan.json     what was predicted, where there was a plan: RunPlan
    kernels/      Chrome traces of torch.profiler's, one a rank, where they were asked for
    nsys.nsys-rep what Nsight Systems saw, where it was asked for

`run.json` is written last: a folder without it is of a run that did not end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import msgspec

from bireme.chrome_trace import Recorded, chrome_trace, read_chrome_trace
from bireme.errors import UserError
from bireme.observe.pipeline_records import RunPlan
from bireme.observe.profile_records import Profile
from bireme.observe.run_records import FORMAT_VERSION, RunAbout, RunLedger

T = TypeVar("T", bound=msgspec.Struct)

ABOUT, TRACE, LEDGER, PROFILE = "run.json", "trace.json", "ledger.json", "profile.json"
PLAN = "plan.json"
KERNELS = "kernels"
_FILES = ABOUT, TRACE, LEDGER, PROFILE, PLAN


class _Version(msgspec.Struct):
    format_version: int


@dataclass(frozen=True)
class RunFolder:
    """One that is there; its files are read when they are asked for. UserError for what is no run folder,
    or one of another format version."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise UserError(f"{self.path} is no folder; `bireme profile -o {self.path}` makes one")
        if not (self.path / ABOUT).is_file():
            raise UserError(
                f"{self.path} is no run folder: it has no {ABOUT}; `bireme profile` makes one"
            )
        found = self._read(ABOUT, _Version).format_version
        if found != FORMAT_VERSION:
            raise UserError(
                f"{self.path} is a run folder of format {found}, and {FORMAT_VERSION} is read; "
                "profile again"
            )

    @cached_property
    def about(self) -> RunAbout:
        return self._read(ABOUT, RunAbout)

    @cached_property
    def ledger(self) -> RunLedger:
        return self._read(LEDGER, RunLedger)

    @cached_property
    def profile(self) -> Profile:
        return self._read(PROFILE, Profile)

    @cached_property
    def plan(self) -> RunPlan | None:
        """None where nothing was predicted."""
        return self._read(PLAN, RunPlan) if (self.path / PLAN).is_file() else None

    @cached_property
    def recorded(self) -> Recorded:
        return read_chrome_trace(self.trace)

    @property
    def trace(self) -> Path:
        """The file."""
        return self.path / TRACE

    def kernel_trace(self, rank: int) -> Path | None:
        """Of one rank; None where none was asked for."""
        path = kernel_trace_path(self.path, rank)
        return path if path.is_file() else None

    def _read(self, name: str, kind: type[T]) -> T:
        path = self.path / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged: {error}; profile again") from None


def kernel_trace_path(folder: Path, rank: int | str) -> Path:
    return folder / KERNELS / f"rank-{rank}.json"


def prepare_run_folder(path: Path) -> None:
    """Makes an empty one, in place of an earlier run's. UserError where something else is there."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} cannot be written: it is no folder; name another")
    if path.is_dir() and not all(_is_ours(file.name) for file in path.iterdir()):
        raise UserError(f"{path} is there and holds what is of no run; name another, or remove it")
    path.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        (path / name).unlink(missing_ok=True)
    for file in (path / KERNELS).glob("rank-*.json"):
        file.unlink()


def _is_ours(name: str) -> bool:
    return name in (*_FILES, KERNELS) or name.startswith("nsys.")


def write_run_folder(
    path: Path,
    about: RunAbout,
    recorded: Recorded,
    ledger: RunLedger,
    profile: Profile,
    plan: RunPlan | None = None,
) -> RunFolder:
    """`path` was prepared."""
    (path / TRACE).write_bytes(msgspec.json.encode(chrome_trace(recorded)))
    _write(path / LEDGER, ledger)
    _write(path / PROFILE, profile)
    if plan is not None:
        _write(path / PLAN, plan)
    _write(path / ABOUT, about)
    return RunFolder(path)


def _write(path: Path, value: msgspec.Struct) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
