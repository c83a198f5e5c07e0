"""A front end's engine: in a process of its own, with the same callers as `AsyncLLM`.

The process is started at once; `ready` says when it can be asked. It ends with this one, however this
one ends, for its socket closes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

import bireme
from bireme.config import EngineConfig
from bireme.engine.callers import Callers
from bireme.engine.engine_loop import EngineCommand
from bireme.engine.input_processor import InputProcessor, ServedModel
from bireme.engine.service_messages import (
    Abort,
    Add,
    AskStats,
    Broken,
    Events,
    FromEngine,
    Progress,
    Ready,
    Refused,
    Start,
    Stats,
    Stop,
    ToEngine,
)
from bireme.errors import EngineError

_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_LENGTH = struct.Struct("<I")
_EXIT_S = 10.0
_BROKEN_S = 2.0
_HURRY_S = 1.0
_MOST_MISSED = 3


class EngineProcess:
    """The process, before there is a loop: so that it starts while the front end imports its own.

    `program` is what Python runs there; it is given the number of a socket, as `service.main` is.
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        *,
        is_auto: bool = False,
        program: Sequence[str] = ("-m", "bireme.engine.service"),
    ) -> None:
        self.sock, theirs = socket.socketpair()
        package_root = str(Path(bireme.__file__).parent.parent)
        path = os.environ.get("PYTHONPATH")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *program, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": package_root + (os.pathsep + path if path else ""),
                },
            )
        finally:
            theirs.close()
        self.model = model
        self.sock.sendall(_framed(Start(model, config, is_auto)))

    def close(self, grace_s: float = _EXIT_S) -> None:
        """Ends it and its ranks, by force where it takes too long."""
        self.sock.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _framed(message: ToEngine) -> bytes:
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class EngineClient:
    """The engine as callers on one loop see it. `doing` says what it is at before it is ready.

    The process is asked every `ask_s` seconds whether it is there.
    """

    def __init__(
        self, process: EngineProcess, chat_template: str | None = None, *, ask_s: float = 5.0
    ) -> None:
        self._process, self._chat_template, self._ask_s = process, chat_template, ask_s
        self.callers = Callers()
        self.doing = "starting"
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._stats: asyncio.Future[Stats] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def begin(self) -> None:
        """Listens from here on."""
        reader, self._writer = await asyncio.open_connection(sock=self._process.sock)
        self._listening = asyncio.create_task(self._listen(reader))

    async def aclose(self) -> None:
        """Ends what runs, then the ranks."""
        is_broken = self.doing == "broken"
        self.callers.fail(EngineError("the engine was closed"))
        self._say(Stop())
        if not is_broken:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.process.wait, _EXIT_S)
        for task in (self._listening, self._watching):
            if task is not None:
                task.cancel()
        if self._writer is not None:
            self._writer.close()
        await asyncio.to_thread(self._process.close, _BROKEN_S if is_broken else _EXIT_S)

    def hurry(self) -> None:
        """Gives the engine a second to end, whatever it is at."""
        if self._writer is not None:
            self._writer.close()
        asyncio.get_running_loop().call_later(_HURRY_S, self._process.process.kill)

    async def stats(self) -> Stats:
        """EngineError where the engine is gone."""
        if self.callers.error is not None:
            raise self.callers.error
        if self._stats is None:
            self._stats = asyncio.get_running_loop().create_future()
            self._say(AskStats())
        return await asyncio.shield(self._stats)

    def _say(self, message: ToEngine) -> None:
        frame = _framed(message)
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame)

    def _send(self, command: EngineCommand) -> None:
        match command:
            case None:
                self._say(Stop())
            case str(request_id):
                self._say(Abort(request_id))
            case (request, _):
                self._say(Add(request))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                self._take(_FROM_ENGINE.decode(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await asyncio.to_thread(self._process.process.wait)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            self._fail(EngineError(f"the engine's process {how}"))
        except Exception as error:
            self._fail(EngineError(f"what the engine says cannot be understood: {error}"))

    def _take(self, message: FromEngine) -> None:
        match message:
            case Events(events):
                self.callers.deliver(events)
            case Progress(doing):
                self.doing = doing
            case Ready():
                self._begin(message)
            case Stats():
                if self._stats is not None:
                    self._stats.set_result(message)
                    self._stats = None
            case Refused(request_id, told):
                self.callers.refuse(request_id, told.error)
            case Broken(told):
                self._fail(told.error)

    def _begin(self, ready: Ready) -> None:
        model = ServedModel(
            self._process.model,
            Path(ready.folder),
            ready.vocab_size,
            ready.max_model_len,
            ready.eos_token_ids,
        )
        self.inputs = InputProcessor(model, makes_matchers=False, chat_template=self._chat_template)
        self.callers.begin(self.inputs, self._send, ready.most_requests, ready.most_tokens)
        self.doing = "ready"
        self.ready.set_result(ready)
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Fails what waits for a process that is stopped, or hangs; time in which this one was stopped
        itself counts as one miss."""
        num_missed = 0
        while self.callers.error is None:
            try:
                await asyncio.wait_for(self.stats(), self._ask_s)
            except TimeoutError:
                num_missed += 1
                if num_missed == _MOST_MISSED:
                    silence_s = num_missed * self._ask_s
                    self._fail(
                        EngineError(f"the engine's process has not answered for {silence_s:g} s")
                    )
            except EngineError:
                return
            else:
                num_missed = 0
                await asyncio.sleep(self._ask_s)

    def _fail(self, error: Exception) -> None:
        """The first cause counts."""
        if self.doing == "broken":
            return
        self.doing = "broken"
        self.callers.fail(error)
        for waited in (self.ready, self._stats):
            if waited is not None and not waited.done():
                waited.set_exception(error)
