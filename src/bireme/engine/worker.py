"""A rank of a language model: `python -m bireme.engine.worker SOCKET_FD SPANS_FD`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from bireme.checkpoint.artifact import Artifact
from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.loader import load_parameters, torch_dtype
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.reader import TensorSource
from bireme.engine import rank
from bireme.engine.capture import StepCapture
from bireme.engine.messages import (
    LANGUAGE_MODEL,
    BeginProfile,
    Capture,
    Done,
    EndProfile,
    Execute,
    Load,
    Loaded,
    Masks,
    Output,
    Profiled,
    RankUsage,
    ReadUsage,
)
from bireme.engine.model_runner import ModelRunner
from bireme.engine.rank_memory import reset_peak, usage
from bireme.engine.rank_profile import RankProfile
from bireme.engine.sampling.answer import Answer
from bireme.engine.slots import CacheShape
from bireme.errors import EngineError, PeerLost
from bireme.kernels.cpu.library import library
from bireme.models.blocks import StageModel
from bireme.models.registry import build_stage
from bireme.parallel.layers import materialise, named_layouts, pack_weights
from bireme.parallel.pipeline import stage_specs
from bireme.request import ScheduledBatch, StepHeader, StepMasks
from bireme.trace import SpanKind, SpanRing

_MOST_READERS = 8  # threads that read weights at once
_ANSWER_LOOK_S = 2e-5  # what a step's ids may lie there at most


class Commands(rank.Commands):
    """The same; a step's masks can be taken out of turn."""

    def __init__(self) -> None:
        super().__init__(LANGUAGE_MODEL)
        self._set_aside: deque[msgspec.Struct] = deque()
        self._early: dict[StepHeader, StepMasks] = {}

    def next(self) -> msgspec.Struct:
        return self._set_aside.popleft() if self._set_aside else super().next()

    def await_masks(self, header: StepHeader, timeout_s: float) -> StepMasks:
        """The masks of a step; PeerLost where they do not come in time."""
        assert self._steps is not None
        deadline = time.monotonic() + timeout_s
        while header not in self._early:
            body = self._steps.receive(max(1e-3, deadline - time.monotonic()))
            if body is None:
                raise PeerLost(f"the masks of step {header[1]} did not come in time")
            command = self._decode(body)
            if isinstance(command, Masks):
                masks = command.masks
                self._early[masks.incarnation, masks.step_id] = masks
            else:
                self._set_aside.append(command)
        found = self._early[header]
        self._early = {key: masks for key, masks in self._early.items() if key > header}
        return found


class Worker(rank.Rank[Commands]):
    """A stage of a model, or a rank's part of it."""

    def __init__(
        self, spans: SpanRing, commands: Commands, answer: Callable[[msgspec.Struct], None]
    ) -> None:
        super().__init__(spans, commands, answer)
        self._answers: deque[Answer] = deque()  # of steps whose ids the device has yet to choose
        self._runner: ModelRunner | None = None
        self._profile: RankProfile | None = None

    def handle(self, command: msgspec.Struct) -> msgspec.Struct | None:
        if isinstance(command, Execute):
            self._execute(command.batch)
            return None
        self._finish_answers()
        match command:
            case Load():
                return self._load(command)
            case Capture(folder, probes):
                return self._capture(folder, probes)
            case ReadUsage():
                return self._usage()
            case BeginProfile(kernels):
                return self._begin_profile(kernels)
            case EndProfile():
                return self._end_profile()
        return None  # masks of a step that masked nothing here, or failed

    def _execute(self, batch: ScheduledBatch) -> None:
        """Its answer goes out once the device has it; the next step can begin before that."""
        if self._profile is not None:
            self._profile.begin_step(batch)
        answer = self._ready().execute(batch)
        if answer is not None:
            self._answers.append(answer)
        self._answer_what_is_there()

    def look(self) -> float | None:
        self._answer_what_is_there()
        seconds = super().look()
        return _ANSWER_LOOK_S if self._answers else seconds

    def _answer_what_is_there(self) -> None:
        while self._answers and self._answers[0].is_there:
            self._answer(Output(self._answers.popleft().output()))

    def _finish_answers(self) -> None:
        while self._answers:
            self._answer(Output(self._answers.popleft().output()))

    def _await_masks(self, header: StepHeader, timeout_s: float) -> StepMasks:
        """The engine makes them of what the steps before have chosen."""
        self._finish_answers()
        return self._commands.await_masks(header, timeout_s)

    def drop(self, *, is_orderly: bool) -> None:
        runner, self._runner, self._profile = self._runner, None, None
        self._answers.clear()
        if runner is not None:
            if is_orderly:
                runner.drain()
            runner.close()

    def _ready(self) -> ModelRunner:
        if self._runner is None:
            raise EngineError("a step came before a model was loaded")
        return self._runner

    def _load(self, command: Load) -> Loaded:
        if self._comm is None:
            raise EngineError("a model came before a world was joined")
        if command.has_c_kernels and library() is None:
            raise EngineError("this rank cannot load the kernels in C that its driver uses")
        start = time.monotonic()
        mesh, dtype = self._comm.mesh, torch_dtype(command.dtype)
        spec = stage_specs(command.layers_per_stage, command.model.num_layers)[mesh.stage]
        with torch.device("meta"):
            model = build_stage(command.model, mesh, spec)
        materialise(model, dtype, self._device)
        source = _open_source(command, model, mesh.rank)
        with self._spans.span(SpanKind.LOAD):
            needed_bytes = load_parameters(
                model, source, command.names, min(_MOST_READERS, torch.get_num_threads())
            )
            if not command.config.deterministic:
                pack_weights(model)
        config = command.config
        cache = CacheShape(
            command.kinds, config.block_size, config.max_num_seqs, command.max_model_len
        )
        self._runner = ModelRunner(
            command.model, model, self._comm, cache, config.workspace_bytes,
            config.max_num_batched_tokens, self._device, dtype,
            self._spans, lambda header: self._await_masks(header, config.step_timeout_s),
        )  # fmt: skip
        if config.deterministic:
            self._runner.make_deterministic(is_captured=not config.enforce_eager)
        elif not config.enforce_eager:
            self._runner.capture_graphs()
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

    def _usage(self) -> RankUsage:
        runner = self._ready()
        self.finish_spans()
        caches = runner.caches.values()
        tensors = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
        return usage(self._device, runner.model.parameters(), tensors, self.communication_bytes)

    def _begin_profile(self, kernels: str | None) -> Done:
        runner, comm = self._ready(), self._comm
        assert comm is not None
        path = None if kernels is None else Path(kernels.replace("{rank}", str(comm.mesh.rank)))
        reset_peak(self._device)
        runner.are_layers_timed = kernels is None
        self._profile = RankProfile(runner.model, self._device, path)
        return Done()

    def _end_profile(self) -> Profiled:
        profile, self._profile = self._profile, None
        if profile is None:
            raise EngineError("a profile was to end that had not begun")
        runner = self._ready()
        runner.are_layers_timed = False
        return Profiled(*profile.finish())


def _open_source(command: Load, model: StageModel, rank: int) -> TensorSource:
    if command.folder is not None:
        return open_folder(Path(command.folder), rank)
    sources = {
        piece.source.name: piece.source
        for *_, layout in named_layouts(model)
        for piece in layout.pieces
    }
    return DummySource(sources, command.config.seed)


def main() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every context length
    rank.serve(LANGUAGE_MODEL, Worker, Commands())


if __name__ == "__main__":
    main()
