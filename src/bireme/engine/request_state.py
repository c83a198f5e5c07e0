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
    needs_mask: bool = False
    stop_ids: frozenset[int] = frozenset()
    shared: list[list[int]] = field(default_factory=list)  # of its tables, before its first step
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached: int = 0  # tokens that were found in the cache when it began
    num_preemptions: int = 0
    scheduled_s: float | None = None  # of the engine's clock: when its first step was
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # a token, a stop string, or what went wrong

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def last_decode(self) -> int:
        """The token behind which nothing more is computed: the one it yields is the last."""
        return self.request.max_len - 1

    def append(self, token_id: int) -> None:
        """Takes a sampled id and sees whether it ends the request."""
        self.token_ids.append(token_id)
        request = self.request
        length = len(self.token_ids)
        if length > request.min_len or not request.params.min_tokens:
            if token_id in request.eos_token_ids:
                self.finish_reason = "stop"
                return
            if token_id in self.stop_ids:
                self.finish_reason, self.stop_reason = "stop", token_id
                return
        if length >= request.max_len:
            self.finish_reason = "length"

    def setup(self, slot: int) -> SlotSetup:
        """What the ranks must know of it in a slot."""
        request, params = self.request, self.request.params
        needs_ids = params.has_penalties or params.prompt_logprobs is not None
        stop_ids = sorted(request.eos_token_ids | set(params.stop_token_ids))
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
            min_len=request.min_len if params.min_tokens else 0,
            stop_ids=stop_ids if params.min_tokens else [],
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
