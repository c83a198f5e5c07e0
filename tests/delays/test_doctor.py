"""The doctor names first what was really made wrong with a run, and finds nothing where nothing was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts
from planting import Plant

from bireme import LLM
from bireme.bench.passes import ProfilePlan
from bireme.bench.profiling import profile
from bireme.bench.workload import Workload
from bireme.cli import run as cli
from bireme.doctor.evidence import Evidence
from bireme.doctor.from_run import evidence_of
from bireme.doctor.instead import halved
from bireme.doctor.rules import examine
from bireme.engine.pool import WorkerPool
from bireme.engine.scheduler import Scheduler
from bireme.observe.run_folder import RunFolder, prepare_run_folder

pytestmark = pytest.mark.slow

Ranks = tuple[WorkerPool, Plant]
SLOW_S = 0.02  # more in each pass
SLOW_BYTES_PER_S, SLOWEST_BYTES_PER_S = 20_000_000, 2_000_000


def found(ranks: Ranks, folder: Path, paces: Sequence[float], **settings: Any) -> list[str]:
    """The rules, in their order, of a workload in ranks of these paces."""
    return [finding.rule for finding in examine(evidence(ranks, folder, paces, **settings))]


def evidence(
    ranks: Ranks, folder: Path, paces: Sequence[float], *, batch: int = 16, input_len: int = 16,
    output_len: int = 24, plan: dict[str, Any] | None = None, **settings: Any,
) -> Evidence:  # fmt: skip
    pool, plant = ranks
    plant.set(paces)
    workload = Workload(num_prompts=batch, input_len=input_len, output_len=output_len)
    with LLM("demo", pool=pool, **settings) as llm:
        profile(llm, plan_of(workload, folder, **(plan or {})))
    return evidence_of(RunFolder(folder))


def plan_of(workload: Workload, folder: Path, **more: Any) -> ProfilePlan:
    prepare_run_folder(folder)
    given: dict[str, Any] = {"num_warmup": 1, "has_kernels": False, "cluster": None, "command": ()}
    return ProfilePlan(workload=workload, folder=folder, **(given | more))


TP, PP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


@pytest.mark.parametrize("layout", [TP, PP], ids=str)
@pytest.mark.parametrize("chunks", [(), (128, 1024)], ids=str)
def test_nothing_is_found_in_a_healthy_run(
    language_ranks: Ranks, tmp_path: Path, layout: dict[str, int], chunks: tuple[int, ...]
) -> None:
    rules = found(
        language_ranks, tmp_path / "run", [0, 0], output_len=64, plan={"chunks": chunks}, **layout
    )
    assert rules == []


def test_nothing_is_found_in_a_healthy_pipeline_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of twelve blocks that are alike, six a stage: a plan from what a busy machine measured may be uneven."""
    run = str(tmp_path / "run")
    arguments = [
        "--config",
        "vit-b16",
        "--split",
        "vit.layers.6",
        "--image-size",
        "32",
        "--batch",
        "16",
    ]
    assert cli(["pipeline", *arguments, "--micro-batches", "8", "--runs", "3", "-o", run]) == 0
    capsys.readouterr()
    assert cli(["doctor", run]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == f"{run}: nothing found\n"


@pytest.mark.parametrize("layout", [TP, PP], ids=str)
def test_an_engine_that_takes_its_time_between_steps_is_named_first(
    language_ranks: Ranks,
    tmp_path: Path,
    layout: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = Scheduler.schedule

    def late(scheduler: Scheduler, *given: Any, **more: Any) -> Any:
        time.sleep(4 * SLOW_S)
        return schedule(scheduler, *given, **more)

    monkeypatch.setattr(Scheduler, "schedule", late)
    rules = found(language_ranks, tmp_path / "run", [0, 0], output_len=8, **layout)
    assert rules[0] == "slow-host"


@pytest.mark.parametrize(
    ("rule", "paces", "settings"),
    [
        ("slow-stage", [0, SLOW_S], PP),
        ("late-rank", [0, SLOW_S], TP),
        ("few-requests", [0.002, 0.002], {**PP, "batch": 1}),
        (
            "small-cache", [0, 0],
            {**PP, "memory_limit_bytes": 38 << 20, "max_model_len": 512, "max_num_batched_tokens": 256,
             "output_len": 180},
        ),
        ("small-batch", [SLOW_S], {"batch": 1, "plan": {"batches": (4, 16)}}),
        (
            "large-batch", [2 * SLOW_S],
            {"max_num_seqs": 2, "batch": 6, "output_len": 40, "plan": {"batches": (1, 2)}},
        ),
        (
            "small-chunks", [5 * SLOW_S],
            {"max_num_batched_tokens": 32, "batch": 4, "input_len": 96, "output_len": 4, "plan": {"chunks": (16,)}},
        ),
    ],
)  # fmt: skip
def test_a_fault_is_named_first(
    language_ranks: Ranks, tmp_path: Path, rule: str, paces: list[float], settings: dict[str, Any]
) -> None:
    assert found(language_ranks, tmp_path / "run", paces, **settings)[0] == rule


def test_more_ranks_than_cores_are_named_first(language_ranks: Ranks, tmp_path: Path) -> None:
    num_ranks = len(os.sched_getaffinity(0)) + 2
    rules = found(language_ranks, tmp_path / "run", [0] * num_ranks, tensor_parallel_size=num_ranks)
    assert rules[0] == "too-many-threads"


def test_a_rank_that_reads_its_memory_from_disk_is_named_first(
    language_ranks: Ranks, tmp_path: Path
) -> None:
    paged = language_ranks[1].folder / "paged-1"
    paged.write_bytes(os.urandom(1 << 20))
    os.sync()  # pages that are to be written stay
    try:
        assert found(language_ranks, tmp_path / "run", [0, 0], **PP)[0] == "paging"
    finally:
        paged.unlink()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as made:
        yield made


def test_collectives_over_a_slow_link_are_named_first(
    language_ranks: Ranks, tmp_path: Path, hosts: Hosts
) -> None:
    plant = language_ranks[1]
    with hosts.holding(plant, 2), hosts.shaped(SLOW_BYTES_PER_S):
        rules = found(language_ranks, tmp_path / "run", [0, 0], transport="distributed", **TP)
    assert rules[0] == "slow-link"


def test_handing_over_through_a_slow_link_is_named_first(
    language_ranks: Ranks, tmp_path: Path, hosts: Hosts
) -> None:
    plant = language_ranks[1]
    with hosts.holding(plant, 2), hosts.shaped(SLOWEST_BYTES_PER_S):
        rules = found(language_ranks, tmp_path / "run", [0, 0], transport="distributed", **PP)
    assert rules[0] == "slow-hand-over"


SUMS = """format_version = 1
[[nodes]]
name = "box"
devices = [
    { name = "cpu0", kind = "cpu", memory_bytes = 1000000000 },
    { name = "cpu1", kind = "cpu", memory_bytes = 1000000000 },
]
[[groups]]
devices = ["box/cpu0", "box/cpu1"]
transport = "gloo"
all_reduce = [[1024, 1e-3], [8192, 5e-3], [16777216, 8.4]]
"""


def test_sums_that_nothing_goes_on_beside_are_named_first(
    language_ranks: Ranks, tmp_path: Path, hosts: Hosts
) -> None:
    """Less than half of the time, at a pace that leaves it so; what sums take alone over that link is known."""
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(SUMS)
    plant, plan = language_ranks[1], {"cluster": cluster}
    with hosts.holding(plant, 2), hosts.shaped(SLOWEST_BYTES_PER_S):
        wide = evidence(
            language_ranks, tmp_path / "run", [0.09, 0.09], transport="distributed", plan=plan,
            input_len=2, output_len=16, **TP,
        )  # fmt: skip
    first = examine(wide)[0]
    assert first.rule == "exposed-collectives"
    assert "all-reduce of 8.0 KiB" in first.figure
    assert "as quick as the link (0.002 GB/s)" in first.remedy
    assert "calculated for -tp 1 -pp 2" in first.remedy


def test_what_is_calculated_over_a_slow_link_is_what_comes(
    language_ranks: Ranks, tmp_path: Path, hosts: Hosts
) -> None:
    """Half the width, and twice the stages, at the same pace and with twice the requests."""
    slow: dict[str, Any] = {"transport": "distributed", "output_len": 64}
    plant, paces = language_ranks[1], [SLOW_S, SLOW_S]
    with hosts.holding(plant, 2), hosts.shaped(SLOW_BYTES_PER_S):
        wide = evidence(language_ranks, tmp_path / "tp", paces, **slow, **TP)
        long = evidence(language_ranks, tmp_path / "pp", paces, batch=32, **slow, **PP)
    told = halved(wide)
    assert told is not None
    assert long.pace is not None
    assert told.output_tokens_per_s == pytest.approx(long.pace.output_tokens_per_s, rel=0.3)
    assert told.token_s == pytest.approx(long.pace.itl_s, rel=0.3)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    assert cli(["shard", "demo", str(folder), "-tp", "2"]) == 0
    return folder


def test_damage_of_the_artifact_that_ran_is_named_first(
    language_ranks: Ranks, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, plant = language_ranks
    plant.set([0, SLOW_S])
    workload = Workload(num_prompts=4, input_len=16, output_len=8)
    with LLM(artifact, tensor_parallel_size=2, pool=pool) as llm:
        profile(llm, plan_of(workload, tmp_path / "run"))
    path = artifact / "rank-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert cli(["doctor", str(tmp_path / "run"), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["findings"]
    assert (first["rule"], second["rule"]) == ("damaged-files", "late-rank")
    assert "rank-00001-of-00002.safetensors is corrupt" in first["figure"]


SLICES_CHANGE_PLACES = """
from bireme.parallel import layout

whole = layout.row_layout


def row_layout(name, source, columns, unit):
    if name == "model.layers.3.mlp.down_proj.weight":
        columns = tuple(source.shape[1] - edge for edge in reversed(columns))
    return whole(name, source, columns, unit)


layout.row_layout = row_layout
"""


def test_a_wrong_slice_is_named_first(
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each rank takes the other's of one tensor; a certificate says what that makes."""
    (tmp_path / "sitecustomize.py").write_text(SLICES_CHANGE_PLACES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    arguments = ["--dtype", "float32", "--num-prompts", "1", "--num-decode", "1"]
    assert cli(["verify", str(artifact), "-tp", "2", *arguments]) == 1
    capsys.readouterr()
    assert cli(["doctor", str(artifact)]) == 1
    said = capsys.readouterr().out
    assert said.startswith(
        "1. the cut model computes something else than the whole one (wrong-model)"
    )
    assert "layer 3, rank" in said
