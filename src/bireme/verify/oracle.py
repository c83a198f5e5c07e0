"""What transformers computes with the same checkpoint: the one place that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bireme.checkpoint.prepared import PreparedModel
from bireme.errors import ConfigError
from bireme.models.rope import depends_on_length
from bireme.verify.sequences import Reference, Sequences


def transformers_reference(
    model: PreparedModel,
    prompts: Sequence[Sequence[int]],
    num_decode: int,
    dtype: str,
    device: str = "cpu",
) -> Reference:
    """What transformers computes, token by token and then in one pass over each whole sequence."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            "reference transformers needs that package; pip install transformers"
        ) from None
    oracle = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    oracle = oracle.eval().to(device)
    rope = model.config.rope
    greedy = _greedy_at_full_length if rope and depends_on_length(rope) else _greedy
    reference = Reference("transformers", Sequences([], []), [])
    with torch.inference_mode():
        for prompt in prompts:
            ids = greedy(oracle, torch.tensor([list(prompt)], device=device), num_decode)
            reference.sequences.ids.append(ids[0].tolist())
            reference.sequences.num_prompt.append(len(prompt))
            reference.logits.append(oracle(ids).logits[0].float().cpu())
    return reference


def _greedy(oracle: Any, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[1, T] ids -> [1, T + num_tokens], with a cache."""
    parts, cache = [prompt], None
    for _ in range(num_tokens):
        out = oracle(parts[-1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(parts, dim=-1)


def _greedy_at_full_length(oracle: Any, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The same where frequencies depend on length, as they are at the final one: every pass has
    that length, and what lies behind the last known token is not seen by those before it."""
    oracle(
        prompt[:, :1]
    )  # transformers keeps the frequencies of the longest so far until a short one
    ids = torch.nn.functional.pad(prompt, (0, num_tokens))
    for at in range(prompt.shape[1], ids.shape[1]):
        ids[0, at] = oracle(ids).logits[0, at - 1].argmax()
    return ids
