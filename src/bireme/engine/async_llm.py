"""A model for programs on asyncio: `async for output in llm.generate(...)`. The same engine as `LLM`,
in a thread of its own, for any number of callers at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from bireme.engine.callers import Callers
from bireme.engine.engine import Engine, TokenEvent
from bireme.engine.engine_loop import EngineCommand, run_engine
from bireme.engine.host import EngineHost
from bireme.engine.inbox import Inbox
from bireme.engine.input_processor import Prompt
from bireme.errors import EngineError, UserError
from bireme.outputs import Delta, RequestOutput
from bireme.sampling_params import SamplingParams


class _ToLoop:
    """Takes what the engine's thread says to the callers' loop."""

    def __init__(self, callers: Callers, loop: asyncio.AbstractEventLoop) -> None:
        self._callers, self._loop = callers, loop

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(call, *args)

    def deliver(self, events: list[TokenEvent]) -> None:
        self._tell(self._callers.deliver, events)

    def refuse(self, request_id: str, error: UserError) -> None:
        self._tell(self._callers.refuse, request_id, error)

    def fail(self, error: Exception) -> None:
        self._tell(self._callers.fail, error)


class AsyncLLM(EngineHost):
    """`LLM` on asyncio; settings as there. `async with` starts the ranks and ends them.

        async with AsyncLLM("demo") as llm:
            async for output in llm.generate("The with statement", SamplingParams(max_tokens=8)):
                print(output.outputs[0].text)

    Where a rank fails, every caller gets the same RankError.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._callers = Callers()
        self._callers.fail(EngineError("the engine does not run; enter the AsyncLLM first"))
        self._starting = asyncio.Lock()
        self._inbox = Inbox[EngineCommand]()
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> AsyncLLM:
        await self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def begin(self) -> None:
        """Starts the ranks and the engine's thread, unless they run."""
        async with self._starting:
            if self._thread is not None:
                return
            engine: Engine = await asyncio.to_thread(self.start)
            self._inbox = Inbox[EngineCommand]()
            outbox = _ToLoop(self._callers, asyncio.get_running_loop())
            self._thread = threading.Thread(
                target=run_engine, args=(engine, self._inbox, outbox), daemon=True
            )
            self._thread.start()
            self._callers.begin(
                self.inputs,
                self._inbox.put,
                self.config.most_requests,
                self.config.most_tokens(self.plan.max_model_len),
            )

    async def aclose(self) -> None:
        """Ends what runs, then the ranks."""
        async with self._starting:
            self._callers.fail(EngineError("the engine was closed"))
            thread, self._thread = self._thread, None
            if thread is not None:
                self._inbox.put(None)
                await asyncio.to_thread(thread.join)
            await asyncio.to_thread(self.close)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """All of the answer so far, whenever there is more; the last is `finished`.

        A caller that leaves ends its request. RequestError, or CapacityError where the queue is full.
        """
        return self._callers.generate(
            prompt, sampling_params, request_id, priority=priority, timeout_s=timeout_s
        )

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Delta]:
        """Like `generate`, in pieces as they come."""
        return self._callers.stream(
            prompt, sampling_params, request_id, priority=priority, timeout_s=timeout_s
        )

    async def abort(self, request_id: str) -> None:
        """Ends a request, whoever takes its outputs; they get its last one. Unknown ids are ended
        already."""
        self._callers.abort(request_id)
