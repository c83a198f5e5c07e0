"""The choice of ids on a GPU: the likeliest, a draw from all, and a draw from what top-k and top-p leave.

    python benchmarks/sampling_gpu.py --name 1x-h200

In a CUDA graph, of logits in bfloat16 as a model's head leaves them: in kernels, and in torch, beside the time in which
the logits are read once.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import command_line
import record
import torch
from gpu_floors import NO_CACHE_BYTES, memory_rates, microseconds

from bireme.engine.sampling.choosing import RowGroup, choose
from bireme.engine.sampling.choosing_on_gpu import choose_on_gpu
from bireme.engine.sampling.shard import Shard
from bireme.kernels.draws import Draws
from bireme.parallel.mesh import Alone

DEVICE = torch.device("cuda")
WORKSPACE_BYTES = 32 << 20  # as an engine has it
SIZES = list(product((32000, 128256), (1, 8, 64, 128)))  # vocabulary, rows
_MOST_TENSORS = 64


def draws(num_rows: int) -> dict[str, Draws | None]:
    counters = torch.arange(num_rows, device=DEVICE)
    kept = torch.ones(num_rows, device=DEVICE)
    of_all = Draws(0.8 * kept, 0 * counters, kept, 0 * kept, counters, 0 * counters, counters)
    filtered = replace(
        of_all, top_k=50 + 0 * counters, top_p=0.9 * kept, has_top_k=True, has_top_p=True
    )
    by_mass = replace(of_all, top_p=0.9 * kept, has_top_p=True)
    return {"likeliest": None, "all": of_all, "top-p": by_mass, "top-k and top-p": filtered}


def measure(vocab: int, num_rows: int, read_bytes_per_s: float) -> list[dict[str, Any]]:
    shard = Shard.of(vocab, 1, 0, Alone())
    count = min(_MOST_TENSORS, max(2, NO_CACHE_BYTES // (2 * vocab * num_rows)))
    tensors = [2 * torch.randn(num_rows, vocab, device=DEVICE).bfloat16() for _ in range(count)]
    found = []
    for kind, asked in draws(num_rows).items():
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


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--name", default="gpu")
    asked = parser.parse_args()
    command_line.need_gpus(parser)
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
    record.write(f"sampling-{asked.name}", ["torch", "triton"], {**rates, "choices": found})


if __name__ == "__main__":
    main()
