"""Prompts of made-up token ids: the same for the same seed, none that begins like another."""

from __future__ import annotations

import random
from dataclasses import dataclass

from bireme.errors import RequestError
from bireme.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`num_prompts` prompts of `input_len` tokens, each continued by `output_len` tokens; lengths
    vary by `range_ratio` either way, evenly drawn."""

    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.range_ratio < 1:
            raise RequestError(f"range_ratio={self.range_ratio} must be at least 0 and below 1")

    def make(self, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompts, and what is asked of each: greedy, exactly so many tokens."""
        draw = random.Random(self.seed)
        prompts = [
            [draw.randrange(vocab_size) for _ in range(self._length(draw, self.input_len))]
            for _ in range(self.num_prompts)
        ]
        params = [
            SamplingParams(
                temperature=0, max_tokens=self._length(draw, self.output_len), ignore_eos=True
            )
            for _ in range(self.num_prompts)
        ]
        return prompts, params

    def _length(self, draw: random.Random, mean: int) -> int:
        spread = int(mean * self.range_ratio)
        return draw.randint(mean - spread, mean + spread)
