"""Bireme as its peers are timed: run by `decode_gpu.py` beside them.

PYTHON bireme_peer.py MODEL_FOLDER --layout 2,1 --batches 1,8 --device cuda [--prefills 1024] [--load 512,512,128]
"""

from __future__ import annotations

import time

from timing import asked_for, measured, numbers, tell

from bireme import LLM, SamplingParams, __version__


def main() -> None:
    asked = asked_for(__doc__)
    tp, pp = numbers(asked.layout)
    start = time.perf_counter()
    with LLM(
        asked.model, tensor_parallel_size=tp, pipeline_parallel_size=pp, dtype="bfloat16",
        device=asked.device, load_format="dummy", enable_prefix_caching=False, **asked.settings,
    ) as llm:  # fmt: skip
        llm.start()
        start_s = time.perf_counter() - start

        def generate(given: list[list[int]], num_tokens: int) -> None:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            llm.generate(given, params)

        tell({"start_s": start_s, **measured(asked, generate)}, ["torch"], bireme=__version__)


if __name__ == "__main__":
    main()
