"""Executes scheduled batches on one rank: inputs, the stage's layers, hand-over, sampling.

Slots' state lives here: block tables, what they asked for, and their last sampled id. A batch
needs no token's value from the host: ids sampled before it are on the device already.
Shapes: T tokens, B sequences, C context tokens, D hidden size.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from bireme.engine.capture import StepCapture
from bireme.engine.sampler import SamplingRows, sample
from bireme.kvcache.paged_cache import PagedCache
from bireme.model_config import ModelConfig
from bireme.models.attention import PagedAttention, SequenceGroup, StepContext
from bireme.models.blocks import StageModel
from bireme.models.rope import depends_on_length, inverse_frequencies
from bireme.parallel.collectives import Communicator
from bireme.request import ScheduledBatch, ScheduledPiece, SlotSetup, StepOutput
from bireme.trace import SpanKind, SpanRing


@dataclass(frozen=True)
class CacheShape:
    """How much cache a rank has: blocks of `block_size` places, for `num_slots` requests."""

    num_blocks: int
    block_size: int
    num_slots: int
    max_model_len: int


class ModelRunner:
    """One rank's part of every step."""

    def __init__(
        self,
        config: ModelConfig,
        model: StageModel,
        comm: Communicator,
        cache: CacheShape,
        device: torch.device,
        dtype: torch.dtype,
        spans: SpanRing,
    ) -> None:
        self.config, self.model, self.comm, self.cache = config, model, comm, cache
        self.device, self.dtype, self.spans = device, dtype, spans
        self.caches = {
            module.layer: PagedCache(
                cache.num_blocks,
                cache.block_size,
                module.cut.num_local_kv_heads,
                module.cut.head_dim,
                dtype,
                device,
            )
            for module in model.modules()
            if isinstance(module, PagedAttention)
        }
        max_blocks = -(-cache.max_model_len // cache.block_size)
        self._tables: NDArray[np.int64] = np.zeros((cache.num_slots, max_blocks), dtype=np.int64)
        self._table_sizes = [0] * cache.num_slots
        self._setups: dict[int, SlotSetup] = {}
        self._last_ids = torch.zeros(cache.num_slots, dtype=torch.int64, device=device)
        self._rope = config.rope
        rows = cache.num_slots if self._rope and depends_on_length(self._rope) else 1
        self._frequencies = (
            inverse_frequencies(self._rope, cache.max_model_len).repeat(rows, 1).to(device)
            if self._rope
            else None
        )
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
        for setup in batch.setups:
            self._set_up(setup)
        for piece in batch.pieces:
            self._extend_table(piece)
        step = self._context(batch)
        x = self._input(batch, header)
        with self.spans.span(SpanKind.COMPUTE):
            x = self.model(x, step)
        self.comm.hidden_sender.send(header, x) if not mesh.is_last_stage else None
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

    # --- slots ---------------------------------------------------------------------------------

    def _set_up(self, setup: SlotSetup) -> None:
        self._setups[setup.slot] = setup
        self._table_sizes[setup.slot] = 0
        if self._frequencies is not None and self._frequencies.shape[0] > 1 and self._rope:
            self._frequencies[setup.slot] = inverse_frequencies(self._rope, setup.max_len).to(
                self.device
            )

    def _extend_table(self, piece: ScheduledPiece) -> None:
        new, size = piece.new_blocks[0], self._table_sizes[piece.slot]
        self._tables[piece.slot, size : size + len(new)] = new
        self._table_sizes[piece.slot] = size + len(new)

    # --- inputs --------------------------------------------------------------------------------

    def _input(self, batch: ScheduledBatch, header: tuple[int, int]) -> torch.Tensor:
        """Ids [T] on the first stage, hidden states [T, D] on the others."""
        receiver = self.comm.hidden_receiver
        if receiver is not None:
            shape = (batch.num_tokens, self.config.hidden_size)
            return receiver.receive(header, shape, self.dtype, self.device)
        needs_values = any(piece.token_ids is None for piece in batch.pieces)
        # the sender holds pp_size + 1 messages before it waits: one place stays free
        self._receive_ids(0 if needs_values else self.comm.mesh.pp_size)
        given = [id_ for piece in batch.pieces for id_ in (piece.token_ids or [0])]
        ids = torch.tensor(given, dtype=torch.int64).to(self.device, non_blocking=True)
        if needs_values:
            at, starts = [], 0
            for piece in batch.pieces:
                if piece.token_ids is None:
                    at.append((starts, piece.slot))
                starts += piece.num_tokens
            rows, slots = torch.tensor(at, dtype=torch.int64).to(self.device).unbind(1)
            ids[rows] = self._last_ids[slots]
        return ids

    def _receive_ids(self, num_left: int) -> None:
        """Takes sampled ids from the last stage until at most `num_left` messages are under way."""
        receiver = self.comm.sampled_receiver
        while receiver is not None and len(self._expected_ids) > num_left:
            header, slots = self._expected_ids.popleft()
            ids = receiver.receive(header, (len(slots),), torch.int64, self.device)
            self._last_ids[slots] = ids

    def _context(self, batch: ScheduledBatch) -> StepContext:
        pieces = batch.pieces
        slots = np.repeat([piece.slot for piece in pieces], [piece.num_tokens for piece in pieces])
        positions = np.concatenate(
            [np.arange(piece.start, piece.start + piece.num_tokens) for piece in pieces]
        )
        on_device = torch.from_numpy(positions).to(self.device)
        cos, sin = self._rotation(slots, on_device)
        return StepContext(
            positions=on_device,
            places=torch.from_numpy(self._places(slots, positions)).to(self.device),
            groups=self._groups(pieces),
            caches=self.caches,
            cos=cos,
            sin=sin,
        )

    def _places(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        size = self.cache.block_size
        return self._tables[slots, positions // size] * size + positions % size

    def _groups(self, pieces: list[ScheduledPiece]) -> list[SequenceGroup]:
        """Single tokens together, padded to the longest context; longer pieces one by one."""
        starts = np.cumsum([0, *(piece.num_tokens for piece in pieces)])
        order = sorted(range(len(pieces)), key=lambda index: pieces[index].num_tokens)
        groups: list[SequenceGroup] = []
        for num_tokens, run in groupby(order, key=lambda index: pieces[index].num_tokens):
            members = list(run)
            together = [members] if num_tokens == 1 else [[member] for member in members]
            groups.extend(self._group(pieces, starts, indices) for indices in together)
        return groups

    def _group(
        self, pieces: list[ScheduledPiece], starts: NDArray[np.int64], indices: list[int]
    ) -> SequenceGroup:
        steps = np.arange(pieces[indices[0]].num_tokens)
        first = np.array([pieces[index].start for index in indices])
        lengths = first + len(steps)
        slots = np.array([pieces[index].slot for index in indices])
        context = np.arange(lengths.max())
        size = self.cache.block_size
        places = self._tables[slots][:, context // size] * size + context % size
        places[context >= lengths[:, None]] = 0
        return SequenceGroup(
            rows=torch.from_numpy(starts[indices][:, None] + steps).to(self.device),
            positions=torch.from_numpy(first[:, None] + steps).to(self.device),
            context=torch.from_numpy(places).to(self.device),
        )

    def _rotation(
        self, slots: NDArray[np.int64], positions: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._frequencies is None or self._rope is None:
            return None, None
        per_slot = self._frequencies.shape[0] > 1
        frequencies = self._frequencies[slots] if per_slot else self._frequencies
        angles = positions.float().unsqueeze(1) * frequencies
        scale = self._rope.attention_factor
        return (angles.cos() * scale).to(self.dtype), (angles.sin() * scale).to(self.dtype)

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
                new = sample(logits, self._first_id, self._rows(slots, positions), mesh.tensor)
                self._last_ids[slots] = new
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
        setups = [self._setups[slot] for slot in slots]

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
