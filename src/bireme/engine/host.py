"""A model made ready in this program: its plan, its ranks, its engine, and the way in for prompts."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.config import EngineConfig, ParallelConfig, check_settings
from bireme.engine.engine import Engine, Matcher
from bireme.engine.executor import WorkerExecutor
from bireme.engine.messages import Loaded
from bireme.engine.pool import WorkerPool
from bireme.engine.prepare import (
    check_prompt,
    make_plan,
    resolve_auto_width,
    scheduler_limits,
)
from bireme.engine.scheduler import Scheduler
from bireme.engine.streams import Opened, PromptStream
from bireme.errors import ConfigError, EngineError, RequestError
from bireme.request import Request
from bireme.sampling_params import MAX_SEED, SamplingParams
from bireme.text.tokenizer import Message, Tokenizer, check_text, has_tokenizer
from bireme.trace import Span, chrome_trace

if TYPE_CHECKING:
    from bireme.text.grammar import GrammarCompiler

Prompt = str | Sequence[int]
_LARGEST_PRIORITY = 10**6


class EngineHost:
    """Base of `LLM` and `AsyncLLM`: everything but how outputs are handed over.

    Making one raises UserError for what cannot work, before any process starts.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tensor_parallel_size: int | Sequence[int] | str = 1,
        pipeline_parallel_size: int | None = None,
        layers_per_stage: Sequence[int] | None = None,
        pool: WorkerPool | None = None,
        **settings: Any,
    ) -> None:
        is_auto = tensor_parallel_size == "auto"
        if isinstance(tensor_parallel_size, str) and not is_auto:
            raise ConfigError(
                f"tensor_parallel_size {tensor_parallel_size!r} is neither a number nor 'auto'"
            )
        widths = 1 if isinstance(tensor_parallel_size, str) else tensor_parallel_size
        parallel = ParallelConfig.of(
            tuple(widths) if isinstance(widths, Sequence) else widths,
            pipeline_parallel_size,
            tuple(layers_per_stage) if layers_per_stage is not None else None,
        )
        check_settings(settings, EngineHost.__init__.__kwdefaults__ or ())
        config = EngineConfig(parallel=parallel, **settings)
        self.model: PreparedModel = prepare_model(
            str(model), needs_weights=config.load_format != "dummy"
        )
        self.config = resolve_auto_width(self.model, config) if is_auto else config
        self.plan = make_plan(self.model, self.config)
        self._own_pool = pool is None
        self._pool = pool or WorkerPool()
        self._executor: WorkerExecutor | None = None
        self._engine: Engine | None = None
        self._request_ids = itertools.count()

    def start(self) -> Engine:
        """Starts the ranks unless they run; RankError where one of them fails."""
        if self._executor is not None and self._executor.is_broken:
            raise EngineError("a rank of this model failed before; close it and make a new LLM")
        if self._engine is None:
            self._executor = WorkerExecutor(self.plan, self._pool)
            limits = scheduler_limits(self.model.config, self.config)
            self._engine = Engine(Scheduler(limits, self.plan.kinds), self._executor)
        return self._engine

    def close(self) -> None:
        """Ends the ranks, or gives them back to the pool that was passed in; a later use starts them
        again."""
        executor, self._executor, self._engine = self._executor, None, None
        if executor is not None and self._own_pool:
            executor.forget()
        elif executor is not None:
            executor.close()
        if self._own_pool:
            self._pool.close()

    @property
    def executor(self) -> WorkerExecutor:
        """The running ranks; EngineError before they started or after they ended."""
        if self._executor is None:
            raise EngineError("no rank is running; start the model first")
        return self._executor

    @property
    def loaded(self) -> list[Loaded]:
        """What each rank holds and read, in bytes."""
        return self.executor.loaded

    def spans(self) -> dict[str, list[Span]]:
        """The newest spans of every rank."""
        return self.executor.spans()

    def write_trace(self, path: str | Path) -> None:
        """A Chrome/Perfetto trace of the newest spans, a track a rank."""
        Path(path).write_bytes(msgspec.json.encode(chrome_trace(self.spans())))

    # --- text ----------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """CheckpointError where the model has none."""
        return Tokenizer(self.model.folder)

    @property
    def has_tokenizer(self) -> bool:
        """Token ids work without any tokenizer file; texts of outputs are empty then."""
        return has_tokenizer(self.model.folder)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a conversation; the template writes the special tokens itself."""
        return self.tokenizer.encode(
            self.tokenizer.apply_chat_template(messages), add_special_tokens=False
        )

    # --- the way in ----------------------------------------------------------------------------

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
        if text is not None:
            check_text(text, f"prompt {index}")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_prompt(self.plan, index, ids, params.max_tokens)
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
        return Opened([(choice, self._matcher(params)) for choice in _choices(first)], stream)

    def _check_params(self, params: SamplingParams) -> None:
        vocab = self.plan.model.vocab_size
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

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.structured_outputs is None:
            return None
        if not self.has_tokenizer:
            raise RequestError(f"{self.model.name} has no tokenizer, which structured outputs need")
        return self._grammars.matcher(params.structured_outputs)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        from bireme.text.grammar import GrammarCompiler

        eos = self.model.eos_token_ids
        return GrammarCompiler(self.tokenizer, self.plan.model.vocab_size, eos)


def _check_handling(request_id: str | None, priority: int, timeout_s: float | None) -> None:
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError(f"request_id={request_id!r:.60} must be a text")
    if type(priority) is not int or abs(priority) > _LARGEST_PRIORITY:
        raise RequestError(
            f"priority={priority!r:.60} must be a whole number from -{_LARGEST_PRIORITY} to {_LARGEST_PRIORITY}"
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
