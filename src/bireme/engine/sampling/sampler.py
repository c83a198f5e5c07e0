"""One step's sampling on one rank of the last stage; every rank of its group does the same.

Slots ask for it when they are set up: what they ask for stays on the device, so that a step costs
what its own rows asked for. Masks are waited for when everything but the choice is done, for all
slots: their ids leave in one message anyway.
Shapes: T tokens, D hidden size, S sampled rows, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bireme.engine.sampling.adjusting import Adjustments
from bireme.engine.sampling.answer import Answer, Awaited, arrival
from bireme.engine.sampling.choosing import choose
from bireme.engine.sampling.choosing_on_gpu import choose_on_gpu
from bireme.engine.sampling.columns import ChoiceKind, SlotColumns
from bireme.engine.sampling.logprobs import in_tiles, to_records
from bireme.engine.sampling.prompts import PromptPart, prompt_parts, told_prompts
from bireme.engine.sampling.shard import Shard
from bireme.errors import EngineError
from bireme.kernels.choice import has_kernels
from bireme.kernels.host_copies import upload
from bireme.request import (
    SamplingSetup,
    ScheduledBatch,
    SlotSetup,
    StepHeader,
    StepMasks,
    StepOutput,
    TokenLogprobs,
)

MaskSource = Callable[[StepHeader], StepMasks]  # returns once the masks of a step have come
Logits = Callable[[torch.Tensor], torch.Tensor]  # hidden states [R, D] -> [R, V]


@dataclass(frozen=True)
class Chosen:
    """The new ids [S] of the slots [S] of a step, and the model's own logits [S, V], where a slot may ask for
    log-probabilities."""

    slots: torch.Tensor
    ids: torch.Tensor
    logits: torch.Tensor | None


class Sampler:
    """What the slots of the last stage ask for, and the answer."""

    def __init__(
        self,
        logits: Logits,
        shard: Shard,
        masks: MaskSource,
        num_slots: int,
        workspace_bytes: int,
        device: torch.device,
    ) -> None:
        self._logits, self._shard, self._masks = logits, shard, masks
        self._workspace_bytes, self._device = workspace_bytes, device
        self._setups: dict[int, SamplingSetup] = {}
        self._columns = SlotColumns(num_slots, device)
        self._adjustments = Adjustments(shard, workspace_bytes, device)

    def set_up(self, setups: Sequence[SlotSetup]) -> None:
        for setup in setups:
            self._setups[setup.slot] = setup.sampling
            self._adjustments.set_up(setup)
        self._columns.set_up(setups)

    def tells_prompts(self, batch: ScheduledBatch) -> bool:
        """True if a step, whose slots are set up, is to say how likely tokens of a prompt were."""
        return bool(prompt_parts(batch.pieces, self._setups))

    def choose(self, batch: ScheduledBatch, x: torch.Tensor) -> Chosen:
        """The next id of each slot that samples, from their hidden states [S, D]."""
        sampled = [
            (piece.slot, piece.start + piece.num_tokens) for piece in batch.pieces if piece.samples
        ]
        slots, positions = (list(column) for column in zip(*sampled, strict=True))
        on_device = upload(torch.tensor([slots, positions]), self._device)
        logits = self._logits(x)
        adjusted = self._adjusted(batch, logits, slots, positions)
        if has_kernels(self._device):
            ids = self._drawn(adjusted, self._columns.kind(slots), on_device[0], on_device[1])
        else:
            groups = self._columns.groups(slots, on_device[0], on_device[1])
            ids = choose(adjusted.float(), self._shard, groups, self._workspace_bytes)
        self._adjustments.append(slots, positions, ids)
        return Chosen(on_device[0], ids, logits)

    def kind_alone(self, batch: ScheduledBatch) -> ChoiceKind | None:
        """Of what makes the choice of every piece; None where any does not sample, or asks for more than an id of the
        model's own logits."""
        if not all(piece.samples and not piece.needs_mask for piece in batch.pieces):
            return None
        slots = [piece.slot for piece in batch.pieces]
        positions = [piece.start + piece.num_tokens for piece in batch.pieces]
        if self._asking(slots) or self._adjustments.touch(slots, positions):
            return None
        return self._columns.kind(slots)

    def choose_alone(
        self, kind: ChoiceKind, x: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Ids [S] behind tokens at positions [S] of slots [S], of no later kind, from their rows [S, D]; on the device
        alone."""
        behind = positions if kind is ChoiceKind.GREEDY else positions + 1
        return self._drawn(self._logits(x), kind, slots, behind)

    def prepare(self) -> None:
        """Compiles what chooses from logits that were changed, before a request waits for it; by all ranks together."""
        logits = torch.zeros(1, self._shard.width, device=self._device)
        slots = self._columns.no_slot
        for kind in ChoiceKind:
            self._drawn(logits, kind, slots, slots)

    def _drawn(
        self, logits: torch.Tensor, kind: ChoiceKind, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        return choose_on_gpu(logits, self._shard, self._columns.draws(kind, slots, positions))

    def answer(
        self, batch: ScheduledBatch, x: torch.Tensor, chosen: Chosen | None, *, answers: bool
    ) -> Answer | None:
        """What the rank that answers tells the engine; all others work on it too, and return None. x [T, D] has all
        rows where prompts are told of."""
        slots, ids, logprobs, prompt_logprobs = batch.sampling_slots, None, None, None
        if chosen is not None:
            ids = Awaited.of(chosen.ids, _told_ids)
            if asking := self._asking(slots):
                counts = {row: self._setups[slots[row]].num_logprobs or 0 for row in asking}
                tell = partial(_told_logprobs, num_slots=len(slots), counts=counts)
                logprobs = Awaited.of(self._logprobs(counts, chosen), tell)
        if prompts := prompt_parts(batch.pieces, self._setups):
            made = self._prompt_logprobs(prompts, x)
            prompt_logprobs = Awaited.of(made, partial(told_prompts, prompts))
        if not answers:
            return None
        rest = StepOutput(batch.incarnation, batch.step_id, slots, [])
        return Answer(rest, ids, logprobs, prompt_logprobs, arrival(self._device))

    # --- before the choice ---------------------------------------------------------------------

    def _adjusted(
        self,
        batch: ScheduledBatch,
        logits: torch.Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
    ) -> torch.Tensor:
        """The logits to choose from: the model's own where nothing is to be changed."""
        needs_mask = [piece.needs_mask for piece in batch.pieces if piece.samples]
        masked = [row for row, needs in enumerate(needs_mask) if needs]
        if not masked and not self._adjustments.touch(slots, positions):
            return logits
        logits = logits.to(torch.float32, copy=bool(self._asking(slots)))
        self._adjustments.apply(logits, slots, positions)
        if masked:
            masks = _masks_of(self._masks(batch.header), [slots[row] for row in masked])
            self._adjustments.apply_masks(logits, masked, masks)
        return logits

    # --- log-probabilities ---------------------------------------------------------------------

    def _asking(self, slots: Sequence[int]) -> list[int]:
        """Rows of the slots that want log-probabilities of their new tokens."""
        return [
            row for row, slot in enumerate(slots) if self._setups[slot].num_logprobs is not None
        ]

    def _logprobs(self, counts: Mapping[int, int], chosen: Chosen) -> torch.Tensor:
        """Of rows, and how many of the likeliest ids each asks for."""
        logits = chosen.logits
        assert logits is not None
        rows = upload(torch.tensor([*counts]), self._device)
        return in_tiles(
            lambda some: logits[some], rows, chosen.ids[rows], max(counts.values()),
            self._shard, self._workspace_bytes,
        )  # fmt: skip

    def _prompt_logprobs(self, parts: Sequence[PromptPart], x: torch.Tensor) -> torch.Tensor:
        rows = [part.first_row + at for part in parts for at in range(len(part.targets))]
        targets = [id_ for part in parts for id_ in part.targets]
        on_device = upload(torch.tensor([rows, targets]), self._device)
        num_top = max(part.num_top for part in parts)
        return in_tiles(
            lambda some: self._logits(x[some]), on_device[0], on_device[1], num_top,
            self._shard, self._workspace_bytes,
        )  # fmt: skip


def _told_ids(ids: torch.Tensor) -> list[list[int]]:
    return [[id_] for id_ in ids.tolist()]


def _told_logprobs(
    logprobs: torch.Tensor, num_slots: int, counts: Mapping[int, int]
) -> list[list[TokenLogprobs]]:
    """One list a slot; empty for those that did not ask."""
    told: list[list[TokenLogprobs]] = [[] for _ in range(num_slots)]
    for row, of_token in zip(counts, to_records(logprobs, [*counts.values()]), strict=True):
        told[row] = [of_token]
    return told


def _masks_of(given: StepMasks, slots: Sequence[int]) -> list[bytes]:
    masks = dict(zip(given.slots, given.masks, strict=True))
    for slot in slots:
        if slot not in masks:
            raise EngineError(f"step {given.step_id} came with no mask for slot {slot}")
    return [masks[slot] for slot in slots]
