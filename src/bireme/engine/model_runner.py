"""Executes scheduled batches on one rank: inputs, the stage's layers, hand-over, sampling.

A batch needs no token's value from the host: ids sampled before it are on the device already.
Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import chain

import numpy as np
import torch
from numpy.typing import ArrayLike

from bireme.engine.capture import StepCapture, Watch
from bireme.engine.captured import GraphCapturer
from bireme.engine.gathering import Workspace
from bireme.engine.graphs import StepGraphs
from bireme.engine.sampling.answer import Answer
from bireme.engine.sampling.sampler import MaskSource, Sampler
from bireme.engine.sampling.shard import Shard
from bireme.engine.slots import CacheShape, Slots
from bireme.engine.tiles import TiledModel, num_tried, tile_model
from bireme.kernels.choice import has_kernels
from bireme.kernels.device_spans import DeviceSpans
from bireme.kernels.host_copies import upload
from bireme.kvcache.paged_cache import PagedCache
from bireme.model_config import ModelConfig
from bireme.models.attention import PagedAttention
from bireme.models.blocks import MoE, StageModel
from bireme.parallel.collectives import Communicator
from bireme.request import ScheduledBatch, asked_rows
from bireme.trace import SpanKind, SpanWriter


class ModelRunner:
    """One rank's part of every step."""

    def __init__(
        self,
        config: ModelConfig,
        model: StageModel,
        comm: Communicator,
        cache: CacheShape,
        workspace_bytes: int,
        most_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        spans: SpanWriter,
        masks: MaskSource,
    ) -> None:
        self.config, self.model, self.comm = config, model, comm
        self.device, self.dtype, self.spans = device, dtype, spans
        attentions = [module for module in model.modules() if isinstance(module, PagedAttention)]
        self.caches = {
            module.layer: PagedCache(
                cache.num_blocks(module.window),
                cache.block_size,
                module.cut.num_local_kv_heads,
                module.cut.head_dim,
                dtype,
                device,
            )
            for module in attentions
        }
        for module in attentions:
            module.place_on(device)
        self._slots = Slots(
            cache,
            config.rope,
            Workspace.of(attentions, workspace_bytes, dtype),
            self.caches,
            {module.window for module in attentions},
            dtype,
            device,
        )
        self._last_ids = torch.zeros(cache.num_slots + 1, dtype=torch.int64, device=device)
        self._expected_ids: deque[tuple[tuple[int, int], list[int]]] = deque()
        mesh = comm.mesh
        self._sampler: Sampler | None = None
        if mesh.is_last_stage:
            shard = Shard.of(config.vocab_size, mesh.tp_size, mesh.tp_rank, mesh.tensor)
            self._sampler = Sampler(
                self._logits, shard, masks, cache.num_slots, workspace_bytes, device
            )
        self._tiled: TiledModel | None = None
        self._graphs: StepGraphs | None = None
        self._num_slots, self._most_tokens = cache.num_slots, most_tokens
        self.capture: StepCapture | None = None
        self.are_layers_timed = False
        model.sums_late = model.takes_unsummed and has_kernels(device)

    @property
    def cache_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for cache in self.caches.values()
            for tensor in (cache.keys, cache.values)
        )

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> Answer | None:
        """Runs one step; the answering rank returns what was sampled, the others None."""
        self.spans.set_step(batch.step_id, batch.incarnation)
        with self.spans.span(SpanKind.STEP):
            return self._execute(batch)

    def _execute(self, batch: ScheduledBatch) -> Answer | None:
        mesh, header = self.comm.mesh, batch.header
        self._slots.apply(batch)
        if self._sampler is not None and batch.setups:
            with self.spans.span(SpanKind.SAMPLE):
                self._sampler.set_up(batch.setups)
        graphs = self._graphs_for(batch)
        has_all = self._asks_all(batch, graphs)
        run = self._forward if graphs is None else partial(self._replay, graphs)
        x = run(batch, asks_all=has_all)
        if not mesh.is_last_stage:
            self.comm.hidden_sender.send(header, x)
        output = None
        if self._sampler is not None:
            output = self._sample(self._sampler, batch, x, graphs, has_all=has_all)
        if mesh.is_first_stage and not mesh.is_last_stage and batch.sampling_slots:
            self._expected_ids.append((header, batch.sampling_slots))
        if self.capture is not None:
            self.capture.finish_step(batch)
        return output

    def _asks_all(self, batch: ScheduledBatch, graphs: StepGraphs | None) -> bool:
        """Whether the last layer of this stage makes all rows, and not `asked_rows` alone."""
        sampler = self._sampler
        if sampler is None or len(asked_rows(batch.pieces)) == batch.num_tokens:
            return True
        if graphs is not None and not graphs.leaves_last_layer(batch):
            return True
        is_seen = self._tiled is not None or self.capture is not None or self._is_probed
        return is_seen or sampler.tells_prompts(batch)

    def _forward(self, batch: ScheduledBatch, *, asks_all: bool) -> torch.Tensor:
        """The stage's layers, kernel by kernel -> [T, D], or [S, D] where rows [S] alone are asked for."""
        if self._tiled is not None:
            x = self._input(batch)
            with self.spans.span(SpanKind.COMPUTE):
                return self._tiled(x, batch.pieces, self._watch)
        step = self._slots.context(batch.pieces, is_probed=self._is_probed, asks_all=asks_all)
        x = self._input(batch)
        with self.spans.span(SpanKind.COMPUTE):
            made: torch.Tensor = self.model(x, step)
        return made

    def _replay(self, graphs: StepGraphs, batch: ScheduledBatch, asks_all: bool) -> torch.Tensor:
        """The same as a graph, and what is not of it."""
        hidden = None
        if self.comm.hidden_receiver is None:
            self._await_ids(batch)
        else:
            hidden = self._input(batch)
        graphs.place(batch, hidden)
        with graphs.span():
            x = graphs.run(batch)
            if graphs.leaves_last_layer(batch):
                x = self.model.end(x, self._slots.context(batch.pieces, asks_all=asks_all))
        return x

    def _graphs_for(self, batch: ScheduledBatch) -> StepGraphs | None:
        graphs = self._graphs
        return None if graphs is None or self._is_probed or not graphs.take(batch) else graphs

    @property
    def _is_probed(self) -> bool:
        """Whether somebody wants to see what every layer makes, or takes."""
        return self._watch is not Watch.NOTHING

    @property
    def _watch(self) -> Watch:
        if self.capture is not None and self.capture.has_probes:
            return Watch.ALL
        return Watch.TIMES if self.are_layers_timed else Watch.NOTHING

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Before the first step, by all ranks of a tensor group together; of a model that is not tiled."""
        capturer = self._new_capturer()
        if capturer is not None:
            self._graphs = StepGraphs(
                self.model, self._slots, self._sampler, self._last_ids,
                (self.config.hidden_size, self.dtype), capturer, self._num_slots, self._most_tokens,
            )  # fmt: skip

    def _new_capturer(self) -> GraphCapturer | None:
        """None where layers wait for a result on the host, or for no GPU's kernels."""
        has_experts = any(isinstance(module, MoE) for module in self.model.modules())
        if has_experts and self.dtype != torch.bfloat16:
            return None
        if isinstance(self.spans, DeviceSpans) and has_kernels(self.device):
            return GraphCapturer(self.spans, self.device)
        return None

    def close(self) -> None:
        """Gives back what would hold up leaving the groups."""
        graphs, self._graphs = self._graphs, None
        tiled, self._tiled = self._tiled, None
        if graphs is not None:
            graphs.close()
        if tiled is not None:
            tiled.close()

    def make_deterministic(self, *, is_captured: bool = True) -> None:
        """From here on a token's result does not depend on what else runs; before the first step, and
        on all ranks of a tensor group together."""
        count, generator = num_tried(self._slots), torch.Generator().manual_seed(0)
        if self.comm.mesh.is_first_stage:
            inputs = torch.randint(self.config.vocab_size, (count,), generator=generator)
        else:
            inputs = torch.randn(count, self.config.hidden_size, generator=generator).to(self.dtype)
        self._tiled = tile_model(
            self.model, self._slots, self.comm.mesh, inputs.to(self.device),
            self._new_capturer if is_captured else lambda: None,
        )  # fmt: skip

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """[S, D] -> [S, V]"""
        return self.model.logits(x) if self._tiled is None else self._tiled.logits(x)

    def drain(self) -> None:
        """Takes every message that is still under way to this rank, and delivers its own."""
        self._receive_ids(0)
        for receiver in (self.comm.hidden_receiver, self.comm.sampled_receiver):
            if receiver is not None:
                receiver.finish()
        self.comm.hidden_sender.drain()
        self.comm.sampled_sender.drain()

    # --- inputs --------------------------------------------------------------------------------

    def _input(self, batch: ScheduledBatch) -> torch.Tensor:
        """Ids [T] on the first stage, hidden states [T, D] on the others."""
        receiver = self.comm.hidden_receiver
        if receiver is not None:
            shape = (batch.num_tokens, self.config.hidden_size)
            return receiver.receive(batch.header, shape, self.dtype, self.device)
        needed = self._await_ids(batch)
        given = chain.from_iterable(piece.token_ids or (0,) for piece in batch.pieces)
        ids = self._on_device(np.fromiter(given, np.int64, batch.num_tokens))
        if needed:
            at, starts = [], 0
            for piece in batch.pieces:
                if piece.token_ids is None:
                    at.append((starts, piece.slot))
                starts += piece.num_tokens
            rows, slots = self._on_device(at).unbind(1)
            ids[rows] = self._last_ids[slots]
        return ids

    def _await_ids(self, batch: ScheduledBatch) -> set[int]:
        """The slots whose last ids the batch begins with; they are there."""
        needed = {piece.slot for piece in batch.pieces if piece.token_ids is None}
        # the sender holds pp_size + 1 messages before it waits: one place stays free
        self._receive_ids(min(self._num_without(needed), self.comm.mesh.pp_size))
        return needed

    def _num_without(self, needed: set[int]) -> int:
        """How many of the newest messages under way hold no id of the slots `needed`."""
        for count, (_, slots) in enumerate(reversed(self._expected_ids)):
            if not needed.isdisjoint(slots):
                return count
        return len(self._expected_ids)

    def _receive_ids(self, num_left: int) -> None:
        """Takes sampled ids from the last stage until at most `num_left` messages are under way."""
        receiver = self.comm.sampled_receiver
        while receiver is not None and len(self._expected_ids) > num_left:
            header, _ = self._expected_ids.popleft()
            shape = tuple(self._last_ids.shape)
            self._last_ids.copy_(receiver.receive(header, shape, torch.int64, self.device))

    def _on_device(self, numbers: ArrayLike) -> torch.Tensor:
        # by way of numpy, which takes a third of the time that torch takes for a list
        return upload(torch.from_numpy(np.asarray(numbers, dtype=np.int64)), self.device)

    # --- output --------------------------------------------------------------------------------

    def _sample(
        self,
        sampler: Sampler,
        batch: ScheduledBatch,
        x: torch.Tensor,
        graphs: StepGraphs | None,
        *,
        has_all: bool,
    ) -> Answer | None:
        """Gives each piece that asks for it its next id, on every rank of the stage. x has all rows [T, D], or those
        [S, D] that are asked for."""
        if self.capture is not None:
            assert self.model.head is not None
            self.capture.add_logits(self._logits(x)[:, : self.model.head.logits.num_real])
        chosen = None
        with self.spans.span(SpanKind.SAMPLE):
            if batch.sampling_slots:
                chosen = None if graphs is None else graphs.choose(batch)
                if chosen is None:
                    rows = x[self._on_device(asked_rows(batch.pieces))] if has_all else x
                    chosen = sampler.choose(batch, rows)
                    self._last_ids.index_copy_(0, chosen.slots, chosen.ids)
                self.comm.sampled_sender.send(batch.header, self._last_ids)
            return sampler.answer(batch, x, chosen, answers=self.comm.mesh.answers)
