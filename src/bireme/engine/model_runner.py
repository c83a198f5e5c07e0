"""Executes scheduled batches on one rank: inputs, the stage's layers, hand-over, sampling.

A batch needs no token's value from the host: ids sampled before it are on the device already.
Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections import deque

import torch

from bireme.engine.capture import StepCapture
from bireme.engine.sampling.sampler import MaskSource, Sampler
from bireme.engine.sampling.shard import Shard
from bireme.engine.slots import CacheShape, Slots, Workspace
from bireme.engine.tiles import SIZES, TiledModel, tile_model
from bireme.kvcache.paged_cache import PagedCache
from bireme.model_config import ModelConfig
from bireme.models.attention import PagedAttention
from bireme.models.blocks import StageModel
from bireme.parallel.collectives import Communicator
from bireme.request import ScheduledBatch, StepOutput
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
        self._last_ids = torch.zeros(cache.num_slots, dtype=torch.int64, device=device)
        self._expected_ids: deque[tuple[tuple[int, int], list[int]]] = deque()
        mesh = comm.mesh
        self._sampler: Sampler | None = None
        if mesh.is_last_stage:
            shard = Shard.of(config.vocab_size, mesh.tp_size, mesh.tp_rank, mesh.tensor)
            self._sampler = Sampler(
                self._logits, shard, masks, cache.num_slots, workspace_bytes, device
            )
        self._tiled: TiledModel | None = None
        self.capture: StepCapture | None = None

    @property
    def cache_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for cache in self.caches.values()
            for tensor in (cache.keys, cache.values)
        )

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepOutput | None:
        """Runs one step; the answering rank returns what was sampled, the others None."""
        self.spans.set_step(batch.step_id, batch.incarnation)
        with self.spans.span(SpanKind.STEP):
            return self._execute(batch)

    def _execute(self, batch: ScheduledBatch) -> StepOutput | None:
        mesh, header = self.comm.mesh, (batch.incarnation, batch.step_id)
        self._slots.apply(batch)
        step = self._slots.context(batch.pieces) if self._tiled is None else None
        x = self._input(batch, header)
        with self.spans.span(SpanKind.COMPUTE):
            x = self.model(x, step) if self._tiled is None else self._tiled(x, batch.pieces)
        if not mesh.is_last_stage:
            self.comm.hidden_sender.send(header, x)
        output = None
        if self._sampler is not None:
            output = self._sample(self._sampler, batch, x)
        if mesh.is_first_stage and not mesh.is_last_stage and batch.sampling_slots:
            self._expected_ids.append((header, batch.sampling_slots))
        if self.capture is not None:
            self.capture.finish_step(batch)
        return output

    def make_deterministic(self) -> None:
        """From here on a token's result does not depend on what else runs; before the first step, and
        on all ranks of a tensor group together."""
        count = min(2 * SIZES[0], self._slots.num_places)
        generator = torch.Generator().manual_seed(0)
        if self.comm.mesh.is_first_stage:
            inputs = torch.randint(self.config.vocab_size, (count,), generator=generator)
        else:
            inputs = torch.randn(count, self.config.hidden_size, generator=generator).to(self.dtype)
        self._tiled = tile_model(self.model, self._slots, self.comm.mesh, inputs.to(self.device))

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

    def _input(self, batch: ScheduledBatch, header: tuple[int, int]) -> torch.Tensor:
        """Ids [T] on the first stage, hidden states [T, D] on the others."""
        receiver = self.comm.hidden_receiver
        if receiver is not None:
            shape = (batch.num_tokens, self.config.hidden_size)
            return receiver.receive(header, shape, self.dtype, self.device)
        needed = {piece.slot for piece in batch.pieces if piece.token_ids is None}
        # the sender holds pp_size + 1 messages before it waits: one place stays free
        self._receive_ids(min(self._num_without(needed), self.comm.mesh.pp_size))
        given = [id_ for piece in batch.pieces for id_ in (piece.token_ids or [0])]
        ids = torch.tensor(given, dtype=torch.int64).to(self.device, non_blocking=True)
        if needed:
            at, starts = [], 0
            for piece in batch.pieces:
                if piece.token_ids is None:
                    at.append((starts, piece.slot))
                starts += piece.num_tokens
            rows, slots = torch.tensor(at, dtype=torch.int64).to(self.device).unbind(1)
            ids[rows] = self._last_ids[slots]
        return ids

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
            header, slots = self._expected_ids.popleft()
            ids = receiver.receive(header, (len(slots),), torch.int64, self.device)
            self._keep_ids(slots, ids)

    def _keep_ids(self, slots: list[int], ids: torch.Tensor) -> None:
        self._last_ids.index_copy_(0, torch.tensor(slots).to(self.device, non_blocking=True), ids)

    # --- output --------------------------------------------------------------------------------

    def _sample(
        self, sampler: Sampler, batch: ScheduledBatch, x: torch.Tensor
    ) -> StepOutput | None:
        """Gives each piece that asks for it its next id, on every rank of the stage."""
        if self.capture is not None:
            assert self.model.head is not None
            self.capture.add_logits(self._logits(x)[:, : self.model.head.logits.num_real])
        chosen = None
        with self.spans.span(SpanKind.SAMPLE):
            sampler.set_up(batch.setups)
            if batch.sampling_slots:
                chosen = sampler.choose(batch, x)
                self._last_ids.index_copy_(0, chosen.slots, chosen.ids)
                self.comm.sampled_sender.send(batch.header, chosen.ids)
            return sampler.output(batch, x, chosen, answers=self.comm.mesh.answers)
