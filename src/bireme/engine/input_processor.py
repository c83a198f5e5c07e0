"""From what a caller asks to requests: text, ids and parameters are checked here, without torch."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bireme.engine.engine import Matcher
from bireme.engine.streams import Opened, PromptStream
from bireme.errors import RequestError
from bireme.request import MAX_PRIORITY, Request
from bireme.sampling_params import MAX_SEED, SamplingParams, StructuredOutputsParams
from bireme.text.tokenizer import Message, Tokenizer, check_text, has_tokenizer

if TYPE_CHECKING:
    from bireme.text.grammar import GrammarCompiler

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class ServedModel:
    """What must be known of a running model to ask it something."""

    name: str
    folder: Path
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]


class InputProcessor:
    """Makes requests for one model; whatever cannot be served is refused here, before any rank.

    `makes_matchers` False leaves that to the engine's own process, which refuses grammars then.
    `chat_template` stands in for the model's own.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        makes_matchers: bool = True,
        chat_template: str | None = None,
    ) -> None:
        self.model = model
        self._makes_matchers, self._chat_template = makes_matchers, chat_template
        self._request_ids = itertools.count()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """CheckpointError where the model has none."""
        return Tokenizer(self.model.folder, self._chat_template)

    @cached_property
    def has_tokenizer(self) -> bool:
        """Token ids work without any tokenizer file; texts of outputs are empty then."""
        return has_tokenizer(self.model.folder)

    def chat_ids(self, messages: Sequence[Message], /, **variables: Any) -> list[int]:
        """The prompt of a conversation; the template writes the special tokens itself. `variables` as
        in `Tokenizer.apply_chat_template`."""
        text = self.tokenizer.apply_chat_template(messages, **variables)
        return self.encode(text, "the conversation", add_special_tokens=False)

    def encode(self, text: str, what: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt, which errors call `what`.

        RequestError for a text that the context could not hold however it is cut, before it is cut,
        which takes long.
        """
        check_text(text, what)
        most, longest = self.model.max_model_len, self.tokenizer.longest_token
        if len(text) > most * longest:
            raise RequestError(
                f"{what} has {len(text)} characters; the context holds {most} tokens, "
                f"of at most {longest} characters each"
            )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def open(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Opened:
        """Checks a prompt and what is asked of it; RequestError before it reaches the engine."""
        text = prompt if isinstance(prompt, str) else None
        where = f"prompt {index}"
        ids = self.encode(prompt, where) if isinstance(prompt, str) else list(prompt)
        check_prompt(self.model, index, ids, params.max_tokens)
        self._check_params(params)
        _check_handling(request_id, priority, timeout_s)
        own_id = str(next(self._request_ids))  # a caller may use a name again
        name = request_id if request_id is not None else own_id
        arrival_s = time.monotonic()
        first = Request(
            request_id=own_id,
            prompt_token_ids=tuple(ids),
            params=params,
            seed=params.seed if params.seed is not None else secrets.randbelow(MAX_SEED),
            eos_token_ids=frozenset() if params.ignore_eos else self.model.eos_token_ids,
            priority=priority,
            arrival_s=arrival_s,
            deadline_s=None if timeout_s is None else arrival_s + timeout_s,
        )
        tokenizer = self.tokenizer if self.has_tokenizer else None
        stream = PromptStream(index, name, text, ids, params, tokenizer, arrival_s)
        wanted = params.structured_outputs if self._makes_matchers else None
        return Opened([(choice, self.matcher(wanted)) for choice in _choices(first)], stream)

    def matcher(self, wanted: StructuredOutputsParams | None) -> Matcher | None:
        """RequestError for a schema or a grammar that is none."""
        if wanted is None:
            return None
        if not self.has_tokenizer:
            raise RequestError(f"{self.model.name} has no tokenizer, which structured outputs need")
        return self._grammars.matcher(wanted)

    def _check_params(self, params: SamplingParams) -> None:
        vocab = self.model.vocab_size
        for name in ("logit_bias", "stop_token_ids"):
            outside = [id_ for id_ in getattr(params, name) or () if not 0 <= id_ < vocab]
            if outside:
                raise RequestError(
                    f"{name} names the token id {outside[0]}; ids go from 0 to {vocab - 1}"
                )
        if params.stop_strings and not self.has_tokenizer:
            raise RequestError(
                f"{self.model.name} has no tokenizer, so no stop string is ever seen"
            )

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        from bireme.text.grammar import GrammarCompiler

        return GrammarCompiler(self.tokenizer, self.model.vocab_size, self.model.eos_token_ids)


def check_prompt(model: ServedModel, index: int, ids: Sequence[int], num_new: int) -> None:
    """RequestError unless prompt `index` is there, is of the vocabulary, and leaves room for
    `num_new` tokens."""
    vocab, longest = model.vocab_size, model.max_model_len
    if not ids:
        raise RequestError(f"prompt {index} is empty; give at least one token")
    bad = [id_ for id_ in ids if type(id_) is not int or not 0 <= id_ < vocab]
    if bad:
        raise RequestError(
            f"prompt {index} holds the token id {bad[0]}; ids go from 0 to {vocab - 1}"
        )
    if len(ids) >= longest:
        raise RequestError(
            f"prompt {index} has {len(ids)} tokens; the context holds {longest}, "
            f"so shorten it to at most {longest - 1}"
        )
    if len(ids) + num_new > longest:
        raise RequestError(
            f"prompt {index} has {len(ids)} tokens and asks for {num_new} more; the context holds "
            f"{longest}, so ask for at most {longest - len(ids)}"
        )


def _check_handling(request_id: str | None, priority: int, timeout_s: float | None) -> None:
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError(f"request_id={request_id!r:.60} must be a text")
    if type(priority) is not int or abs(priority) > MAX_PRIORITY:
        raise RequestError(
            f"priority={priority!r:.60} must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    if timeout_s is not None and (type(timeout_s) not in (int, float) or not timeout_s >= 0):
        raise RequestError(f"timeout_s={timeout_s!r:.60} must be a number of seconds, at least 0")


def _choices(first: Request) -> list[Request]:
    """One request a continuation; log-probabilities of the prompt come with the first alone."""
    if first.params.n == 1:
        return [first]
    others = dataclasses.replace(first.params, prompt_logprobs=None)
    return [
        dataclasses.replace(
            first,
            request_id=f"{first.request_id}.{choice}",
            choice=choice,
            params=others if choice else first.params,
        )
        for choice in range(first.params.n)
    ]
