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
        check_lengths(self.num_prompts, self.input_len, self.output_len, self.range_ratio)

    def make(self, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompts, and what is asked of each: greedy, exactly so many tokens."""
        draw = random.Random(self.seed)
        prompts = [
            [
                draw.randrange(vocab_size)
                for _ in range(draw_length(draw, self.input_len, self.range_ratio))
            ]
            for _ in range(self.num_prompts)
        ]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=draw_length(draw, self.output_len, self.range_ratio),
                ignore_eos=True,
            )
            for _ in range(self.num_prompts)
        ]
        return prompts, params


def draw_length(draw: random.Random, mean: int, range_ratio: float) -> int:
    """Evenly drawn, up to `range_ratio` away from `mean` either way."""
    spread = int(mean * range_ratio)
    return draw.randint(mean - spread, mean + spread)


def check_lengths(num_prompts: int, input_len: int, output_len: int, range_ratio: float) -> None:
    """RequestError names the one that no workload can have."""
    counts = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    for name, count in counts.items():
        if count < 1:
            raise RequestError(f"{name}={count} must be at least 1")
    if not 0 <= range_ratio < 1:
        raise RequestError(f"range_ratio={range_ratio} must be at least 0 and below 1")
