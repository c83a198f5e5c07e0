"""What the scheduler knows of one request, from its arrival to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from bireme.request import PromptLogprobs, Request, SamplingSetup, SlotSetup, TokenLogprobs


@dataclass(slots=True, eq=False)
class RequestState:
    """A request from its arrival to its end. `token_ids` are the known ones, prompt first;
    `num_computed` tokens are in the cache or under way to it."""

    request: Request
    order: tuple[float, int]
    token_ids: list[int]
    slot: int | None = None
    group: int = 0
    num_given: int = (
        0  # tokens whose values are sent: the prompt, and what came before a preemption
    )
    num_computed: int = 0
    num_places: int = 0  # tokens that its blocks hold
    num_in_flight: int = 0  # ids that are being sampled
    last_step_id: int = -1
    is_leaving: bool = False  # gives its blocks back once its ids have come
    is_new: bool = True  # the ranks do not know it in its slot
    shared: list[list[int]] = field(default_factory=list)  # of its tables, before its first step
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached: int = 0  # tokens that were found in the cache when it began
    num_preemptions: int = 0
    scheduled_s: float | None = None  # of the engine's clock: when its first step was
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # a token, a stop string, or what went wrong
    last_decode: int = field(
        init=False
    )  # behind it nothing is computed: what it yields is the last
    least_len: int = field(init=False)  # tokens up to which no token ends it
    end_ids: frozenset[int] = field(init=False)
    needs_mask: bool = field(init=False)

    def __post_init__(self) -> None:
        request, params = self.request, self.request.params
        self.last_decode = request.max_len - 1
        self.least_len = request.min_len if params.min_tokens else 0
        self.end_ids = request.eos_token_ids | frozenset(params.stop_token_ids)
        self.needs_mask = params.structured_outputs is not None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Given tokens that are still to be computed, as far as is known."""
        return self.num_given - max(self.num_computed, self.num_cached)

    def append(self, token_id: int) -> None:
        """Takes a sampled id and sees whether it ends the request."""
        self.token_ids.append(token_id)
        length = len(self.token_ids)
        if token_id in self.end_ids and length > self.least_len:
            self.finish_reason = "stop"
            if token_id not in self.request.eos_token_ids:
                self.stop_reason = token_id
        elif length > self.last_decode:
            self.finish_reason = "length"

    def setup(self, slot: int) -> SlotSetup:
        """What the ranks must know of it in a slot."""
        request, params = self.request, self.request.params
        needs_ids = params.has_penalties or params.prompt_logprobs is not None
        sampling = SamplingSetup(
            seed=request.seed,
            choice=request.choice,
            temperature=0.0 if params.is_greedy else params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            logit_bias=list((params.logit_bias or {}).items()),
            min_len=self.least_len,
            stop_ids=sorted(self.end_ids) if params.min_tokens else [],
            num_logprobs=params.logprobs,
            num_prompt_logprobs=params.prompt_logprobs,
            num_prompt=self.num_prompt,
            token_ids=list(self.token_ids) if needs_ids else [],
        )
        return SlotSetup(slot, request.max_len, sampling)


@dataclass(slots=True)
class News:
    """What a step brought one request: new tokens, or log-probabilities of its prompt."""

    state: RequestState
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: PromptLogprobs | None = None
