"""transformers' time from token to token on all cores: run by `decode.py`.

    PYTHON transformers_cpu.py MODEL_FOLDER BATCHES TOKENS ROUNDS

Prints a line of JSON: seconds by batch, and versions. A step is the difference between a long and a
short generation, over the tokens between them.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHORT = 4  # tokens


def main() -> None:
    folder, batches, num_tokens, num_rounds = sys.argv[1:]
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def seconds(batch: int, count: int) -> float:
        rows = torch.arange(batch)[:, None]
        prompts = (7 * rows + 3 * torch.arange(32) + 1) % 31000
        start = time.perf_counter()
        model.generate(prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - start

    found = {}
    for batch in map(int, batches.split(",")):
        seconds(batch, SHORT)
        found[batch] = [
            (seconds(batch, SHORT + int(num_tokens)) - seconds(batch, SHORT)) / int(num_tokens)
            for _ in range(int(num_rounds))
        ]
    versions = {name: version(name) for name in ("transformers", "torch")}
    print(json.dumps({"step_s": found, "versions": versions}))


if __name__ == "__main__":
    main()
