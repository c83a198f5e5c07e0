"""Tokens per second of decoding at (1,1), (2,1) and (1,2), beside the floor that memory sets.

    python benchmarks/decode.py [--rounds 7] [--tokens 48] [--batches 1,8,32] [--vllm PYTHON]

A Llama of 16 layers, hidden size 1024, 8 KV heads, with dummy weights in bfloat16. In each of `--rounds` all layouts
are up at once and are measured in turn, while ranks that wait sleep; then, when none of them is there any more,
transformers and, with `--vllm`, an interpreter that has it, vLLM for CPUs, a layout at a time: what a machine gives
changes within minutes. Prints medians of the time between two tokens of a request. The floor: bytes that a step must
read (all weights but the embedding) by what all cores together read from memory a second.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import command_line
import record
import torch
from beside import told_by_peer
from gpu_floors import numbers
from rich.console import Console
from rich.table import Table

from bireme import LLM
from bireme.bench.latency import measure_latency
from bireme.bench.workload import Workload

LAYOUTS = [(1, 1), (2, 1), (1, 2)]
PEER_ROUNDS = 2  # in each of ours
INPUT_LEN, MAX_MODEL_LEN, MAX_NUM_SEQS = 32, 512, 32
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@contextmanager
def model_folder(config: dict[str, Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield Path(folder)


def read_bytes_per_s() -> float:
    """What all cores together read of memory that no cache holds."""
    x = torch.ones(1 << 27, dtype=torch.float32)  # 512 MiB
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def seconds() -> float:
        start = time.perf_counter()
        x.sum()
        return time.perf_counter() - start

    return x.nbytes / min(seconds() for _ in range(7))


def step_bytes(llm: LLM) -> int:
    """Of weights that a step reads: of the embedding it looks up a row a token."""
    embedding: int = CONFIG["vocab_size"] * CONFIG["hidden_size"] * 2
    return sum(rank.weight_bytes for rank in llm.loaded) - embedding


def step_s(llm: LLM, batch: int, num_tokens: int, seed: int) -> float:
    workload = Workload(num_prompts=batch, input_len=INPUT_LEN, output_len=num_tokens, seed=seed)
    return measure_latency(llm, workload, num_warmup=0, num_iterations=1).step_s


def add_peers(
    peers: dict[str, dict[str, Any]], folder: Path, batches: str, num_tokens: int, vllm: str | None
) -> None:
    """One more round of each: by peer its seconds by layout and batch, its versions and what its environment says; of
    none where it is not installed."""
    options = ["--batches", batches, "--tokens", str(num_tokens), "--rounds", str(PEER_ROUNDS)]
    if importlib.util.find_spec("transformers") is not None:
        told = told_by_peer("transformers", sys.executable, [str(folder), *options], {})
        add_peer(peers, "transformers", "all cores", told)
    for tp, pp in LAYOUTS if vllm else []:
        settings = json.dumps({"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS})
        told = told_by_peer(
            "vllm", str(vllm),
            [str(folder), *options, "--layout", f"{tp},{pp}", "--settings", settings],
            {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if tp * pp > 1 else "auto"},
        )  # fmt: skip
        add_peer(peers, "vllm-cpu", f"tp {tp} x pp {pp}", told)


def add_peer(
    peers: dict[str, dict[str, Any]], name: str, layout: str, told: dict[str, Any]
) -> None:
    peer = peers.setdefault(name, {"step_s": {}, "environment": {}})
    peer["versions"], peer["environment"][layout] = told["versions"], told["environment"]
    for batch, seconds in told["step_s"].items():
        peer["step_s"].setdefault(layout, {}).setdefault(batch, []).extend(seconds)


class Measured:
    """Seconds a step by layout and batch, and bytes a second that all cores read, of all rounds so far."""

    def __init__(self, batches: list[int], num_tokens: int) -> None:
        self._batches, self._num_tokens = batches, num_tokens
        self.found: dict[tuple[int, int], dict[int, list[float]]] = {}
        self.rates: list[float] = []
        self.num_bytes = 0

    def round(self, folder: Path, seed: int) -> None:
        """All layouts in turn, after one that warms up and is not counted; behind it none is there any more."""
        with ExitStack() as stack:
            llms = {
                (tp, pp): stack.enter_context(
                    LLM(
                        folder, tensor_parallel_size=tp, pipeline_parallel_size=pp, device="cpu",
                        load_format="dummy", max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS,
                        memory_limit_bytes=3 << 30,
                    )
                )
                for tp, pp in LAYOUTS
            }  # fmt: skip
            for is_counted in (False, True):
                self.rates.append(read_bytes_per_s())
                for batch in self._batches:
                    for layout, llm in llms.items():
                        seconds = step_s(llm, batch, self._num_tokens, 2 * seed + is_counted)
                        if is_counted:
                            of_layout = self.found.setdefault(layout, {})
                            of_layout.setdefault(batch, []).append(seconds)
            self.num_bytes = step_bytes(llms[1, 1])


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--rounds", type=command_line.count, default=7)
    parser.add_argument("--tokens", type=command_line.count, default=48)
    parser.add_argument("--batches", type=command_line.counts, default="1,8,32")
    parser.add_argument(
        "--vllm",
        type=command_line.interpreter_with("vllm"),
        metavar="PYTHON",
        help="an interpreter that has vLLM for CPUs",
    )
    parser.add_argument(
        "--name", type=command_line.name, default="decode-16x1024",
        help="of the kept result, which this project's repository has; empty: none",
    )  # fmt: skip
    arguments = parser.parse_args()
    batches = numbers(arguments.batches)
    if not 2 <= arguments.tokens <= MAX_MODEL_LEN - INPUT_LEN:
        parser.error(
            f"--tokens {arguments.tokens}: from 2 to {MAX_MODEL_LEN - INPUT_LEN} can be timed"
        )
    if max(batches) > MAX_NUM_SEQS:
        parser.error(f"--batches {arguments.batches}: at most {MAX_NUM_SEQS} requests run at once")
    measured, peers = Measured(batches, arguments.tokens), dict[str, dict[str, Any]]()
    with model_folder(CONFIG) as folder:
        for seed in range(arguments.rounds):
            print(f"round {seed + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            measured.round(folder, seed)
            add_peers(peers, folder, arguments.batches, arguments.tokens, arguments.vllm)
    found, rates, num_bytes = measured.found, measured.rates, measured.num_bytes
    floor_s = num_bytes / max(rates)
    show(found, batches, floor_s)
    show_peers(peers)
    result = {
        "model": CONFIG,
        "tokens": arguments.tokens,
        "step_bytes": num_bytes,
        "read_bytes_per_s": rates,
        "floor_s": floor_s,
        "step_s": {f"tp {tp} x pp {pp}": found[tp, pp] for tp, pp in found},
        "peers": peers,
    }
    if arguments.name:
        record.write(arguments.name, ["bireme", "torch"], result)


def show(
    found: dict[tuple[int, int], dict[int, list[float]]], batches: list[int], floor_s: float
) -> None:
    table = Table(f"floor {floor_s * 1e3:.1f} ms", *(f"batch {batch}" for batch in batches))
    for (tp, pp), by_batch in found.items():
        medians = {batch: statistics.median(by_batch[batch]) for batch in batches}
        table.add_row(
            f"tp {tp} x pp {pp}",
            *(f"{s * 1e3:.1f} ms (best {min(by_batch[b]) * 1e3:.1f}), {b / s:.0f}/s"
              for b, s in medians.items()),
        )  # fmt: skip
    Console(width=120).print(table)


def show_peers(peers: dict[str, dict[str, Any]]) -> None:
    for name, peer in peers.items():
        for layout, by_batch in peer["step_s"].items():
            medians = {b: statistics.median(seconds) for b, seconds in by_batch.items()}
            shown = ", ".join(f"batch {b} {s * 1e3:.1f} ms" for b, s in medians.items())
            print(f"{name} {peer['versions'][name]}, {layout}: {shown}")


if __name__ == "__main__":
    main()
