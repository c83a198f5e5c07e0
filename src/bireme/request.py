"""Requests, and the contract between the engine and what executes its steps.

The engine sends a `ScheduledBatch` to every rank; the last stage's first rank answers with a
`StepOutput`. Both carry (incarnation, step_id); ranks execute strictly in step_id order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import msgspec

from bireme.sampling_params import SamplingParams

StepHeader = tuple[int, int]  # incarnation, step_id
MAX_PRIORITY = 10**6  # and as much below zero
WARM_UP_STEP = 0  # the ranks' own, when they start; those of requests come after it


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to continue, in ids. `eos_token_ids` is empty where they are to be ignored.

    `choice` numbers the continuations of one prompt. A lower `priority` is more urgent. Seconds are
    of the engine's clock; at `deadline_s` the request ends, whatever it waits for.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    choice: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None

    @property
    def max_len(self) -> int:
        """The longest length (tokens) that this request can reach."""
        return len(self.prompt_token_ids) + self.params.max_tokens

    @property
    def min_len(self) -> int:
        """The length (tokens) up to which nothing but that length may end it."""
        return len(self.prompt_token_ids) + self.params.min_tokens


class SamplingSetup(msgspec.Struct, frozen=True, array_like=True):
    """What the last stage must know to choose a request's tokens; temperature 0 is greedy.

    `stop_ids` may not be chosen below `min_len` tokens. `token_ids`, the prompt and what was
    generated before, come only where penalties or prompt logprobs need them; the first `num_prompt`
    are the prompt.
    """

    seed: int
    choice: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    min_len: int = 0
    stop_ids: list[int] = []
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    num_prompt: int = 0
    token_ids: list[int] = []

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )


class SlotSetup(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a slot: what the ranks must know of it for as long as it stays there."""

    slot: int
    max_len: int
    sampling: SamplingSetup


class ScheduledPiece(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, start + num_tokens) of one slot.

    `token_ids` None: the one token is the slot's last sampled id, which need not be known yet.
    `new_blocks` extend the slot's block table of each kind; empty: none of any kind. A first piece
    may start behind tokens that are cached already. `samples`: the piece's last token yields the
    slot's next id; `needs_mask`: only once the step's `StepMasks` have come.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: list[int] | None
    new_blocks: list[list[int]]
    samples: bool
    needs_mask: bool = False


def asked_rows(pieces: Sequence[ScheduledPiece]) -> list[int]:
    """Of a step's tokens those that anybody looks at behind the last layer: which yield a slot's next id, or, where
    none does, the last."""
    ends = list(accumulate(piece.num_tokens for piece in pieces))
    rows = [end - 1 for piece, end in zip(pieces, ends, strict=True) if piece.samples]
    return rows or [ends[-1] - 1]


def asked_tokens(pieces: Sequence[ScheduledPiece]) -> list[ScheduledPiece]:
    """The same tokens, each as a piece of its own."""
    return [
        ScheduledPiece(it.slot, it.start + it.num_tokens - 1, 1, None, [], samples=it.samples)
        for it in [piece for piece in pieces if piece.samples] or pieces[-1:]
    ]


class ScheduledBatch(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of many requests that go through all stages as one step."""

    incarnation: int
    step_id: int
    setups: list[SlotSetup]
    pieces: list[ScheduledPiece]

    @property
    def header(self) -> StepHeader:
        return self.incarnation, self.step_id

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def is_decode(self) -> bool:
        """True where every token is the last one that was sampled: none is of a prompt."""
        return all(piece.token_ids is None for piece in self.pieces)

    @property
    def sampling_slots(self) -> list[int]:
        return [piece.slot for piece in self.pieces if piece.samples]

    @property
    def masked_slots(self) -> list[int]:
        return [piece.slot for piece in self.pieces if piece.needs_mask]


class StepMasks(msgspec.Struct, frozen=True, array_like=True):
    """Which ids the masked slots of a step may be given: bit i % 8 of byte i // 8 allows id i.

    `masks[i]` is of slot `slots[i]`; ids behind its last byte are not allowed.
    """

    incarnation: int
    step_id: int
    slots: list[int]
    masks: list[bytes]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token's log-probability and its rank (1 is the likeliest), and the likeliest ids with theirs.

    Of the model's own logits: before temperature, penalties, biases and masks.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of the prompt tokens [start, start + len(tokens)) of a slot, each given those before it."""

    slot: int
    start: int
    tokens: list[TokenLogprobs]


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """`token_ids[i]` are the new tokens (0, 1 or more) of slot `slots[i]`.

    `logprobs` is empty where no slot asked for them; else `logprobs[i]` is of `token_ids[i]`, and
    empty for a slot that did not ask.
    """

    incarnation: int
    step_id: int
    slots: list[int]
    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs]] = []
    prompt_logprobs: list[PromptLogprobs] = []


class Executor(Protocol):
    """What runs scheduled batches: real workers, simulated devices, or a script."""

    @property
    def is_broken(self) -> bool:
        """True once it can neither submit nor collect any more."""
        ...

    def give_up(self) -> None:
        """Ends whatever runs the batches; what is in flight is lost."""
        ...

    def submit(self, batch: ScheduledBatch) -> None:
        """Starts a step; returns at once."""
        ...

    def give_masks(self, masks: StepMasks) -> None:
        """Lets the masked slots of a submitted step be sampled; returns at once."""
        ...

    def wait(self, wake: int) -> bool:
        """True once `collect` need not be waited for, False if the file descriptor `wake` becomes readable
        before; with nothing in flight, only that. Raises EngineError where `collect` would, and as soon
        as a rank is gone."""
        ...

    def collect(self) -> StepOutput:
        """The next step's output, in submission order. Raises EngineError when a rank failed."""
        ...
