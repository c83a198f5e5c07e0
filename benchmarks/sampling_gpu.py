"""The choice of ids on a GPU: the likeliest, a draw from all, and a draw from what top-k and top-p leave.

    python benchmarks/sampling_gpu.py --name 2x-h200 [--layouts 1,1 2,1 1,2] [--batches 1,64]

In a CUDA graph, of logits in bfloat16 as a model's head leaves them: in kernels, and in torch, beside the time in which
the logits are read once. Then whole decode steps: the time between two tokens of a request.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import command_line
import record
import torch
from decode_gpu import INPUT_LEN, settings
from gpu_floors import NO_CACHE_BYTES, memory_rates, microseconds, numbers

from bireme import LLM, SamplingParams
from bireme.bench.answer_times import Latencies
from bireme.bench.throughput import measure_throughput
from bireme.bench.workload import Workload
from bireme.engine.sampling.choosing import RowGroup, choose
from bireme.engine.sampling.choosing_on_gpu import choose_on_gpu
from bireme.engine.sampling.columns import ChoiceKind, SlotColumns
from bireme.engine.sampling.shard import Shard
from bireme.kernels.draws import Draws
from bireme.parallel.mesh import Alone
from bireme.request import SamplingSetup, SlotSetup

DEVICE = torch.device("cuda")
WORKSPACE_BYTES = 32 << 20  # as an engine has it
SIZES = list(product((32000, 128256), (1, 8, 64, 128)))  # vocabulary, rows
CHOICES = {
    "likeliest": SamplingParams(temperature=0), "all": SamplingParams(temperature=0.8, seed=0),
    "top-p": SamplingParams(temperature=0.8, top_p=0.9, seed=0),
    "top-k and top-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=0),
}  # fmt: skip
NUM_TOKENS, ROUNDS = 128, 3
_MOST_TENSORS = 64


@dataclass(frozen=True, kw_only=True)
class Drawn(Workload):
    """Tokens are chosen as `choice` says."""

    choice: SamplingParams

    def make(self, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
        prompts, params = super().make(vocab_size)
        return prompts, [
            replace(self.choice, max_tokens=one.max_tokens, ignore_eos=True) for one in params
        ]


def draws(num_rows: int, asked: SamplingParams) -> Draws | None:
    """As an engine's graph takes them."""
    columns = SlotColumns(num_rows, DEVICE)
    setup = SamplingSetup(
        seed=0, temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p
    )
    columns.set_up([SlotSetup(slot, 1024, setup) for slot in range(num_rows)])
    slots = torch.arange(num_rows, device=DEVICE)
    return columns.draws(ChoiceKind.of(setup), slots, slots)


def measure(vocab: int, num_rows: int, read_bytes_per_s: float) -> list[dict[str, Any]]:
    shard = Shard.of(vocab, 1, 0, Alone())
    count = min(_MOST_TENSORS, max(2, NO_CACHE_BYTES // (2 * vocab * num_rows)))
    tensors = [2 * torch.randn(num_rows, vocab, device=DEVICE).bfloat16() for _ in range(count)]
    found = []
    for kind, choice in CHOICES.items():
        asked = draws(num_rows, choice)
        group = RowGroup(slice(None), asked)
        found.append(
            {
                "vocabulary": vocab,
                "rows": num_rows,
                "from": kind,
                "us": microseconds(lambda x: choose_on_gpu(x, shard, asked), tensors),  # noqa: B023
                "torch_us": microseconds(
                    lambda x: choose(x.float(), shard, [group], WORKSPACE_BYTES),  # noqa: B023
                    tensors[:4],
                ),
                "floor_us": 1e6 * 2 * vocab * num_rows / read_bytes_per_s,
            }
        )
    return found


def steps(model: str, layout: str, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Means of several rounds, taken in turns."""
    with LLM(**settings(model, layout)) as llm:
        for batch in batches:
            found: dict[str, list[float]] = {kind: [] for kind in CHOICES}
            for seed in range(-1, ROUNDS):
                for kind, choice in CHOICES.items():
                    seen = Latencies()
                    load = Drawn(
                        num_prompts=batch, input_len=INPUT_LEN, output_len=NUM_TOKENS, seed=seed,
                        choice=choice,
                    )  # fmt: skip
                    measure_throughput(llm, load, seen=seen.note)
                    found[kind].append(statistics.mean(seen.gaps_s))
            for kind, means in found.items():
                yield {"layout": layout, "batch": batch, "from": kind, "step_s": means[1:]}


def main() -> None:
    parser = command_line.shape_parser(__doc__, batches="1,64")
    asked = parser.parse_args()
    command_line.need_gpus(parser, layouts=asked.layouts)
    rates, found = memory_rates(), []
    torch.cuda.empty_cache()
    for vocab, num_rows in SIZES:
        for one in measure(vocab, num_rows, rates["read_bytes_per_s"]):
            found.append(one)
            print(
                f"{num_rows:3} x {vocab}, {one['from']:15}: {one['us']:7.1f} us, in torch {one['torch_us']:7.1f}; "
                f"read in {one['floor_us']:.1f}",
                flush=True,
            )
    torch.cuda.empty_cache()
    whole = []
    for layout in asked.layouts:
        for one in steps(asked.model, layout, numbers(asked.batches)):
            whole.append(one)
            told = ", ".join(f"{1e3 * mean:.3f}" for mean in one["step_s"])
            print(f"{layout} batch {one['batch']:3}, {one['from']:15}: {told} ms", flush=True)
    record.write(
        f"sampling-{asked.name}", ["torch", "triton"], {**rates, "choices": found, "steps": whole}
    )


if __name__ == "__main__":
    main()
