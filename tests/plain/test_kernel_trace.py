"""How much of its time a GPU ran kernels, from traces that were never recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bireme.errors import UserError
from bireme.observe.kernel_trace import KernelTimes, kernel_share, kernel_times


def written(
    path: Path, *kernels: tuple[str, float, float], launches: dict[int, int] | None = None
) -> Path:
    """Of names, begins and durations; `launches` by a kernel's place."""
    events: list[dict[str, object]] = [{"ph": "M", "name": "process_name"}]
    events += [{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000}]
    for at, (name, ts, dur) in enumerate(kernels):
        args = {"correlation": (launches or {}).get(at, 0)}
        events.append({"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": args})
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return path


def test_it_is_of_the_time_outside_of_collectives(tmp_path: Path) -> None:
    trace = written(
        tmp_path / "t", ("gemm", 0, 10), ("ncclDevKernel_AllReduce", 10, 50), ("gemm", 90, 10)
    )
    assert kernel_share(trace) == pytest.approx(20 / 50)


def test_kernels_beside_each_other_count_once(tmp_path: Path) -> None:
    trace = written(tmp_path / "t", ("b", 5, 10), ("a", 0, 10), ("c", 20, 10))
    assert kernel_share(trace) == pytest.approx(25 / 30)


def test_every_microsecond_is_of_the_kernel_that_began_first(tmp_path: Path) -> None:
    trace = written(
        tmp_path / "t",
        ("gemm", 0, 10),
        ("gemm", 12, 8),
        ("peer_sum_kernel", 15, 10),
        ("gemm", 21, 9),
        ("gemm", 45, 5),
        ("gemm", 62, 5),
        ("gemm", 79, 1),
        ("gemm", 100, 1),
        ("wait_signal_kernel", 101, 3),
        launches={4: 7, 5: 8, 6: 8, 7: 9},
    )
    found = kernel_times(trace)
    assert found is not None
    micro = KernelTimes(*(1e6 * value for value in vars(found).values()))
    expected = KernelTimes(
        whole_s=104, collective_s=5, message_s=3, other_s=35, between_s=14, pause_s=47,
        longest_between_s=12, longest_pause_s=20,
    )  # fmt: skip
    assert vars(micro) == pytest.approx(vars(expected))


def test_without_a_kernel_nothing_is_known(tmp_path: Path) -> None:
    assert kernel_share(written(tmp_path / "t")) is None
    (tmp_path / "t").write_text("[]")
    with pytest.raises(UserError, match="is no trace of torch"):
        kernel_share(tmp_path / "t")
