"""From the engine's tokens to the caller's text: one stream a prompt, with all its continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bireme.engine.engine import Matcher, TokenEvent
from bireme.outputs import (
    CompletionOutput,
    Delta,
    Logprob,
    Logprobs,
    RequestMetrics,
    RequestOutput,
)
from bireme.request import Request, TokenLogprobs
from bireme.sampling_params import SamplingParams
from bireme.text.stop_strings import StopStrings
from bireme.text.tokenizer import IncrementalDecoder, Tokenizer


@dataclass(frozen=True)
class Opened:
    """A prompt that passed all checks: its requests, one a continuation, and its stream."""

    requests: list[tuple[Request, Matcher | None]]
    stream: PromptStream


class ChoiceStream:
    """One continuation on its way. A stop string ends it before the engine knows."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self._params = params
        self._has_stops = bool(params.stop_strings)
        self._decoder: IncrementalDecoder | None = tokenizer.decoder() if tokenizer else None
        self._stops = StopStrings(
            params.stop_strings, is_included=params.include_stop_str_in_output
        )
        self._name_token = _namer(tokenizer)
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, event: TokenEvent) -> tuple[str, list[int], list[Logprobs]]:
        """The text that these tokens settle, the tokens, and their log-probabilities."""
        before, text = len(self.token_ids), ""
        hidden = None if self._params.include_stop_str_in_output else event.stop_reason
        for index, token_id in enumerate(event.token_ids):
            self.token_ids.append(token_id)
            if event.logprobs:
                self.logprobs.append(as_logprobs(token_id, event.logprobs[index], self._name_token))
            decoder = None if token_id == hidden else self._decoder
            text += self._settled(decoder.add([token_id]) if decoder else "")
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and event.finish_reason is not None:
            text += self._settled(self._decoder.finish() if self._decoder else "")
            text += self._stops.finish()
            if self.finish_reason is None:
                self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        self.text += text
        return text, self.token_ids[before:], self.logprobs[before:]

    def _settled(self, text: str) -> str:
        if not self._has_stops:
            return text
        is_early = len(self.token_ids) <= self._params.min_tokens
        text = self._stops.add(text, is_ignored=is_early)
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        return text

    def output(self, index: int) -> CompletionOutput:
        has_logprobs = self._params.logprobs is not None
        likely = zip(self.token_ids, self.logprobs, strict=False)
        total = sum(found[token_id].logprob for token_id, found in likely)
        return CompletionOutput(
            index=index,
            text=self.text,
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=list(self.logprobs) if has_logprobs else None,
            cumulative_logprob=total if has_logprobs else None,
        )


class PromptStream:
    """One prompt on its way, with its continuations. Times are seconds of the engine's clock."""

    def __init__(
        self,
        index: int,
        request_id: str,
        prompt: str | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        arrival_s: float,
    ) -> None:
        self.index, self.request_id = index, request_id
        self._prompt, self._token_ids = prompt, token_ids
        self.arrival_s = arrival_s
        self._scheduled_s: float | None = None
        self._first_token_s: float | None = None
        self._last_s = arrival_s
        self._num_cached = 0
        self._name_token = _namer(tokenizer)
        self._choices = [ChoiceStream(params, tokenizer) for _ in range(params.n)]
        self._prompt_logprobs: list[Logprobs | None] | None = (
            None if params.prompt_logprobs is None else [None] * len(token_ids)
        )

    def begin(self, now_s: float) -> None:
        """Times count from here: the ranks run."""
        self.arrival_s = self._last_s = now_s

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def prompt(self) -> str | None:
        return self._prompt

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        return self._token_ids

    @property
    def prompt_logprobs(self) -> Sequence[Logprobs | None] | None:
        """Whole once the first continuation has a token; None where they were not asked for."""
        return self._prompt_logprobs

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, once there is a token."""
        return self._num_cached

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self._choices)

    def add(self, choice: int, event: TokenEvent) -> Delta | None:
        """What an event of a continuation brings; None for one that had ended."""
        stream = self._choices[choice]
        if stream.finish_reason is not None:
            return None
        self._note(event)
        text, token_ids, logprobs = stream.add(event)
        is_last = stream.finish_reason is not None and self.is_finished
        return Delta(
            self.index,
            text,
            token_ids,
            self.output() if is_last else None,
            choice,
            stream.finish_reason,
            stream.stop_reason,
            logprobs,
            event.time_s,
        )

    def _note(self, event: TokenEvent) -> None:
        self._last_s = event.time_s
        if self._scheduled_s is None:  # of its first continuation
            self._scheduled_s = event.scheduled_s
        if event.token_ids and self._first_token_s is None:
            self._first_token_s, self._num_cached = event.time_s, event.num_cached_tokens
        found = event.prompt_logprobs
        if found is not None and self._prompt_logprobs is not None:
            for position, likely in enumerate(found.tokens, found.start):
                token_id = self._token_ids[position]
                self._prompt_logprobs[position] = as_logprobs(token_id, likely, self._name_token)

    def output(self) -> RequestOutput:
        """All so far."""
        first, scheduled = self._first_token_s, self._scheduled_s
        metrics = RequestMetrics(
            ttft_s=(self._last_s if first is None else first) - self.arrival_s,
            e2e_s=self._last_s - self.arrival_s,
            num_tokens=sum(len(choice.token_ids) for choice in self._choices),
            queue_s=max(0.0, (self._last_s if scheduled is None else scheduled) - self.arrival_s),
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(self._token_ids),
            outputs=[choice.output(index) for index, choice in enumerate(self._choices)],
            finished=self.is_finished,
            metrics=metrics,
            prompt_logprobs=None if self._prompt_logprobs is None else [*self._prompt_logprobs],
            num_cached_tokens=self._num_cached,
        )


def _namer(tokenizer: Tokenizer | None) -> Callable[[int], str | None]:
    return tokenizer.name_of if tokenizer else lambda _: None


def as_logprobs(
    token_id: int, found: TokenLogprobs, name_token: Callable[[int], str | None]
) -> Logprobs:
    """The chosen token first, then the likeliest in their order."""
    logprobs = {token_id: Logprob(found.logprob, found.rank, name_token(token_id))}
    ranked = zip(found.top_ids, found.top_logprobs, strict=True)
    for rank, (other, logprob) in enumerate(ranked, 1):
        logprobs.setdefault(other, Logprob(logprob, rank, name_token(other)))
    return logprobs
