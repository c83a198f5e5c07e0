"""Tokens per second of `generate`, beside transformers on the same model, in one run.

    python benchmarks/generate.py [--tokens 64] [--rounds 5]

In turn, `--rounds` times: transformers' generate (all cores), then Bireme at (1,1) (2,1) (1,2)
(2,2), each with 1 and with 8 equal-length prompts. Greedy, float32, CPU. Prints medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import command_line
import record
import torch
from rich.console import Console
from rich.table import Table

from bireme import LLM, SamplingParams
from bireme.checkpoint.hub import resolve_model
from bireme.engine.pool import WorkerPool

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
BATCHES = [1, 8]
PROMPT = list(range(100, 132))


def of_transformers(num_tokens: int) -> Callable[[int], float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32).eval()

    def run(batch: int) -> float:
        ids = torch.tensor([PROMPT] * batch)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens,
                min_new_tokens=num_tokens, pad_token_id=2,
            )  # fmt: skip
        return batch * num_tokens / (time.perf_counter() - start)

    return run


def of_bireme(llm: LLM, num_tokens: int) -> Callable[[int], float]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)

    def run(batch: int) -> float:
        start = time.perf_counter()
        llm.generate([PROMPT] * batch, params)
        return batch * num_tokens / (time.perf_counter() - start)

    return run


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rates: dict[str, dict[int, list[float]]] = {}
    oracle = of_transformers(arguments.tokens)
    with WorkerPool() as pool:
        for round_ in range(arguments.rounds + 1):  # the first warms up and is not counted
            for batch in BATCHES:
                measured = {"transformers": oracle(batch)}
                for tp, pp in LAYOUTS:
                    with LLM(
                        "demo",
                        tensor_parallel_size=tp,
                        pipeline_parallel_size=pp,
                        dtype="float32",
                        pool=pool,
                    ) as llm:
                        run = of_bireme(llm, arguments.tokens)
                        run(batch)
                        measured[f"tp {tp} x pp {pp}"] = run(batch)
                for name, rate in measured.items():
                    if round_:
                        rates.setdefault(name, {}).setdefault(batch, []).append(rate)
    table = Table("tokens/s, median", *(f"batch {batch}" for batch in BATCHES))
    for name, found in rates.items():
        table.add_row(name, *(f"{statistics.median(found[batch]):.1f}" for batch in BATCHES))
    Console().print(table)
    record.write("generate-demo", ["bireme", "torch", "transformers"], {"tokens_per_s": rates})


if __name__ == "__main__":
    main()
