"""All ranks of a layout as threads of one process: the worker's own loader, layers and runner, with
collectives on a barrier and edges on queues.

Cheap enough for hundreds of small models, and a place to plant faults without touching the code
under test. `LocalExecutor` has the interface of `WorkerExecutor`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.loader import load_parameters, torch_dtype
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.reader import TensorSource
from bireme.engine.capture import StepCapture
from bireme.engine.executor import WorkerPlan
from bireme.engine.model_runner import ModelRunner
from bireme.engine.slots import CacheShape
from bireme.errors import PeerLost
from bireme.models.blocks import StageModel
from bireme.models.registry import build_stage
from bireme.parallel.collectives import Communicator
from bireme.parallel.layers import materialise, named_layouts, pack_weights
from bireme.parallel.mesh import Alone, Mesh, TensorGroup
from bireme.parallel.pipeline import Edge, forward_edges, sampled_edges, stage_specs
from bireme.request import ScheduledBatch, StepHeader, StepMasks, StepOutput
from bireme.trace import SpanRing
from thread_group import ThreadGroup

_PATIENCE_S = 60.0  # a rank that failed lets the others go at once; this only bounds our own bugs
_RING_CAPACITY = 16


Wire = queue.SimpleQueue[tuple[tuple[int, int], torch.Tensor] | None]


class LocalSender:
    def __init__(self, wires: list[Wire]) -> None:
        self._wires = wires

    def send(self, header: tuple[int, int], rows: torch.Tensor) -> None:
        for wire in self._wires:
            wire.put((header, rows.clone()))

    def drain(self) -> None:
        pass


class LocalReceiver:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def receive(
        self,
        header: tuple[int, int],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        _device: torch.device,
    ) -> torch.Tensor:
        message = self._wire.get(timeout=_PATIENCE_S)
        if message is None:
            raise PeerLost("another rank failed")
        assert (message[0], message[1].shape, message[1].dtype) == (header, shape, dtype)
        return message[1]


class LocalExecutor:
    """Ranks of one model in threads; the pool is not used."""

    is_broken = False

    def __init__(self, plan: WorkerPlan, _pool: object = None) -> None:
        self.plan = plan
        widths = plan.config.parallel.widths
        self._barriers = [threading.Barrier(width, timeout=_PATIENCE_S) for width in widths]
        self._shared: list[list[torch.Tensor | None]] = [[None] * width for width in widths]
        self._forward: dict[Edge, Wire] = {
            edge: queue.SimpleQueue() for edge in forward_edges(widths)
        }
        self._sampled: dict[Edge, Wire] = {
            edge: queue.SimpleQueue() for edge in sampled_edges(widths)
        }
        self._rings = [SpanRing.create(_RING_CAPACITY) for _ in range(sum(widths))]
        self.runners = [self._runner(rank) for rank in range(sum(widths))]
        self._threads = ThreadPoolExecutor(len(self.runners))
        self._outputs: deque[StepOutput] = deque()
        if plan.config.deterministic:
            list(self._threads.map(ModelRunner.make_deterministic, self.runners))
        self.masks: deque[StepMasks] = deque()  # of the steps to come; each rank looks up its own

    def _mesh(self, rank: int) -> Mesh:
        mesh = Mesh(self.plan.config.parallel.widths, rank)
        group: TensorGroup = Alone()
        if mesh.tp_size > 1:
            group = ThreadGroup(mesh.tp_rank, self._shared[mesh.stage], self._barriers[mesh.stage])
        return Mesh(mesh.widths, rank, group)

    def _runner(self, rank: int) -> ModelRunner:
        plan, mesh = self.plan, self._mesh(rank)
        spec = stage_specs(plan.layers_per_stage, plan.model.num_layers)[mesh.stage]
        with torch.device("meta"):
            model = build_stage(plan.model, mesh, spec)
        dtype = torch_dtype(plan.dtype)
        materialise(model, dtype, torch.device("cpu"))
        load_parameters(model, self._source(model), plan.names)
        if not plan.config.deterministic:
            pack_weights(model)
        comm: Any = Communicator(
            mesh,
            LocalSender([wire for edge, wire in self._forward.items() if edge.src == rank]),  # type: ignore[arg-type]
            next(
                (LocalReceiver(wire) for edge, wire in self._forward.items() if edge.dst == rank),
                None,
            ),  # type: ignore[arg-type]
            LocalSender([wire for edge, wire in self._sampled.items() if edge.src == rank]),  # type: ignore[arg-type]
            next(
                (LocalReceiver(wire) for edge, wire in self._sampled.items() if edge.dst == rank),
                None,
            ),  # type: ignore[arg-type]
        )
        shape = CacheShape(
            plan.kinds, plan.config.block_size, plan.config.max_num_seqs, plan.max_model_len
        )
        return ModelRunner(
            plan.model, model, comm, shape, plan.config.workspace_bytes,
            plan.config.max_num_batched_tokens, torch.device("cpu"), dtype, self._rings[rank],
            self._masks_of,
        )  # fmt: skip

    def _source(self, model: StageModel) -> TensorSource:
        if self.plan.folder is not None:
            return open_folder(self.plan.folder)
        pieces = [piece for *_, layout in named_layouts(model) for piece in layout.pieces]
        sources = {piece.source.name: piece.source for piece in pieces}
        return DummySource(sources, self.plan.config.seed)

    def _masks_of(self, header: StepHeader) -> StepMasks:
        return next(masks for masks in self.masks if (masks.incarnation, masks.step_id) == header)

    def submit(self, batch: ScheduledBatch) -> None:
        """Executes the step at once: what its masked slots need must be in `masks` already."""
        outputs = list(self._threads.map(lambda runner: self._execute(runner, batch), self.runners))
        self._outputs.extend(output for output in outputs if output is not None)

    def _execute(self, runner: ModelRunner, batch: ScheduledBatch) -> StepOutput | None:
        try:
            answer = runner.execute(batch)
            return None if answer is None else answer.output()
        except BaseException:
            for barrier in self._barriers:
                barrier.abort()
            for wire in (*self._forward.values(), *self._sampled.values()):
                wire.put(None)
            raise

    def collect(self) -> StepOutput:
        return self._outputs.popleft()

    def capture(self, folder: Path | None, *, probes: bool = False) -> None:
        for rank, runner in enumerate(self.runners):
            if runner.capture is not None:
                runner.capture.close()
            runner.capture = (
                StepCapture(folder, rank, runner.model, probes=probes) if folder else None
            )

    def close(self) -> None:
        self._threads.shutdown()
        for ring in self._rings:
            ring.close()
