"""`bireme probe`: what a short run of two ranks writes, what is refused, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from bireme.cli import run
from bireme.cluster.file import read_cluster
from bireme.config import DTYPE_BYTES
from bireme.planning.probe.plan import QUICK

ARGUMENTS = ["probe", "--quick", "--device", "cpu", "--ranks", "2"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "cluster.toml"
    assert run([*ARGUMENTS, "-o", str(path)]) == 0
    return path


def test_a_short_run_writes_what_it_measured(written: Path) -> None:
    cluster = read_cluster(written)
    (node,) = cluster.nodes
    assert [device.name for device in node.devices] == ["cpu0", "cpu1"]
    assert cluster.measured is not None
    assert cluster.measured.is_quick
    assert {"bireme", "python", "torch"} <= cluster.measured.versions.keys()
    names = tuple(f"{node.name}/{device.name}" for device in node.devices)
    assert [link.between for link in cluster.links] == [names]
    assert [group.devices for group in cluster.groups] == [names]
    assert cluster.links[0].transport == cluster.groups[0].transport == "shared memory"
    assert [point.size for point in node.empty_step] == [1, 2]


def test_every_curve_is_there_and_spreads_around_its_medians(written: Path) -> None:
    cluster = read_cluster(written)
    for device in cluster.nodes[0].devices:
        assert all(device.curves)
        assert device.flop_per_s.keys() == set(DTYPE_BYTES)
        assert [product.dtype for product in device.products] == list(QUICK.dtypes)
    for curve in (cluster.links[0].send, cluster.groups[0].all_reduce):
        assert [point.size for point in curve] == list(QUICK.message_bytes)
    for point in cluster.points:
        assert point.p10_s is not None
        assert point.p90_s is not None
        assert 0 < point.p10_s <= point.seconds <= point.p90_s


def test_a_file_that_is_there_is_kept_unless_forced(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written.read_bytes()
    assert run([*ARGUMENTS, "-o", str(written)]) == 2
    assert "cluster.toml is there already; name another file, or give --force" in (
        capsys.readouterr().err
    )
    assert written.read_bytes() == before


def test_gloo_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    assert run([*ARGUMENTS, "--transport", "distributed", "-o", str(path)]) == 0
    cluster = read_cluster(path)
    assert cluster.links[0].transport == cluster.groups[0].transport == "gloo"


def test_one_rank_measures_itself_and_is_told_as_json(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["probe", "--quick", "--device", "cpu", "--ranks", "1", "--json", "--force"]
    path = written.with_name("alone.toml")
    path.write_text("an older one")
    assert run([*arguments, "-o", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [device["name"] for device in told["nodes"][0]["devices"]] == ["cpu0"]
    assert read_cluster(path).links == ()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranks", "0"], "ranks=0 must be at least 1"),
        (["--device", "cpu", "--ranks", "5000"], "5000 ranks do not fit"),
        (["--device", "tpu"], "device 'tpu' is not known; use auto, cpu, cuda"),
        (["--transport", "smoke"], "transport 'smoke' is not known; use auto, distributed"),
        (["--device", "cpu", "--devices", "0"], "devices maps ranks to GPUs"),
        (["-o", "nowhere/at/all.toml"], "cannot be written: .* is no folder"),
        (["-o", "/"], "cannot be written: it is a folder; name a file in it"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert run(["probe", "--quick", *arguments]) == 2
    assert re.search(told, capsys.readouterr().err)


DRIVER = """
from bireme.planning.probe.plan import FULL_ON_CPU
from bireme.planning.probe.probe import probe
probe(("cpu", "cpu"), FULL_ON_CPU, lambda num_points: print("a point is done", flush=True))
"""


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def test_ctrl_c_leaves_no_process_behind() -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    for _ in range(3):  # both ranks are at it
        driver.stdout.readline()
    ends = [os.pidfd_open(rank) for rank in children_of(driver.pid)]
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=30)
    assert errors.count("Traceback") == 1
    assert "KeyboardInterrupt" in errors
    assert len(ends) == 2
    for fd in ends:
        assert select.select([fd], [], [], 20)[0], "a rank outlived its driver"
        os.close(fd)
