"""A model in this program: `LLM(model).generate(prompts)`. Ranks are processes of their own."""

from __future__ import annotations

import inspect
import itertools
import secrets
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bireme.checkpoint.prepared import PreparedModel, prepare_model
from bireme.config import EngineConfig, ParallelConfig, check_settings
from bireme.engine.engine import Engine, TokenEvent
from bireme.engine.executor import WorkerExecutor
from bireme.engine.messages import Loaded
from bireme.engine.pool import WorkerPool
from bireme.engine.prepare import check_prompt, make_plan, resolve_auto_width
from bireme.engine.scheduler import Scheduler, SchedulerLimits
from bireme.errors import ConfigError, EngineError, RequestError
from bireme.request import (
    CompletionOutput,
    Request,
    RequestMetrics,
    RequestOutput,
)
from bireme.sampling_params import MAX_SEED, SamplingParams
from bireme.text.tokenizer import (
    IncrementalDecoder,
    Message,
    Tokenizer,
    check_text,
    has_tokenizer,
)
from bireme.trace import Span, chrome_trace

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of prompt `index`; `output` is set with its last piece."""

    index: int
    text: str
    token_ids: list[int]
    output: RequestOutput | None


@dataclass
class _Stream:
    """One prompt on its way."""

    index: int
    prompt: str | None
    request: Request
    decoder: IncrementalDecoder | None
    arrival_s: float = 0.0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None


class LLM:
    """A model cut over `tensor_parallel_size` x `pipeline_parallel_size` rank processes.

    A context manager: entering it (or the first use) starts the processes, leaving it ends them.
    `tensor_parallel_size` may be "auto" or one width a stage. Further keywords are the fields of
    `EngineConfig`. Making one raises UserError for what cannot work, before any process starts.

        with LLM("demo", tensor_parallel_size=2) as llm:
            print(llm.generate("The with statement")[0].outputs[0].text)
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
        check_settings(settings, LLM.__init__.__kwdefaults__ or ())
        config = EngineConfig(parallel=parallel, **settings)
        self.model: PreparedModel = prepare_model(
            str(model), needs_weights=config.load_format != "dummy"
        )
        self.config = resolve_auto_width(self.model, config) if is_auto else config
        self.plan = make_plan(self.model, self.config)
        self._tokenizer: Tokenizer | None = None
        self._own_pool = pool is None
        self._pool = pool or WorkerPool()
        self._executor: WorkerExecutor | None = None
        self._engine: Engine | None = None
        self._is_running = threading.Lock()
        self._held_stream: weakref.ref[Generator[Delta, None, None]] | None = None
        self._request_ids = itertools.count()

    def start(self) -> Engine:
        """Starts the ranks unless they run; RankError where one of them fails."""
        if self._executor is not None and self._executor.is_broken:
            raise EngineError("a rank of this model failed before; close it and make a new LLM")
        if self._engine is not None:
            return self._engine
        self._executor = WorkerExecutor(self.plan, self._pool)
        limits = SchedulerLimits(
            pp_size=self.config.parallel.pp_size,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            block_size=self.config.block_size,
        )
        scheduler = Scheduler(limits, self.plan.kinds)
        self._engine = Engine(scheduler, self._executor)
        return self._engine

    def __enter__(self) -> LLM:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the ranks (or gives them back to the pool that was passed in); a later use starts them
        again. A stream that is still held ends."""
        executor, self._executor, self._engine = self._executor, None, None
        if executor is not None and self._own_pool:
            executor.forget()
        elif executor is not None:
            executor.close()
        if self._own_pool:
            self._pool.close()
        held = self._held_stream() if self._held_stream is not None else None
        if held is not None and inspect.getgeneratorstate(held) != inspect.GEN_RUNNING:
            held.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """CheckpointError where the model has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.model.folder)
        return self._tokenizer

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

    @property
    def executor(self) -> WorkerExecutor:
        """The running ranks; EngineError before they started or after they ended."""
        if self._executor is None:
            raise EngineError("no rank is running; start the model first")
        return self._executor

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt (text, or token ids); outputs in the prompts' order."""
        outputs: dict[int, RequestOutput] = {}
        for delta in self.stream(prompts, sampling_params):
            if delta.output is not None:
                outputs[delta.index] = delta.output
        return [outputs[index] for index in sorted(outputs)]

    def chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Answers one conversation through the model's chat template."""
        return self.generate([self.chat_ids(messages)], sampling_params)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a conversation; the template writes the special tokens itself."""
        return self.tokenizer.encode(
            self.tokenizer.apply_chat_template(messages), add_special_tokens=False
        )

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Delta]:
        """Like `generate`, in pieces as they come. RequestError before anything runs."""
        listed = _as_prompts(prompts)
        params = _as_params(sampling_params, len(listed))
        opened = [
            self._open_stream(index, prompt, param)
            for index, (prompt, param) in enumerate(zip(listed, params, strict=True))
        ]
        stream = self._run({stream.request.request_id: stream for stream in opened})
        self._held_stream = weakref.ref(stream)
        return stream

    def _run(self, streams: dict[str, _Stream]) -> Generator[Delta, None, None]:
        """EngineError while another call's outputs are still being taken, by whatever thread."""
        if not self._is_running.acquire(blocking=False):
            raise EngineError(
                "another generate or stream of this LLM has not ended; take or close it first"
            )
        try:
            engine, now = self.start(), time.monotonic()
            for stream in streams.values():
                stream.arrival_s = now
            for event in engine.run([(stream.request, None) for stream in streams.values()]):
                yield _advance(streams[event.request_id], event)
        finally:
            self._is_running.release()

    def _open_stream(self, index: int, prompt: Prompt, params: SamplingParams) -> _Stream:
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            check_text(text, f"prompt {index}")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_prompt(self.plan, index, ids, params.max_tokens)
        seed = params.seed if params.seed is not None else secrets.randbelow(MAX_SEED)
        request = Request(
            request_id=str(next(self._request_ids)),
            prompt_token_ids=tuple(ids),
            params=params,
            seed=seed,
            eos_token_ids=frozenset() if params.ignore_eos else self.model.eos_token_ids,
        )
        return _Stream(
            index, text, request, self.tokenizer.decoder() if self.has_tokenizer else None
        )

    @property
    def has_tokenizer(self) -> bool:
        """Token ids work without any tokenizer file; texts of outputs are empty then."""
        return has_tokenizer(self.model.folder)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    no_prompt = (dict, bytes, bytearray)
    if not isinstance(prompts, Sequence) or any(
        isinstance(x, no_prompt) for x in (prompts, *prompts)
    ):
        raise RequestError("prompts are texts or lists of token ids, one or several")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(
        isinstance(param, SamplingParams) for param in params
    ):
        raise RequestError(
            f"sampling_params are {params!r:.60}; give a SamplingParams, or one a prompt"
        )
    if len(params) != count:
        raise RequestError(
            f"{len(params)} sampling_params for {count} prompts; give one, or one a prompt"
        )
    return list(params)


def _advance(stream: _Stream, event: TokenEvent) -> Delta:
    if stream.first_token_s is None:
        stream.first_token_s = event.time_s
    stream.token_ids.extend(event.token_ids)
    text = stream.decoder.add(event.token_ids) if stream.decoder else ""
    if event.finish_reason is not None and stream.decoder:
        text += stream.decoder.finish()
    stream.text += text
    output = _output(stream, event) if event.finish_reason is not None else None
    return Delta(stream.index, text, event.token_ids, output)


def _output(stream: _Stream, event: TokenEvent) -> RequestOutput:
    assert stream.first_token_s is not None
    metrics = RequestMetrics(
        ttft_s=stream.first_token_s - stream.arrival_s,
        e2e_s=event.time_s - stream.arrival_s,
        num_tokens=len(stream.token_ids),
    )
    completion = CompletionOutput(
        index=0,
        text=stream.text,
        token_ids=stream.token_ids,
        finish_reason=event.finish_reason,
        stop_reason=event.stop_reason,
    )
    return RequestOutput(
        request_id=event.request_id,
        prompt=stream.prompt,
        prompt_token_ids=list(stream.request.prompt_token_ids),
        outputs=[completion],
        finished=True,
        metrics=metrics,
    )
