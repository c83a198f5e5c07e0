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

Kernel = tuple[object, object, object, object]  # device, start, end, name
GEMM, NCCL = "nvjet_tst_128x64", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
SEND = "ncclDevKernel_SendRecv"


MS = 1_000_000


def export(
    path: Path,
    kernels: Sequence[Kernel],
    graphs: Sequence[tuple[object, object]] = (),
    steps: Sequence[tuple[int, int | None]] = (),
) -> Path:
    names = list(dict.fromkeys(kernel[3] for kernel in kernels))
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
        if graphs:
            database.execute(
                "CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INT, end INT, deviceId INT, globalPid INT)"
            )
            database.executemany(
                "INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES (?, ?, 0, 1)", graphs
            )
        if steps:
            database.execute("CREATE TABLE NVTX_EVENTS (start INT, end INT, text TEXT, textId INT)")
            database.execute("INSERT INTO StringIds VALUES (99, 'step')")
            database.executemany("INSERT INTO NVTX_EVENTS VALUES (?, ?, 'step', NULL)", steps[::2])
            database.executemany("INSERT INTO NVTX_EVENTS VALUES (?, ?, NULL, 99)", steps[1::2])
            database.execute("INSERT INTO NVTX_EVENTS VALUES (0, 10000000000, 'load', NULL)")
    database.close()
    return path


def host_share(path: Path) -> float:
    found = read_nsys(path)
    assert found.ledger is not None
    (rank,) = found.ledger.ranks
    return rank.shares[Row.HOST]


def test_graphs_that_were_traced_whole_are_work(tmp_path: Path) -> None:
    made = export(tmp_path / "x.sqlite", [(0, 0, 10, GEMM)], graphs=[(20, 50), (60, 100)])
    assert host_share(made) == pytest.approx(0.2)


def test_only_steps_are_looked_at(tmp_path: Path) -> None:
    """A kernel of loading, a pass of two steps that idles for a tenth, a pause, and a pass that never idles."""
    kernels = [(0, 0, MS, GEMM), (0, 5000 * MS, 5009 * MS, GEMM), (0, 5010 * MS, 5019 * MS, GEMM),
               (0, 8000 * MS, 8020 * MS, GEMM)]  # fmt: skip
    steps = [(5000 * MS, 5005 * MS), (5010 * MS, 5020 * MS), (8000 * MS, 8020 * MS)]
    assert host_share(export(tmp_path / "all.sqlite", kernels)) > 0.99
    assert host_share(export(tmp_path / "steps.sqlite", kernels, steps=steps)) == pytest.approx(
        2 / 40
    )


def test_pauses_that_every_step_waits_for_are_the_hosts(tmp_path: Path) -> None:
    steps = [(at * 300 * MS, at * 300 * MS + 10 * MS) for at in range(5)]
    kernels = [(0, start, end, GEMM) for start, end in steps]
    assert host_share(export(tmp_path / "x.sqlite", kernels, steps=steps)) > 0.9


@pytest.mark.parametrize(
    ("kernel", "graphs", "told"),
    [
        ((0, 5, 5, GEMM), [], "tells of no time"),
        ((0, 5, None, GEMM), [], "tells of 'nvjet_tst_128x64' from 5 to None on device 0"),
        ((0, "five", 9, GEMM), [], "from 'five' to 9"),
        ((0, 9, 5, GEMM), [], "from 9 to 5"),
        ((None, 5, 9, GEMM), [], "on device None"),
        ((0, 5, 9, b"raw"), [], "tells of b'raw'"),
        ((0, 5, 9, GEMM), [(5, None)], "GRAPH_TRACE tells of 'graph' from 5 to None"),
    ],
)
def test_bad_content_is_told_in_a_line(
    tmp_path: Path,
    kernel: Kernel,
    graphs: list[tuple[object, object]],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = export(tmp_path / "x.sqlite", [kernel], graphs)
    assert command(["doctor", str(made)]) == 2
    found = capsys.readouterr().err
    assert told in found
    assert found.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("peer_sum_kernel", Row.COLLECTIVE_MOVE),
        ("sharded_sum_kernel", Row.COLLECTIVE_MOVE),
        ("void c10d::symmetric_memory::wait_signal_kernel(unsigned int**)", Row.TRANSFER),
        (SEND, Row.TRANSFER),
        ("few_rows_kernel", Row.COMPUTE),
    ],
)
def test_what_ranks_exchange_is_known_by_its_name(tmp_path: Path, name: str, row: Row) -> None:
    found = read_nsys(export(tmp_path / "x.sqlite", [(0, 0, 60, GEMM), (0, 60, 100, name)]))
    assert found.ledger is not None
    shares = found.ledger.ranks[0].shares
    assert shares[row] == pytest.approx(0.4 if row is not Row.COMPUTE else 1.0)


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
