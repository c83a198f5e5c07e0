"""One rank's process: `python -m bireme.engine.worker SOCKET_FD SPANS_FD`.

The main thread executes commands in their order. It takes them from its world's step channel, or,
while it is in none, from the socket, which a second thread reads. When the driver is gone that one
ends the process at once, whatever the main thread waits for, so that no rank outlives its driver.
A worker can leave one world and join the next.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.loader import load_parameters, torch_dtype
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.reader import TensorSource
from bireme.engine.capture import StepCapture
from bireme.engine.channel import Steps, StepSource, open_source
from bireme.engine.messages import (
    Capture,
    Command,
    CommandReader,
    Done,
    Execute,
    Failed,
    Join,
    Leave,
    Load,
    Loaded,
    Masks,
    Output,
    Reply,
    Result,
    Task,
    decode,
    send,
)
from bireme.engine.model_runner import ModelRunner
from bireme.engine.slots import CacheShape
from bireme.errors import EngineError, PeerLost, UserError
from bireme.models.blocks import StageModel
from bireme.models.registry import build_stage
from bireme.parallel.collectives import Communicator, join
from bireme.parallel.layers import materialise, named_layouts, pack_weights
from bireme.parallel.pipeline import stage_specs
from bireme.request import StepHeader, StepMasks
from bireme.trace import SpanKind, SpanRing


class Commands:
    """What the driver asked for, in its order; a step's masks can be taken out of turn."""

    def __init__(self) -> None:
        self._read: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._steps: StepSource | None = None
        self._set_aside: deque[Command] = deque()
        self._early: dict[StepHeader, StepMasks] = {}
        self.put = self._read.put  # what came over the socket

    def follow(self, steps: StepSource | None) -> None:
        """From here on commands come over `steps`; None: over the socket."""
        if self._steps is not None:
            self._steps.close()
        self._steps = steps

    def next(self) -> Command:
        if self._set_aside:
            return self._set_aside.popleft()
        if self._steps is None:
            return self._read.get()
        body = self._steps.receive()
        assert body is not None
        return decode(body)

    def await_masks(self, header: StepHeader, timeout_s: float) -> StepMasks:
        """The masks of a step; PeerLost where they do not come in time."""
        assert self._steps is not None
        deadline = time.monotonic() + timeout_s
        while header not in self._early:
            body = self._steps.receive(max(1e-3, deadline - time.monotonic()))
            if body is None:
                raise PeerLost(f"the masks of step {header[1]} did not come in time")
            command = decode(body)
            if isinstance(command, Masks):
                masks = command.masks
                self._early[masks.incarnation, masks.step_id] = masks
            else:
                self._set_aside.append(command)
        found = self._early[header]
        self._early = {key: masks for key, masks in self._early.items() if key > header}
        return found


class Worker:
    """State of one rank between commands. Programs of floors above add what they do for a Task."""

    def __init__(self, spans: SpanRing, commands: Commands) -> None:
        self._spans, self._commands = spans, commands
        self._comm: Communicator | None = None
        self._runner: ModelRunner | None = None
        self._device = torch.device("cpu")
        self._timeout_s = 0.0

    def handle(self, command: Command) -> Reply | None:
        """Executes one command; None where this rank has nothing to say."""
        match command:
            case Join():
                return self._join(command)
            case Load():
                return self._load(command)
            case Execute(batch):
                output = self._ready().execute(batch)
                return None if output is None else Output(output)
            case Masks():  # of a step that masked nothing here, or failed
                return None
            case Capture(folder, probes):
                return self._capture(folder, probes)
            case Task(body):
                return self.perform(body)
            case Leave():
                self.leave()
                return Done()

    def perform(self, body: bytes) -> Result | None:
        raise EngineError("this program knows no tasks")

    def leave(self) -> None:
        """Gives the groups, the model and its memory back; commands come over the socket again."""
        self._commands.follow(None)
        runner, comm = self._runner, self._comm
        self._runner = self._comm = None
        if runner is not None:
            runner.drain()
        if comm is not None:
            comm.leave()

    def abandon(self) -> None:
        """Leaves without waiting for anybody: after a failure."""
        comm, self._runner, self._comm = self._comm, None, None
        if comm is not None:
            comm.leave()

    def _ready(self) -> ModelRunner:
        if self._runner is None:
            raise EngineError("a step came before a model was loaded")
        return self._runner

    def _join(self, command: Join) -> Done:
        torch.set_num_threads(command.num_threads)
        self._device = torch.device(command.device)
        self._comm = join(
            command.widths,
            command.rank,
            Path(command.store_path) if command.segment else _held_open(command.store_path),
            self._device,
            command.timeout_s,
            self._spans,
            command.segment,
        )
        self._commands.follow(open_source(command.steps, command.rank))
        return Done()

    def _load(self, command: Load) -> Loaded:
        if self._comm is None:
            raise EngineError("a model came before a world was joined")
        start = time.monotonic()
        mesh, dtype = self._comm.mesh, torch_dtype(command.dtype)
        spec = stage_specs(command.layers_per_stage, command.model.num_layers)[mesh.stage]
        with torch.device("meta"):
            model = build_stage(command.model, mesh, spec)
        materialise(model, dtype, self._device)
        source = _open_source(command, model, mesh.rank)
        with self._spans.span(SpanKind.LOAD):
            needed_bytes = load_parameters(model, source, command.names)
            if not command.config.deterministic:
                pack_weights(model)
        config = command.config
        cache = CacheShape(
            command.kinds, config.block_size, config.max_num_seqs, command.max_model_len
        )
        self._runner = ModelRunner(
            command.model, model, self._comm, cache, config.workspace_bytes, self._device, dtype,
            self._spans, lambda header: self._commands.await_masks(header, config.step_timeout_s),
        )  # fmt: skip
        if config.deterministic:
            self._runner.make_deterministic()
        read = source.stats if isinstance(source, Artifact) else None
        self._spans.set_step(0, 0)  # not begun: what the ring says of an earlier world is over
        return Loaded(
            weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            cache_bytes=self._runner.cache_bytes,
            needed_bytes=needed_bytes,
            fetched_bytes=read.fetched if read else needed_bytes,
            verified_bytes=read.verified if read else 0,
            seconds=time.monotonic() - start,
        )

    def _capture(self, folder: str | None, probes: bool) -> Done:
        runner, comm = self._ready(), self._comm
        assert comm is not None
        if runner.capture is not None:
            runner.capture.close()
        runner.capture = (
            StepCapture(Path(folder), comm.mesh.rank, runner.model, probes=probes)
            if folder
            else None
        )
        return Done()


def _held_open(store_path: str) -> Path:
    """The same file, for as long as this process lives. torch opens it anew each time, at last when the
    groups of a world that was left are collected; where it is gone, with the driver, torch waits for
    minutes and lets no other thread run, and where it is another world's, for ever."""
    fd = os.open(store_path, os.O_RDWR | os.O_CLOEXEC)
    return Path(f"/proc/self/fd/{fd}")


def _open_source(command: Load, model: StageModel, rank: int) -> TensorSource:
    if command.folder is not None:
        return open_folder(Path(command.folder), rank)
    sources = {
        piece.source.name: piece.source
        for *_, layout in named_layouts(model)
        for piece in layout.pieces
    }
    return DummySource(sources, command.config.seed)


def _failure(error: BaseException) -> Failed:
    return Failed(
        cause=f"{type(error).__name__}: {error}",
        traceback=traceback.format_exc(),
        is_user_error=isinstance(error, UserError),
        is_secondary=isinstance(error, PeerLost),
    )


def _read_commands(sock: socket.socket, commands: Commands) -> None:
    """The lifeline: when the driver's end closes, this process ends at once, and leaves no file that the
    driver would have removed."""
    reader, steps = CommandReader(sock), list[Steps]()
    try:
        while True:
            command = reader.next()
            if isinstance(command, Join):
                steps = [command.steps]
            commands.put(command)
    except EOFError:
        for one in steps:
            one.remove()
        os._exit(0)
    except Exception as error:
        _end(sock, error)


def _answer(sock: socket.socket, reply: Reply) -> None:
    with suppress(ConnectionError):  # the driver is gone: `_read_commands` ends this process
        send(sock, reply)


def _end(sock: socket.socket, error: Exception) -> NoReturn:
    """Of a rank that cannot read what it is told."""
    _answer(sock, _failure(error))
    os._exit(1)


def main(program: type[Worker] = Worker) -> None:
    """Serves commands until the driver closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every context length
    sock = socket.socket(fileno=int(sys.argv[1]))
    commands = Commands()
    worker = program(SpanRing(int(sys.argv[2])), commands)
    threading.Thread(target=_read_commands, args=(sock, commands), daemon=True).start()
    while True:
        try:
            command = commands.next()
        except Exception as error:
            _end(sock, error)
        try:
            reply = worker.handle(command)
        except Exception as error:  # every failure becomes a message to the driver
            reply = _failure(error)
            worker.abandon()
        if reply is not None:
            _answer(sock, reply)


if __name__ == "__main__":
    main()
