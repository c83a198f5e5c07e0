"""What a second GPU as a second stage gives, beside one GPU: a load that its cache limits, and a long prompt.

    python benchmarks/stages_gpu.py --name 2x-h200

The shape of `examples/configs/llama-2-7b` with room for long prompts, made-up weights, bfloat16, greedy. The load: more
requests than one GPU's cache has room for, and as many as two have; contexts are most of what a step reads; the median
of three runs after a short one that does not count. The prompt: seconds to its first token, the median of three after
one that does not count. In brackets the least and the most.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import command_line
import record
from decode_gpu import first_token_s, settings
from gpu_floors import CONFIGS

from bireme import LLM
from bireme.bench.throughput import measure_throughput
from bireme.bench.workload import Workload

LAYOUTS = ["1,1", "1,2"]
PROMPT_LEN = 32768
LOAD = Workload(num_prompts=300, input_len=1024, output_len=384, seed=5)
SHORT_LOAD = Workload(num_prompts=300, input_len=1024, output_len=4, seed=6)
ROUNDS = 3


def measure(folder: Path, layout: str) -> dict[str, Any]:
    wanted = {**settings(str(folder), layout), "max_num_seqs": LOAD.num_prompts}
    with LLM(**wanted) as llm:
        first_token_s(llm, PROMPT_LEN, seed=0)
        times = [first_token_s(llm, PROMPT_LEN, seed=seed) for seed in (1, 2, 3)]
        measure_throughput(llm, SHORT_LOAD)
        loads = [measure_throughput(llm, LOAD).as_json() for _ in range(ROUNDS)]
        cache_bytes = [loaded.cache_bytes for loaded in llm.executor.loaded]
    return {"ttft_s": times, "throughput": loads, "cache_bytes": cache_bytes}


def _told(found: list[float], form: str) -> str:
    return f"{statistics.median(found):{form}} ({min(found):{form}} to {max(found):{form}})"


def main() -> None:
    parser = command_line.parser_of(__doc__)
    command_line.add_name(parser)
    asked = parser.parse_args()
    command_line.need_gpus(parser, layouts=LAYOUTS)
    config = json.loads((CONFIGS / "llama-2-7b" / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        long = {**config, "max_position_embeddings": 2 * PROMPT_LEN}
        (Path(folder) / "config.json").write_text(json.dumps(long))
        found = {layout: measure(Path(folder), layout) for layout in LAYOUTS}
    one, two = found.values()
    rates = [[load["output_tokens_per_second"] for load in it["throughput"]] for it in (one, two)]
    times = [it["ttft_s"] for it in (one, two)]
    (rate, rate_of_two), (time, time_of_two) = (map(statistics.median, it) for it in (rates, times))
    table = [
        "| | one GPU | two stages | |",
        "|---|---|---|---|",
        f"| output tokens/s | {_told(rates[0], ',.0f')} | {_told(rates[1], ',.0f')} | {rate_of_two / rate:.2f} x |",
        f"| first token of {PROMPT_LEN}, s | {_told(times[0], '.3f')} | {_told(times[1], '.3f')} | "
        f"{time / time_of_two:.2f} x |",
    ]
    print("\n".join(table))
    result = {"layouts": found, "table": table}
    record.write(f"stages-llama-2-7b-{asked.name}", ["torch", "triton"], result)


if __name__ == "__main__":
    main()
