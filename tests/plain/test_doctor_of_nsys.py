"""An export of Nsight Systems, as its documented tables are."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from bireme.cli import run as command
from bireme.doctor.from_nsys import read_nsys
from bireme.doctor.rules import examine
from bireme.errors import UserError
from bireme.observe.causes import Row

Kernel = tuple[int, int, int, str]  # device, start, end, name
GEMM, NCCL = "nvjet_tst_128x64", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
SEND = "ncclDevKernel_SendRecv"


def export(path: Path, kernels: Sequence[Kernel]) -> Path:
    names = sorted({kernel[3] for kernel in kernels})
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL)")
        database.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, deviceId INT, streamId INT, "
            "globalPid INT, demangledName INT, shortName INT)"
        )
        database.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(names))
        database.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, 7, 1, ?, ?)",
            [
                (start, end, dev, names.index(name), names.index(name))
                for dev, start, end, name in kernels
            ],
        )
    database.close()
    return path


def test_an_instant_counts_once(tmp_path: Path) -> None:
    kernels = [(0, 0, 60, GEMM), (0, 10, 30, GEMM), (0, 50, 80, NCCL), (1, 0, 100, GEMM)]
    found = read_nsys(export(tmp_path / "x.sqlite", kernels))
    assert found.ledger is not None
    first, second = found.ledger.ranks
    assert first.shares[Row.COMPUTE] == pytest.approx(0.6)
    assert first.shares[Row.COLLECTIVE_MOVE] == pytest.approx(0.2)
    assert first.shares[Row.HOST] == pytest.approx(0.2)
    assert second.shares[Row.COMPUTE] == 1.0
    assert [rank.device for rank in found.ranks] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("kernels", "rules"),
    [
        ([(0, 0, 90, GEMM), (0, 92, 100, NCCL)], []),
        ([(0, 0, 30, GEMM), (0, 90, 100, GEMM)], ["slow-host"]),
        ([(0, 0, 40, GEMM), (0, 40, 100, NCCL), (1, 0, 40, GEMM), (1, 40, 100, NCCL)], ["slow-link"]),
        ([(0, 0, 40, GEMM), (0, 40, 100, SEND), (1, 0, 40, GEMM), (1, 40, 100, SEND)], ["slow-hand-over"]),
    ],
)  # fmt: skip
def test_its_faults_are_found(tmp_path: Path, kernels: list[Kernel], rules: list[str]) -> None:
    found = examine(read_nsys(export(tmp_path / "x.sqlite", kernels)))
    assert [finding.rule for finding in found] == rules


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.sqlite").write_text("no database")
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    for name in ("text", "empty", "nowhere"):
        assert command(["doctor", str(tmp_path / f"{name}.sqlite")]) == 2
        assert "is no export of Nsight Systems with kernels" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no kernel"):
        read_nsys(export(tmp_path / "none.sqlite", []))
