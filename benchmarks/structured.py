"""Tokens per second of structured requests beside free ones of the same lengths, in one run.

    python benchmarks/structured.py [--tokens 128] [--rounds 15]

In turn, `--rounds` times, each first in every other round: 8 free requests, and 8 that write a JSON
array of records, longer than they may be, so that all are of `--tokens` tokens. Sampled, float32,
CPU, the demo model. Prints medians, and the median of each round's ratio.
"""

from __future__ import annotations

import statistics
import time

import command_line
import record

from bireme import LLM, SamplingParams, StructuredOutputsParams
from bireme.engine.pool import WorkerPool

LAYOUTS = [(1, 1), (1, 2)]
BATCH = 8
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["function", "class", "module"]},
        "line": {"type": "integer", "minimum": 1},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "kind", "line", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 1000}


def tokens_per_s(llm: LLM, params: SamplingParams) -> float:
    prompts = [[100 + index, *range(100, 131)] for index in range(BATCH)]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    taken = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == params.max_tokens for output in outputs)
    return BATCH * params.max_tokens / taken


def measure(llm: LLM, num_tokens: int, num_rounds: int) -> dict[str, list[float]]:
    structure = StructuredOutputsParams(json=SCHEMA)
    asked = {
        "free": SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1),
        "structured": SamplingParams(max_tokens=num_tokens, seed=1, structured_outputs=structure),
    }
    rates: dict[str, list[float]] = {name: [] for name in asked}
    for round_ in range(num_rounds + 1):  # the first warms up and is not counted
        for name in sorted(asked, reverse=round_ % 2 == 0):
            rate = tokens_per_s(llm, asked[name])
            if round_:
                rates[name].append(rate)
    return rates


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    results = []
    with WorkerPool() as pool:
        for tp, pp in LAYOUTS:
            sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
            with LLM("demo", dtype="float32", pool=pool, **sizes) as llm:
                rates = measure(llm, arguments.tokens, arguments.rounds)
            pairs = zip(rates["structured"], rates["free"], strict=True)
            ratio = statistics.median(structured / free for structured, free in pairs)
            medians = {name: statistics.median(found) for name, found in rates.items()}
            shown = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in medians.items())
            print(f"tp {tp} x pp {pp}, batch {BATCH}: {shown}; structured / free {ratio:.3f}")
            results.append({**sizes, "median_ratio": ratio, "tokens_per_s": rates})
    record.write(
        "structured",
        ["bireme", "torch", "llguidance"],
        {"batch": BATCH, "num_tokens": arguments.tokens, "results": results},
    )


if __name__ == "__main__":
    main()
