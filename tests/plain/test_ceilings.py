"""Ceilings from cluster.toml: of the devices that ran, or none, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.cluster.topology import Cluster, Curve, Device, Group, Link, Node, Point
from bireme.observe.ceilings import Ceilings, ceilings_of, seconds_of
from bireme.observe.run_records import RunLayout, RunRank, RunSettings

PATH = Path("cluster.toml")
SUMS = (Point(1000, 1e-5), Point(3000, 2e-5))


def layout(*devices: str, stage_width: int = 2) -> RunLayout:
    ranks = [
        RunRank(rank=i, name=f"rank {i}", stage=i // stage_width, tp_rank=i % stage_width, device=it, layers=(0, 1))
        for i, it in enumerate(devices)
    ]  # fmt: skip
    return RunLayout(widths=(stage_width,), layers_per_stage=(1,), ranks=ranks)


def settings_of(transport: str, num_threads: int = 1) -> RunSettings:
    return RunSettings(
        num_threads=num_threads, transport=transport, environment={}, max_model_len=8,
        num_cache_tokens=8,
    )  # fmt: skip


def device(name: str, kind: str, **more: object) -> Device:
    rates = {"memory_bytes_per_s": 5e9, "flop_per_s": {"float32": 1e12}}
    return Device(name=name, kind=kind, memory_bytes=1 << 30, **rates, **more)  # type: ignore[arg-type]


def gpus() -> Cluster:
    return Cluster(
        nodes=(Node(name="box", devices=tuple(device(f"cuda{i}", "cuda") for i in range(3))),),
        groups=(
            Group(devices=("box/cuda0", "box/cuda1"), transport="nccl", all_reduce=SUMS),
            Group(devices=("box/cuda1", "box/cuda2"), transport="nccl", all_reduce=SUMS[:1]),
        ),
        links=(Link(between=("box/cuda0", "box/cuda1"), latency_s=1e-6, bytes_per_s=1e9),),
    )


def of_gpus(*devices: str, host: str = "box", transport: str = "nccl") -> Ceilings:
    return ceilings_of(PATH, layout(*devices), settings_of(transport), host, gpus())


def test_gpus_are_known_by_their_names() -> None:
    found = of_gpus("cuda:1", "cuda:2")
    assert not found.notes
    assert found.flop_per_s(0, "float32") == 1e12
    assert found.flop_per_s(0, "bfloat16") is None
    assert found.memory_bytes_per_s(1) == 5e9
    assert found.all_reduce_bytes_per_s([0, 1], 500) == pytest.approx(500 / 1e-5)


def test_sums_are_read_off_their_curve() -> None:
    found = of_gpus("cuda:0", "cuda:1")
    assert found.all_reduce_bytes_per_s([0, 1], 2000) == pytest.approx(2000 / 1.5e-5)
    assert found.send_bytes_per_s(0, 1, 1000) == pytest.approx(1000 / 2e-6)
    assert found.all_reduce_bytes_per_s([0, 1, 0], 2000) is None  # no group of three
    assert of_gpus("cuda:0", "cuda:2").send_bytes_per_s(0, 1, 1000) is None


def test_what_is_not_in_the_file_is_told() -> None:
    found = of_gpus("cuda:0", "cuda:7", host="elsewhere")
    assert found.memory_bytes_per_s(1) is None
    assert any("is of box, and this is elsewhere" in note for note in found.notes)
    assert any("says nothing of cuda:7" in note for note in found.notes)


def test_another_transport_is_no_ceiling() -> None:
    found = of_gpus("cuda:0", "cuda:1", transport="gloo")
    assert found.all_reduce_bytes_per_s([0, 1], 8) is None
    assert found.send_bytes_per_s(0, 1, 8) == pytest.approx(8 / (1e-6 + 8e-9))  # that of any
    groups_alone = replace(gpus(), links=())
    told = ceilings_of(PATH, layout("cuda:0"), settings_of("gloo"), "box", groups_alone).notes
    assert "through nccl, these went through gloo" in told[0]


def of_cpus(num_threads: int) -> Ceilings:
    cpus = tuple(device(f"cpu{i}", "cpu", num_threads=2) for i in range(2))
    pair = ("box/cpu0", "box/cpu1")
    cluster = Cluster(
        nodes=(Node(name="box", devices=cpus),),
        groups=(Group(devices=pair, transport="shared memory", all_reduce=SUMS),),
        links=(
            Link(between=pair, transport="shared memory", latency_s=1e-6, bytes_per_s=1e9, send=SUMS),
        ),
    )  # fmt: skip
    settings = settings_of("shared memory", num_threads)
    return ceilings_of(PATH, layout(*["cpu"] * 4), settings, "box", cluster)


def test_cpus_of_a_host_are_alike() -> None:
    """Four ranks, of which two were probed."""
    found = of_cpus(num_threads=2)
    assert not found.notes
    assert found.memory_bytes_per_s(3) == 5e9
    assert found.all_reduce_bytes_per_s([2, 3], 1000) == pytest.approx(1e8)
    assert found.send_bytes_per_s(1, 3, 1000) == pytest.approx(1e8)


def test_shares_of_other_sizes_have_no_ceiling() -> None:
    found = of_cpus(num_threads=1)
    assert found.memory_bytes_per_s(0) is None
    assert "is of ranks with 2 threads, these have 1" in found.notes[0]


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-6, 1)), min_size=1, max_size=6),
    st.integers(1, 2 * 10**6),
)
def test_no_size_is_off_the_curve(points: list[tuple[int, float]], size: int) -> None:
    sizes = sorted(dict(points).items())
    curve: Curve = tuple(Point(*pair) for pair in sizes)
    found = seconds_of(curve, size)
    for point in curve:
        assert seconds_of(curve, point.size) == pytest.approx(point.seconds)
    if size <= curve[-1].size:
        seconds = [point.seconds for point in curve]
        assert min(seconds) * (1 - 1e-9) <= found <= max(seconds) * (1 + 1e-9)
    else:
        assert size / found == pytest.approx(curve[-1].size_per_s)
