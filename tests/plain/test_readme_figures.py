"""The figures of the README are those that are kept."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks/README.md").read_text()


readme_tables = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/readme_tables.py")))
kept = readme_tables.kept
KEPT = kept("decode-16x1024")
BATCHES = ("1", "8", "32")


def told(seconds: dict[str, list[float]], batch: str) -> str:
    return f"{1e3 * median(seconds[batch]):.1f}"


@pytest.mark.parametrize("layout", KEPT["step_s"])
def test_decoding_on_cpus(layout: str) -> None:
    (row,) = re.findall(rf"^\| {layout} \| (.*) \|$", README, re.MULTILINE)
    ours, theirs = KEPT["step_s"][layout], KEPT["peers"]["vllm-cpu"]["step_s"][layout]
    expected = [told(whose, batch) for batch in BATCHES for whose in (ours, theirs)]
    assert row.split(" | ") == expected


def test_transformers_on_cpus() -> None:
    theirs = KEPT["peers"]["transformers"]["step_s"]["all cores"]
    first, second, third = (told(theirs, batch) for batch in BATCHES)
    assert f"takes {first}, {second} and {third} on both" in README
    ours = KEPT["step_s"]["tp 2 x pp 1"]
    first, second, third = (f"{median(theirs[it]) / median(ours[it]):.2f}" for it in BATCHES)
    assert f"cores, **{first}**, {second} and {third} times as long as tp 2" in README
    assert KEPT["command"] in README
    usual = KEPT["step_bytes"] / median(KEPT["read_bytes_per_s"])
    assert f"take {1e3 * KEPT['floor_s']:.1f} ms at the best rate" in README
    assert f"and {1e3 * usual:.1f} at\nthe usual one" in README


def test_a_7b_shape_on_gpus() -> None:
    assert "\n".join(readme_tables.beside_aims(readme_tables.SHAPE)) in README
    layouts: dict[str, list[str]] = {}
    for it in kept(readme_tables.SHAPE)["layouts"]:
        commit = it["run"]["commit"][:7]
        layouts.setdefault(commit, []).append(f"tp {it['tp']} x pp {it['pp']}")
    said = ", ".join(f"{' and '.join(of)} at commit {commit}" for commit, of in layouts.items())
    assert said in README.replace("\n", " ")


@pytest.mark.parametrize(
    ("shape", "page"),
    [
        (readme_tables.SHAPE, README),
        (readme_tables.LARGE_SHAPE, README),
        (readme_tables.OTHER_SHAPE, BENCHMARKS),
        (readme_tables.LATER_SHAPE, BENCHMARKS),
    ],
    ids=("7b", "70b", "heads-of-64", "heads-of-256"),
)
def test_beside_vllm_on_gpus(shape: str, page: str) -> None:
    assert "\n".join(readme_tables.beside_vllm(shape)) in page
    layouts = kept(shape)["layouts"]
    assert {it["peers"]["vllm"]["versions"]["vllm"] for it in layouts} == {"0.24.0"}
    runs = [peer["run"] for it in layouts for peer in it["peers"].values()]
    assert {f"of commit {run['commit'][:7]}" in page for run in runs} == {True}


def commits_of(shape: str) -> set[str]:
    """Of our own figures."""
    return {it["run"]["commit"][:7] for it in kept(shape)["layouts"]}


def less(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> list[float]:
    """Of the time that a step takes them, by which shares ours take less."""
    return [1 - median(ours[batch]) / median(theirs[batch]) for batch in ours]


def test_in_short() -> None:
    readme = README.replace("\n", " ")
    theirs = KEPT["peers"]["vllm-cpu"]["step_s"]
    on_cpus = [
        share for layout, ours in KEPT["step_s"].items() for share in less(ours, theirs[layout])
    ]
    of_7b, of_70b = (
        [(it["peers"]["bireme"], it["peers"]["vllm"]) for it in kept(shape)["layouts"]]
        for shape in (readme_tables.SHAPE, readme_tables.LARGE_SHAPE)
    )
    more = [
        median(ours["output_tokens_per_s"]) / median(theirs["output_tokens_per_s"]) - 1
        for ours, theirs in of_7b
    ]
    steps, large = (
        [share for ours, theirs in peers for share in less(ours["step_s"], theirs["step_s"])]
        for peers in (of_7b, of_70b)
    )
    of_cpus, of_steps, of_rate, of_large = (
        f"{100 * min(those):.0f} to {100 * max(those):.0f} %"
        for those in (on_cpus, steps, more, large)
    )
    assert f"takes {of_cpus} less time on two cores and, of a 7B shape, {of_steps} less" in readme
    assert f"where {of_rate} more tokens come a second" in readme
    assert f"a 70B shape's takes {of_large} less on two" in readme


def test_another_shape() -> None:
    (commit,) = commits_of(readme_tables.OTHER_SHAPE)
    assert f"--briefly` at commit {commit})" in BENCHMARKS
    assert "\n".join(readme_tables.shares(readme_tables.OTHER_SHAPE)) in BENCHMARKS


def listed(figures: list[str]) -> str:
    return f"{', '.join(figures[:-1])} and {figures[-1]}"


def test_one_gpu_since() -> None:
    readme = README.replace("\n", " ")
    (layout,) = kept("decode-llama-2-7b-1x-h200")["layouts"]
    steps = [f"{1e3 * one['step_s']:.2f}" for one in layout["decode"].values()]
    prompts = [f"{1e3 * median(one['ttft_s']):.1f}" for one in layout["prefill"].values()]
    rate = median(layout["throughput"]["output_tokens_per_second_by_round"])
    commit = layout["run"]["commit"][:7]
    assert f"at commit {commit}, tp 1 x pp 1 takes {listed(steps)} ms a step" in readme
    assert f"{listed(prompts)} ms to first tokens, and gives {rate:,.0f} tokens/s" in readme


@pytest.mark.parametrize("shape", ["heads-of-64", "heads-of-80"])
def test_one_gpu_since_beside_vllm(shape: str) -> None:
    page = BENCHMARKS.replace("\n", " ")
    (layout,) = kept(f"decode-{shape}-1x-h200")["layouts"]
    (ours, prompts), (theirs, their_prompts) = (
        [
            listed(
                [
                    f"{1e3 * median(times):.{digits}f}"
                    for times in layout["peers"][peer][key].values()
                ]
            )
            for key, digits in (("step_s", 2), ("first_token_s", 1))
        ]
        for peer in ("bireme", "vllm")
    )
    assert f"takes {ours} ms a step, {prompts} ms to first tokens; " in page
    assert f"vLLM {theirs} ms, {their_prompts}." in page
    assert f"At commit {layout['run']['commit'][:7]}" in page


def test_transformers_on_a_gpu() -> None:
    (alone,) = (it for it in kept(readme_tables.SHAPE)["layouts"] if it["tp"] == it["pp"] == 1)
    theirs = alone["peers"]["transformers"]
    assert theirs["versions"]["transformers"].startswith("5.17.")
    steps = [f"{1e3 * median(times):.2f}" for times in theirs["step_s"].values()]
    assert f"takes {listed(steps)} ms a step" in README


def test_a_70b_shape_on_gpus() -> None:
    (commit,) = commits_of(readme_tables.LARGE_SHAPE)
    assert f"made up on the GPUs, at commit {commit}, beside" in README.replace("\n", " ")
    (ours,) = kept(readme_tables.LARGE_SHAPE)["layouts"]
    times = [1e3 * took for took in ours["prefill"]["1024"]["ttft_s"]]
    assert f"The five prompts took {min(times):.1f} to {max(times):.1f}." in README
    assert "\n".join(readme_tables.beside_aims(readme_tables.LARGE_SHAPE, "limit")) in README
    (layout,) = kept(f"{readme_tables.LARGE_SHAPE}-other-host")["layouts"]
    one, many = (1e3 * layout["decode"][batch]["step_s"] for batch in ("1", "64"))
    prefill = 1e3 * median(layout["prefill"]["1024"]["ttft_s"])
    assert f"took {one:.1f}, **{many:.1f}** and **{prefill:.0f}** ms" in README


def test_what_is_missing_on_gpus() -> None:
    layouts = {f"{it['tp']},{it['pp']}": it for it in kept(readme_tables.KERNELS)["layouts"]}
    told = "\n".join(readme_tables.missing(readme_tables.SHAPE, layouts))
    assert told in BENCHMARKS
    assert f"of commit {kept(readme_tables.KERNELS)['commit'][:7]}, as" in BENCHMARKS


def test_attention() -> None:
    for table in readme_tables.attention(readme_tables.ATTENTION):
        assert "\n".join(table) in BENCHMARKS
    assert f"of commit {kept(readme_tables.ATTENTION)['commit'][:7]}, for the heads" in BENCHMARKS


def missed(found: float, aim: float, *, is_rate: bool = False) -> float:
    by: float = readme_tables.Cell("", "", "", found, "", aim, 1, is_rate).missed
    return by


def test_what_misses_its_aim() -> None:
    assert missed(4.0, 4.0) == 0 == missed(3.9, 4.0)
    assert missed(4.4, 4.0) == pytest.approx(0.1)
    assert missed(90, 100, is_rate=True) == pytest.approx(0.1)
    assert missed(110, 100, is_rate=True) == 0


def test_where_the_time_of_such_cells_goes() -> None:
    layouts = readme_tables.cells(readme_tables.SHAPE)
    kernels = {"ranks": [{"products": 3.0, "sums": 0.25}], "floor_ms": {"products": 2.5}}
    seen = {
        layout: {
            part: {it.size: kernels for it in cells if it.part == part}
            for part in ("decode", "prefill")
        }
        for layout, cells in layouts.items()
    }
    rows = readme_tables.missing(readme_tables.SHAPE, seen)[2:]
    behind = [it for cells in layouts.values() for it in cells if it.missed]
    assert len(rows) == len(behind)
    for row, cell in zip(rows, behind, strict=True):
        told = "3.00 (2.50) | 0.25" if cell.part in ("decode", "prefill") else " | "
        assert row.endswith(f"| {cell} of {cell.aim:,} | {cell.missed:.1%} | {told} |")
