"""What the engine's process does once it is told what to start: it runs the engine in its main thread.

Another thread reads what the front end says, and grammars are compiled in a third.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from bireme.engine.engine_loop import EngineCommand, run_engine
from bireme.engine.front_end import FrontEnd
from bireme.engine.garbage import old_objects_left_out
from bireme.engine.host import EngineHost
from bireme.engine.inbox import Inbox
from bireme.engine.input_processor import InputProcessor
from bireme.engine.service_messages import (
    Abort,
    Add,
    AskStats,
    Progress,
    Ready,
    Start,
    Stats,
    Stop,
    ToEngine,
)
from bireme.errors import RequestError, UserError
from bireme.request import Request


class Commands:
    """Takes what the front end asks for to the engine; a structured request once its grammar is
    compiled, unless it was aborted before. Requests come once `begin` was called."""

    def __init__(self, front_end: FrontEnd) -> None:
        self._front_end, self.inbox = front_end, Inbox[EngineCommand]()
        self._compiling: dict[str, Future[None]] = {}  # by request id
        self._lock = threading.Lock()
        self._grammars = ThreadPoolExecutor(1, "grammars")

    def begin(self, inputs: InputProcessor, ask: Callable[[], Stats]) -> None:
        self._inputs, self._ask = inputs, ask

    def follow(self) -> None:
        """Until the front end is gone: then this process ends, whatever it is at."""
        try:
            while True:
                self._take(self._front_end.hear())
        except EOFError:
            os._exit(0)
        except Exception as error:  # nothing more would be heard of aborts, or of the end
            self._front_end.fail(error)
            os._exit(1)

    def _take(self, command: ToEngine) -> None:
        match command:
            case Add(request) if request.params.structured_outputs is not None:
                with self._lock:
                    work = self._grammars.submit(self._compile, request)
                    self._compiling[request.request_id] = work
            case Add(request):
                self.inbox.put((request, None))
            case Abort(request_id):
                with self._lock:
                    if request_id in self._compiling:
                        self._compiling.pop(request_id).cancel()
                    self.inbox.put(request_id)
            case AskStats():
                self._front_end.say(self._ask())
            case Stop():
                self.inbox.put(None)
            case Start():
                raise AssertionError("an engine is started once")

    def _compile(self, request: Request) -> None:
        matcher, refusal = None, None
        try:
            matcher = self._inputs.matcher(request.params.structured_outputs)
        except UserError as error:
            refusal = error
        except BaseException as error:  # the library's panics are no Exceptions
            refusal = RequestError(f"the grammar cannot be compiled: {type(error).__name__}")
        with self._lock:
            if request.request_id not in self._compiling:
                return  # aborted
            del self._compiling[request.request_id]
            if refusal is None:
                self.inbox.put((request, matcher))
        if refusal is not None:
            self._front_end.refuse(request.request_id, refusal)


def _ready(host: EngineHost) -> Ready:
    model, budget, config = host.inputs.model, host.plan.budget, host.config
    return Ready(
        folder=str(model.folder),
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        most_requests=config.most_requests,
        most_tokens=config.most_tokens(model.max_model_len),
        num_cache_tokens=budget.num_tokens,
        max_concurrency=float(budget.num_requests),
        told=host.describe(),
        setup=host.setup(),
        rings=host.ring_places(),
        engine_ring=host.engine_ring,
    )


def serve(front_end: FrontEnd, start: Start) -> None:
    """Starts the engine that is asked for, and runs it until told to stop."""
    commands = Commands(front_end)
    threading.Thread(target=commands.follow, daemon=True).start()
    host = EngineHost.of(start.model, start.config, is_auto=start.is_auto)
    with closing(host):
        num_ranks = host.config.parallel.world_size
        front_end.say(Progress(f"starting {num_ranks} rank{'s' if num_ranks > 1 else ''}"))
        engine = host.start()
        commands.begin(host.inputs, host.stats)
        front_end.say(_ready(host))
        with old_objects_left_out():
            run_engine(engine, commands.inbox, front_end)
