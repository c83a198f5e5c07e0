"""Executes scheduled batches on one rank: inputs, the stage's layers, hand-over, sampling.

A batch needs no token's value from the host: ids sampled before it are on the device already.
Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from bireme.engine.capture import StepCapture
from bireme.engine.sampler import SamplingRows, sample
from bireme.engine.slots import CacheShape, Slots, Workspace
from bireme.kvcache.paged_cache import PagedCache
from bireme.model_config import ModelConfig
from bireme.models.attention import PagedAttention
from bireme.models.blocks import StageModel
from bireme.parallel.collectives import Communicator
from bireme.request import ScheduledBatch, StepHeader, StepMasks, StepOutput
from bireme.trace import SpanKind, SpanRing

MaskSource = Callable[[StepHeader], StepMasks]  # returns once the masks of a step have come


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
        spans: SpanRing,
        masks: MaskSource,
    ) -> None:
        self.config, self.model, self.comm = config, model, comm
        self.device, self.dtype, self.spans = device, dtype, spans
        self._workspace_bytes, self._masks = workspace_bytes, masks
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
        step = self._slots.context(batch.pieces)
        x = self._input(batch, header)
        with self.spans.span(SpanKind.COMPUTE):
            x = self.model(x, step)
        if not mesh.is_last_stage:
            self.comm.hidden_sender.send(header, x)
        output = self._sample(batch, x, header) if mesh.is_last_stage else None
        if mesh.is_first_stage and not mesh.is_last_stage and batch.sampling_slots:
            self._expected_ids.append((header, batch.sampling_slots))
        if self.capture is not None:
            self.capture.finish_step(batch)
        return output

    def drain(self) -> None:
        """Takes every message that is still under way to this rank, and delivers its own."""
        self._receive_ids(0)
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
        self, batch: ScheduledBatch, x: torch.Tensor, header: tuple[int, int]
    ) -> StepOutput | None:
        """Samples the last token of each piece that asks for it, on every rank of the stage."""
        mesh = self.comm.mesh
        slots = batch.sampling_slots
        ends = np.cumsum([piece.num_tokens for piece in batch.pieces]) - 1
        sampled = [index for index, piece in enumerate(batch.pieces) if piece.samples]
        if self.capture is not None:
            assert self.model.head is not None
            self.capture.add_logits(self.model.logits(x)[:, : self.model.head.logits.num_real])
        ids: list[int] = []
        if slots:
            with self.spans.span(SpanKind.SAMPLE):
                logits = self.model.logits(x[ends[sampled]]).float()
                positions = [
                    batch.pieces[index].start + batch.pieces[index].num_tokens for index in sampled
                ]
                rows = self._rows(slots, positions)
                new = sample(logits, self._first_id, rows, mesh.tensor, self._workspace_bytes)
                self._keep_ids(slots, new)
                self.comm.sampled_sender.send(header, new)
                ids = new.tolist() if mesh.answers else []
        if not mesh.answers:
            return None
        return StepOutput(batch.incarnation, batch.step_id, slots, [[id_] for id_ in ids])

    @property
    def _first_id(self) -> int:
        assert self.model.head is not None
        return self.model.head.logits.first_id

    def _rows(self, slots: list[int], positions: list[int]) -> SamplingRows:
        setups = [setup.sampling for setup in self._slots.setups(slots)]

        def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device)

        return SamplingRows(
            temperature=column([setup.temperature for setup in setups], torch.float32),
            top_k=column([setup.top_k for setup in setups], torch.int64),
            top_p=column([setup.top_p for setup in setups], torch.float32),
            seeds=column([setup.seed for setup in setups], torch.int64),
            positions=column(positions, torch.int64),
            is_random=any(setup.temperature > 0 for setup in setups),
            is_filtered=any(
                setup.temperature > 0 and (setup.top_k or setup.top_p < 1) for setup in setups
            ),
        )
