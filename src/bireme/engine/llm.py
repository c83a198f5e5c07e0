"""A model in this program: `LLM(model).generate(prompts)`. Ranks are processes of their own."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from bireme.engine.host import EngineHost
from bireme.engine.input_processor import Prompt
from bireme.engine.streams import Opened
from bireme.errors import EngineError, RequestError
from bireme.outputs import Delta, RequestOutput
from bireme.sampling_params import SamplingParams
from bireme.text.tokenizer import Message


class LLM(EngineHost):
    """A model cut over `tensor_parallel_size` x `pipeline_parallel_size` rank processes.

    A context manager: entering it (or the first use) gives the processes their model, leaving it ends them.
    `tensor_parallel_size` may be "auto" or one width a stage. Further keywords are the fields of
    `EngineConfig`. Making one raises UserError for what cannot work.

        with LLM("demo", tensor_parallel_size=2) as llm:
            print(llm.generate("The with statement")[0].outputs[0].text)
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._is_running = threading.Lock()
        self._held_stream: weakref.ref[Generator[Delta, None, None]] | None = None

    def __enter__(self) -> LLM:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the ranks (or gives them back to the pool that was passed in); a later use starts them
        again. A stream that is still held ends."""
        super().close()
        held = self._held_stream() if self._held_stream is not None else None
        if held is not None and inspect.getgeneratorstate(held) != inspect.GEN_RUNNING:
            held.close()

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
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several, through the model's chat template."""
        several = [messages] if messages and isinstance(messages[0], dict) else messages
        return self.generate([self.chat_ids(one) for one in several], sampling_params)  # type: ignore[arg-type]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Delta]:
        """Like `generate`, in pieces as they come. RequestError before anything runs."""
        listed = _as_prompts(prompts)
        params = _as_params(sampling_params, len(listed))
        opened = [
            self.inputs.open(index, prompt, param)
            for index, (prompt, param) in enumerate(zip(listed, params, strict=True))
        ]
        stream = self._run(opened)
        self._held_stream = weakref.ref(stream)
        return stream

    def _run(self, opened: list[Opened]) -> Generator[Delta, None, None]:
        """EngineError while another call's outputs are still being taken, by whatever thread."""
        if not self._is_running.acquire(blocking=False):
            raise EngineError(
                "another generate or stream of this LLM has not ended; take or close it first"
            )
        streams = {
            request.request_id: (one.stream, request.choice)
            for one in opened
            for request, _ in one.requests
        }
        try:
            engine = self.start()
            for one in opened:
                one.stream.begin(engine.clock())
            for event in engine.run(pair for one in opened for pair in one.requests):
                stream, choice = streams[event.request_id]
                delta = stream.add(choice, event)
                if delta is None:
                    continue
                if delta.finish_reason is not None and event.finish_reason is None:
                    engine.abort(event.request_id)  # a stop string was found
                yield delta
        finally:
            self._is_running.release()


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
