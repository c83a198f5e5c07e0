"""transformers beside Bireme, on all cores or on one GPU: run by `decode.py` and `decode_gpu.py`.

    PYTHON transformers_peer.py MODEL_FOLDER --batches 1,8 [--device cuda]

On a GPU with a cache of a fixed size, for which it compiles its decode steps.
"""

from __future__ import annotations

import torch
from timing import asked_for, measured, tell
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    asked = asked_for(__doc__)
    config = AutoConfig.from_pretrained(asked.model)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or it would go on uncompiled
    with torch.device(asked.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    more = {"cache_implementation": "static"} if asked.device == "cuda" else {}

    def generate(given: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(given, device=asked.device)
        made = model.generate(
            ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, **more
        )
        made.cpu()

    tell(measured(asked, generate), ["transformers", "torch"])


if __name__ == "__main__":
    main()
