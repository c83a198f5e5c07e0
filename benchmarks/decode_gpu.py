"""A model's shape on GPUs: decode by batch, prefill, throughput, and the start, beside floors of the hardware.

    python benchmarks/decode_gpu.py --name 2x-h200 [--layouts 1,1 2,1 1,2] [--batches 1,8,32,64,128]
    python benchmarks/decode_gpu.py --model llama-3-70b --layouts 2,1 --batches 1,64 --briefly
    python benchmarks/decode_gpu.py --vllm PYTHON --transformers

The shape of one of `examples/configs`, or of a folder with a config.json, with made-up weights in bfloat16, greedy.
Decode: prompts of 128 tokens, continued by 128; the median time between two tokens of a request. Prefill: the time to
the first token of one prompt, the median of five after one that does not count. Throughput: 512 requests of 512 tokens
continued by 128, at most 256 at once, the median of three after one that does not count. Start: from the start of a
process to its first token, the median of three with Triton's cache as the runs before left it, and one with an empty
one. `--briefly` leaves the throughput and the start with an empty cache out.
With `--vllm`, an interpreter that has vLLM, each layout is followed by vLLM's at the same settings, and by ours timed
as it is: the mean of a step between a long and a short generation, prompts from outside, and the constructor's time as
the start; with `--transformers` one GPU is, by what it compiles. With `--keep-others` what the file of this name has
of other layouts and peers stays in it, with `--only-peers` of the layouts themselves too; each says of which run it
is.
A floor of decode is what is read between two tokens of a request (all weights but the embedding, and at each stage
the cache of the requests that are there together) by the bytes a second that a large sum reads or a large copy reads
and writes, whichever is more, on one GPU, over the ranks of a stage; of prefill the products of all tokens, and of
attention, by the rate of a large product, over all ranks; of throughput both, for all prompts and all decode steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import command_line
import record
import torch
from beside import told_by_peer
from gpu_floors import (
    flop_per_s,
    memory_rates,
    model_folder,
    numbers,
    prefill_flop,
    read_bytes,
)
from starting import seconds_to_first_token
from step_kinds import step_kinds

from bireme import LLM
from bireme.bench.answer_times import Latencies
from bireme.bench.step_log import logged
from bireme.bench.throughput import measure_throughput
from bireme.bench.workload import Workload
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.observe.window import whole_since

LIMITS = ("max_num_seqs", "max_num_batched_tokens")
INPUT_LEN, OUTPUT_LEN = 128, 128
PEER_ROUNDS = LOAD_ROUNDS = START_ROUNDS = 3
CONTEXT = INPUT_LEN + OUTPUT_LEN // 2  # of a request that decodes, on average
LOAD = Workload(num_prompts=512, input_len=512, output_len=128, seed=5)


def start_s(model: str, layout: str, environment: dict[str, str]) -> float:
    return seconds_to_first_token(settings(model, layout), environment)


def settings(model: str, layout: str) -> dict[str, Any]:
    tp, pp = numbers(layout)
    return {
        "model": model_folder(model), "load_format": "dummy", "device": "cuda", "dtype": "bfloat16",
        "tensor_parallel_size": tp, "pipeline_parallel_size": pp, "max_num_seqs": 256,
        "max_num_batched_tokens": 4096, "enable_prefix_caching": False,
    }  # fmt: skip


def gaps_s(llm: LLM, batch: int, output_len: int, seed: int) -> list[float]:
    seen = Latencies()
    workload = Workload(num_prompts=batch, input_len=INPUT_LEN, output_len=output_len, seed=seed)
    measure_throughput(llm, workload, seen=seen.note)
    return seen.gaps_s


def first_token_s(llm: LLM, num_tokens: int, seed: int) -> float:
    seen = Latencies()
    workload = Workload(num_prompts=1, input_len=num_tokens, output_len=1, seed=seed)
    measure_throughput(llm, workload, seen=seen.note)
    return seen.told().requests[0].ttft_s


def throughput(llm: LLM, read_bytes_per_s: float, rate: float) -> dict[str, Any]:
    """Of all rounds, and the last one's with where the time of the ranks went meanwhile, as far back as their rings
    tell. The hardware's rates are of one GPU."""
    rates = [measure_throughput(llm, LOAD).output_tokens_per_s for _ in range(LOAD_ROUNDS)][1:]
    with logged(llm.start()) as log:
        result = measure_throughput(llm, LOAD)
    start_ns = time.monotonic_ns() - round(1e9 * result.elapsed_s)
    llm.executor.usage()  # all spans are written by then
    recorded, is_whole = whole_since(llm.recorded(), start_ns)
    ledger = make_ledger(recorded)
    return {
        **result.as_json(),
        "output_tokens_per_second_by_round": [*rates, result.output_tokens_per_s],
        "floor_s": load_floor_s(llm, read_bytes_per_s, rate),
        "is_ledger_whole": is_whole,
        "ledger": {
            rank.name: {row.value: rank.share(row) for row in Row if rank.ns[row]}
            for rank in ledger.ranks
        },
        "steps": step_kinds(ledger, log.batches),
    }


def load_floor_s(llm: LLM, read_bytes_per_s: float, rate: float) -> float:
    """All prompts' prefill and all decode steps of as many requests as a stage has at once, on all ranks."""
    config = llm.config
    stages, ranks = config.parallel.pp_size, config.parallel.world_size
    together = config.max_num_seqs // stages
    num_steps = LOAD.num_prompts * LOAD.output_len / together
    context = LOAD.input_len + LOAD.output_len // 2
    prefill_s = LOAD.num_prompts * prefill_flop(llm, LOAD.input_len) / rate
    return (prefill_s + num_steps * read_bytes(llm, together, context) / read_bytes_per_s) / ranks


def measure(
    asked: argparse.Namespace, layout: str, read_bytes_per_s: float, rate: float
) -> dict[str, Any]:
    tp, pp = numbers(layout)
    with LLM(**settings(asked.model, layout)) as llm:
        found: dict[str, Any] = {"tp": tp, "pp": pp}
        found["load_s"] = [loaded.seconds for loaded in llm.executor.loaded]
        found["decode"] = {}
        for batch in numbers(asked.batches):
            gaps_s(llm, batch, 8, seed=batch)
            gaps = gaps_s(llm, batch, OUTPUT_LEN, seed=1000 + batch)
            floor_s = read_bytes(llm, -(-batch // pp), CONTEXT) / read_bytes_per_s / tp
            tenths = statistics.quantiles(gaps, n=10)
            found["decode"][batch] = {
                "step_s": statistics.median(gaps), "p10_s": tenths[0], "p90_s": tenths[-1],
                "floor_s": floor_s,
            }  # fmt: skip
        found["prefill"] = {}
        for size in numbers(asked.prefills):
            first_token_s(llm, size, seed=size)
            times = [first_token_s(llm, size, seed=size + 1 + index) for index in range(5)]
            floor_s = prefill_flop(llm, size) / rate / (tp * pp)
            found["prefill"][size] = {"ttft_s": times, "floor_s": floor_s}
        if not asked.briefly:
            found["throughput"] = throughput(llm, read_bytes_per_s, rate)
    found["start_s"] = [start_s(asked.model, layout, {}) for _ in range(START_ROUNDS)]
    if not asked.briefly:
        with tempfile.TemporaryDirectory() as folder:
            cold = {"TRITON_CACHE_DIR": folder}
            found["start_with_empty_cache_s"] = start_s(asked.model, layout, cold)
    return found


def peers(asked: argparse.Namespace, layout: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What others take for the same, one after another."""
    limits = {key: settings(asked.model, layout)[key] for key in LIMITS}
    options = [
        model_folder(asked.model), "--device", "cuda", "--layout", layout,
        "--batches", asked.batches, "--tokens", str(OUTPUT_LEN), "--input-len", str(INPUT_LEN),
        "--rounds", str(PEER_ROUNDS),
    ]  # fmt: skip
    if asked.vllm:
        more = ["--prefills", asked.prefills, "--settings", json.dumps(limits)]
        if not asked.briefly:
            more += ["--load", f"{LOAD.num_prompts},{LOAD.input_len},{LOAD.output_len}"]
        for name, python in (("bireme", sys.executable), ("vllm", asked.vllm)):
            yield name, told_by_peer(name, python, [*options, *more], {})
    if asked.transformers and layout == "1,1":
        yield "transformers", told_by_peer("transformers", sys.executable, options, {})


def _spread(times: Sequence[float], digits: int) -> str:
    return f"{statistics.median(times):.{digits}f} ({min(times):.{digits}f} to {max(times):.{digits}f})"


def peer_rows(told: dict[str, Any]) -> dict[str, str]:
    """Of a table: medians, and the least and the most of the rounds."""
    said = {}
    for batch, times in told["step_s"].items():
        said[f"decode, batch {batch}, ms a step"] = _spread([1e3 * time for time in times], 2)
    for size, times in told["first_token_s"].items():
        said[f"prefill 1 x {size}, ms"] = _spread([1e3 * time for time in times], 1)
    if "output_tokens_per_s" in told:
        said["throughput, output tokens/s"] = (
            f"{statistics.median(told['output_tokens_per_s']):,.0f}"
        )
    if "start_s" in told:
        said["start to first token, s"] = f"{told['start_s']:.1f} (constructor alone)"
    return said


def load_rate(load: dict[str, Any]) -> tuple[float, float]:
    """The median of output tokens a second, and the share that it is of the floor's."""
    rate = statistics.median(load["output_tokens_per_second_by_round"])
    return rate, rate * load["floor_s"] / load["num_prompts"] / load["output_len"]


def rows(found: dict[str, Any]) -> dict[str, str]:
    """What a table says of a layout."""
    said = {}
    for batch, one in found["decode"].items():
        share, spread = (
            one["floor_s"] / one["step_s"],
            f"{1e3 * one['p10_s']:.2f} to {1e3 * one['p90_s']:.2f}",
        )
        said[f"decode, batch {batch}, ms a step"] = (
            f"{1e3 * one['step_s']:.2f} ({share:.0%}; {spread})"
        )
    for size, one in found["prefill"].items():
        middle, share = (
            statistics.median(one["ttft_s"]),
            one["floor_s"] / statistics.median(one["ttft_s"]),
        )
        spread = f"{1e3 * min(one['ttft_s']):.1f} to {1e3 * max(one['ttft_s']):.1f}"
        said[f"prefill 1 x {size}, ms"] = f"{1e3 * middle:.1f} ({share:.0%}; {spread})"
    if "throughput" in found:
        tokens_per_s, share = load_rate(found["throughput"])
        said["throughput, output tokens/s"] = f"{tokens_per_s:,.0f} ({share:.0%})"
    said["start to first token, s"] = f"{statistics.median(found['start_s']):.1f}"
    if "start_with_empty_cache_s" in found:
        cold = found["start_with_empty_cache_s"]
        said["start to first token, s"] += f" ({cold:.1f} without a cache)"
    return said


def table(results: Sequence[dict[str, Any]]) -> str:
    """In Markdown; behind a time the share that its floor is of it, and its spread."""
    columns = {}
    for found in results:
        layout = f"tp {found['tp']}, pp {found['pp']}"
        columns[layout] = rows(found)
        for peer, told in found.get("peers", {}).items():
            title, commit = f"{peer} {told['versions'][peer]}, {layout}", told["run"]["commit"]
            if commit != found["run"]["commit"]:
                title += f", run at {commit[:7]}"
            columns[title] = peer_rows(told)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rows(results[0]):
        cells = (column.get(name, "") for column in columns.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept_before(name: str, gpus: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the file of this name has, by layout, if it is of such GPUs."""
    path = record.RESULTS / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {"gpus": [], "layouts": []}
    layouts = found["layouts"] if found["gpus"] == list(gpus) else []
    return {f"{one['tp']},{one['pp']}": one for one in layouts}


def cannot_be(asked: argparse.Namespace, kept: Mapping[str, object]) -> str | None:
    """What is wrong with what was asked."""
    lacking = sorted(set(asked.layouts) - set(kept)) if asked.only_peers else []
    return f"of {', '.join(lacking)} nothing is kept on these GPUs" if lacking else None


def tell_progress(what: str, start: float) -> float:
    """For whoever has limited time. The time now."""
    now = time.monotonic()
    print(f"{what}: {now - start:.0f} s", file=sys.stderr, flush=True)
    return now


def cells_parser(description: str) -> argparse.ArgumentParser:
    parser = command_line.shape_parser(description)
    parser.add_argument("--prefills", type=command_line.counts, default="1024,3584", help="tokens")
    return parser


def main() -> None:
    parser = cells_parser(__doc__)
    parser.add_argument(
        "--briefly",
        action="store_true",
        help="without throughput, and the start with an empty cache",
    )
    parser.add_argument(
        "--vllm",
        type=command_line.interpreter_with("vllm"),
        metavar="PYTHON",
        help="an interpreter that has vLLM",
    )
    parser.add_argument("--transformers", action="store_true", help="at 1,1")
    parser.add_argument(
        "--keep-others", action="store_true", help="what is kept of other layouts and peers stays"
    )
    parser.add_argument(
        "--only-peers", action="store_true", help="beside what is kept of the layouts, which stays"
    )
    asked = parser.parse_args()
    if asked.only_peers and not (asked.vllm or asked.transformers):
        parser.error("--only-peers is of --vllm or --transformers")
    command_line.need_gpus(parser, layouts=asked.layouts)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    name = f"decode-{Path(asked.model).name}-{asked.name}"
    results = kept_before(name, gpus) if asked.keep_others or asked.only_peers else {}
    if wrong := cannot_be(asked, results):
        parser.error(wrong)
    rates, rate = ({}, 0.0) if asked.only_peers else (memory_rates(), flop_per_s())
    torch.cuda.empty_cache()  # the ranks are processes of their own
    here = record.environment([])
    run = {key: here[key] for key in ("date", "command", "commit")}

    def keep() -> None:
        layouts = sorted(results.values(), key=lambda it: (it["pp"], it["tp"]))
        result = {"gpus": gpus, "layouts": layouts, "table": table(layouts).splitlines()}
        record.write(name, ["torch", "triton"], result)

    for layout in asked.layouts:
        start = time.monotonic()
        if not asked.only_peers:
            own = measure(asked, layout, max(rates.values()), rate)
            own["run"] = {**run, **rates, "flop_per_s": rate}
            results[layout] = {**own, "peers": results.get(layout, {}).get("peers", {})}
            keep()  # what was measured stays, whatever ends the next
            print(table([results[layout]]), flush=True)
            start = tell_progress(f"own figures at {layout}", start)
        for peer, told in peers(asked, layout):
            results[layout].setdefault("peers", {})[peer] = {**told, "run": run}
            keep()
            start = tell_progress(f"{peer} at {layout}", start)
        print(table([results[layout]]), flush=True)


if __name__ == "__main__":
    main()
