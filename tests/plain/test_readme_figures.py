"""The figures of the README are those that are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def kept(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return found


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
    assert KEPT["command"] in README
    usual = KEPT["step_bytes"] / median(KEPT["read_bytes_per_s"])
    assert f"take {1e3 * KEPT['floor_s']:.1f} ms at the best rate" in README
    assert f"and {1e3 * usual:.1f} at\nthe usual one" in README


def row(name: str) -> list[str]:
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", README, re.MULTILINE)
    return str(found).split(" | ")


def test_a_7b_shape_on_gpus() -> None:
    layouts = kept("decode-llama-2-7b-2x-h200")["layouts"]
    names = [f"tp {it['tp']} x pp {it['pp']}" for it in layouts]
    assert f"| | {' | '.join(names)} |" in README
    for batch in ("1", "8", "32", "64", "128"):
        steps = [it["decode"][batch] for it in layouts]
        assert row(f"decode, batch {batch}, ms a step") == [
            f"{1e3 * it['step_s']:.2f} ({it['floor_s'] / it['step_s']:.0%})" for it in steps
        ]
    for size in ("1024", "3584"):
        times = [(median(it["prefill"][size]["ttft_s"]), it["prefill"][size]) for it in layouts]
        assert row(f"prefill 1 x {size}, ms") == [
            f"{1e3 * took:.1f} ({it['floor_s'] / took:.0%})" for took, it in times
        ]
    loads = [it["throughput"] for it in layouts]
    rates = [median(it["output_tokens_per_second_by_round"]) for it in loads]
    floors = [it["num_prompts"] * it["output_len"] / it["floor_s"] for it in loads]
    assert row("throughput, output tokens/s") == [
        f"{rate:,.0f} ({rate / floor:.0%})" for rate, floor in zip(rates, floors, strict=True)
    ]
    assert row("start to first token, s (without a cache)") == [
        f"{median(it['start_s']):.1f} ({it['start_with_empty_cache_s']:.1f})" for it in layouts
    ]


def test_beside_vllm_on_gpus() -> None:
    layouts = kept("decode-llama-2-7b-2x-h200")["layouts"]
    assert all(it["peers"]["vllm"]["versions"]["vllm"].startswith("0.24.") for it in layouts)
    told = [it["peers"][name] for it in layouts for name in ("bireme", "vllm")]
    for batch in ("1", "8", "32", "64", "128"):
        steps = [f"{1e3 * median(it['step_s'][batch]):.2f}" for it in told]
        assert row(f"batch {batch}, ms a step") == steps
    for size in ("1024", "3584"):
        times = [f"{1e3 * median(it['first_token_s'][size]):.1f}" for it in told]
        assert row(f"prompt of {size}, ms") == times
    assert row("output tokens/s") == [f"{median(it['output_tokens_per_s']):,.0f}" for it in told]
    starts = [(it["start_with_empty_cache_s"], it["peers"]["vllm"]["start_s"]) for it in layouts]
    assert row("first start, s") == [f"{seconds:.1f}" for both in starts for seconds in both]
    commits = {it["run"]["commit"][:7] for it in layouts}
    assert [f"at commit {commit} " in README for commit in commits] == [True]


def of_70b(name: str) -> tuple[str, str, str, str]:
    """Steps at batch 1 and 64 and a prompt in milliseconds, the start in seconds."""
    (layout,) = kept(name)["layouts"]
    one, many = (1e3 * layout["decode"][batch]["step_s"] for batch in ("1", "64"))
    prefill = 1e3 * median(layout["prefill"]["1024"]["ttft_s"])
    return f"{one:.1f}", f"{many:.1f}", f"{prefill:.0f}", f"{median(layout['start_s']):.1f}"


def test_a_70b_shape_on_gpus() -> None:
    one, many, prefill, start = of_70b("decode-llama-3-70b-2x-h200")
    assert (
        f"takes {one} ms a step at batch 1, {many} at batch 64, {prefill} ms for a prompt" in README
    )
    assert f"{start} s from" in README
    one, many, prefill, _ = of_70b("decode-llama-3-70b-2x-h200-other-host")
    assert f"took {one}, {many} and {prefill} ms" in README
