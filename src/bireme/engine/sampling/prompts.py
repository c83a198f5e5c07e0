"""Which rows of a step say how likely the tokens of a prompt were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch

from bireme.engine.sampling.logprobs import to_records
from bireme.request import PromptLogprobs, SamplingSetup, ScheduledPiece


@dataclass(frozen=True)
class PromptPart:
    """Prompt tokens from `start` on, `targets`, that the rows of a step from `first_row` on predict."""

    slot: int
    start: int
    first_row: int
    targets: list[int]
    num_top: int

    @classmethod
    def of(cls, piece: ScheduledPiece, first_row: int, sampling: SamplingSetup) -> Self | None:
        """A position predicts the next token; the first one of a prompt is predicted by nobody."""
        if sampling.num_prompt_logprobs is None:
            return None
        start, end = piece.start + 1, piece.start + piece.num_tokens + 1
        targets = sampling.token_ids[start : min(end, sampling.num_prompt)]
        if not targets:
            return None
        return cls(piece.slot, start, first_row, targets, sampling.num_prompt_logprobs)


def prompt_parts(
    pieces: Sequence[ScheduledPiece], setups: Mapping[int, SamplingSetup]
) -> list[PromptPart]:
    """What a batch's pieces say of prompts whose log-probabilities are wanted."""
    starts = accumulate((piece.num_tokens for piece in pieces), initial=0)
    return [
        part
        for piece, first_row in zip(pieces, starts, strict=False)
        if (part := PromptPart.of(piece, first_row, setups[piece.slot])) is not None
    ]


def told_prompts(parts: Sequence[PromptPart], logprobs: torch.Tensor) -> list[PromptLogprobs]:
    tokens = to_records(logprobs, [part.num_top for part in parts for _ in part.targets])
    ends = accumulate(len(part.targets) for part in parts)
    return [
        PromptLogprobs(part.slot, part.start, tokens[end - len(part.targets) : end])
        for part, end in zip(parts, ends, strict=True)
    ]
