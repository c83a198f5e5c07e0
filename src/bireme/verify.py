"""Proof that a cut model is the whole model.

The uncut model (or transformers) continues some prompts greedily. Then both models are led through
the same tokens, prompt in one step and the rest one by one, and every logit is compared. Where they
depart, a second pass compares what every layer of every rank computed, and names the first.
Shapes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.reader import TensorSource, bits_dtype
from bireme.config import EngineConfig, ParallelConfig
from bireme.engine.capture import capture_path
from bireme.engine.executor import WorkerExecutor, WorkerPlan
from bireme.engine.pool import WorkerPool
from bireme.engine.prepare import PreparedModel, check_prompt, make_plan
from bireme.errors import ConfigError
from bireme.kvcache.block_manager import BlockManager
from bireme.models.registry import model_layout
from bireme.models.rope import depends_on_length
from bireme.parallel.layout import (
    ModelLayout,
    ParamLayout,
    Source,
    box_shape,
    full_box,
    vocabulary_range,
)
from bireme.request import ScheduledBatch, ScheduledPiece, SlotSetup

if TYPE_CHECKING:
    from numpy.typing import NDArray

# largest logit difference, in standard deviations of the reference's logits
TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
_FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Departure:
    """The first place where a rank computed something else than the whole model did."""

    step: int
    layer: int | None
    rank: int
    what: str
    relative_difference: float

    def __str__(self) -> str:
        place = f"layer {self.layer}, " if self.layer is not None else ""
        return f"step {self.step}, {place}rank {self.rank}: {self.what} (off by {self.relative_difference:.1e})"


@dataclass(frozen=True)
class Certificate:
    """What was compared, and how far the two models were apart.

    Differences are of logits; `relative_difference` is the largest one over `spread`, the
    reference's standard deviation. Agreement is the share of positions with the same greedy token;
    `num_excused` positions differ where the reference's two best are closer than the tolerance.
    """

    model: str
    layout: str
    layers_per_stage: tuple[int, ...]
    dtype: str
    device: str
    reference: str
    num_prompts: int
    num_prefill_positions: int
    num_decode_positions: int
    max_difference: float
    mean_difference: float
    spread: float
    relative_difference: float
    tolerance: float
    prefill_agreement: float
    decode_agreement: float
    num_excused: int
    departure: Departure | None
    is_same: bool


@dataclass(frozen=True)
class Sequences:
    """Token sequences, each with the length of its prompt."""

    ids: list[list[int]]
    num_prompt: list[int]

    @property
    def num_decode(self) -> int:
        return max(len(ids) - prompt for ids, prompt in zip(self.ids, self.num_prompt, strict=True))


@dataclass(frozen=True)
class Reference:
    """What a whole model computed: greedy continuations, and logits float32 [T, V] along them."""

    name: str
    sequences: Sequences
    logits: list[torch.Tensor]


def lead(
    executor: WorkerExecutor, plan: WorkerPlan, sequences: Sequences, folder: Path, *, probes: bool
) -> list[torch.Tensor]:
    """Logits float32 [T, V] of each sequence: its prompt in one step, then token by token."""
    executor.capture(folder, probes=probes)
    batches = _batches(sequences, plan)
    widths = plan.config.parallel.widths
    for index, batch in enumerate(batches):
        if index > len(widths):  # as many in flight as when serving
            executor.collect()
        executor.submit(batch)
    for _ in batches[: len(widths) + 1]:
        executor.collect()
    executor.capture(None)
    last = range(sum(widths) - widths[-1], sum(widths))
    rows: list[list[torch.Tensor]] = [[] for _ in sequences.ids]
    for batch in batches:
        parts = [_logits(capture_path(folder, batch.step_id, rank)) for rank in last]
        step_rows = torch.cat(parts, dim=-1).split([piece.num_tokens for piece in batch.pieces])
        for piece, logits in zip(batch.pieces, step_rows, strict=True):
            rows[piece.slot].append(logits)
    return [torch.cat(parts) for parts in rows]


def _logits(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        logits: torch.Tensor = file.get_tensor("logits")
    return logits


def _batches(sequences: Sequences, plan: WorkerPlan) -> list[ScheduledBatch]:
    """All prompts as the first step, then one given token of every unfinished sequence a step."""
    blocks = BlockManager(plan.num_blocks, plan.config.block_size)
    setups = [SlotSetup(slot, 0, 0.0, 0, 1.0, len(ids)) for slot, ids in enumerate(sequences.ids)]
    batches = []
    for step in range(sequences.num_decode + 1):
        pieces = []
        for slot, (ids, num_prompt) in enumerate(
            zip(sequences.ids, sequences.num_prompt, strict=True)
        ):
            start, stop = (
                (0, num_prompt) if step == 0 else (num_prompt + step - 1, num_prompt + step)
            )
            if stop <= len(ids):
                new = blocks.extend(slot, stop)
                pieces.append(
                    ScheduledPiece(slot, start, stop - start, ids[start:stop], [new], True)
                )
        batches.append(ScheduledBatch(0, step, setups if step == 0 else [], pieces))
    return batches


def verify(
    model: PreparedModel,
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    *,
    num_decode: int = 32,
    reference: str | Reference = "uncut",
    pool: WorkerPool | None = None,
) -> Certificate:
    """Compares the model cut as `config` says with the whole model.

    `reference` is "uncut" (this engine on one rank), "transformers", or what either gave before for
    the same prompts. Raises UserError for what cannot run, EngineError when a rank fails.
    """
    plan = make_plan(model, config)
    if len(prompts) > config.max_num_seqs:
        raise ConfigError(
            f"{len(prompts)} prompts exceed max_num_seqs={config.max_num_seqs}; give fewer"
        )
    if num_decode < 0:
        raise ConfigError(f"num_decode={num_decode} must be at least 0")
    for index, prompt in enumerate(prompts):
        check_prompt(plan, index, prompt, num_decode)
    with tempfile.TemporaryDirectory(prefix="bireme-verify-") as folder:
        own_pool = pool or WorkerPool()
        try:
            comparison = _Comparison(model, config, plan, own_pool, Path(folder))
            return comparison.run([list(prompt) for prompt in prompts], num_decode, reference)
        finally:
            if pool is None:
                own_pool.close()


class _Comparison:
    """Runs both sides; `folder` holds what they computed."""

    def __init__(
        self,
        model: PreparedModel,
        config: EngineConfig,
        plan: WorkerPlan,
        pool: WorkerPool,
        folder: Path,
    ) -> None:
        self._model, self._config, self._plan, self._pool, self._folder = (
            model,
            config,
            plan,
            pool,
            folder,
        )
        uncut = dataclasses.replace(
            config,
            parallel=ParallelConfig(),
            devices=None,
            device="cpu" if plan.devices[0] == "cpu" else "cuda",
            memory_limit_bytes=None,
        )
        self._uncut_plan = make_plan(model, uncut)

    def run(
        self, prompts: list[list[int]], num_decode: int, reference: str | Reference
    ) -> Certificate:
        if isinstance(reference, str):
            reference = self._reference(prompts, num_decode, reference)
        found = self._lead(self._plan, reference.sequences, "cut", probes=False)
        certificate = self._compare(reference, found)
        if certificate.is_same:
            return certificate
        return dataclasses.replace(
            certificate, departure=self._first_departure(reference.sequences)
        )

    def _reference(self, prompts: list[list[int]], num_decode: int, name: str) -> Reference:
        if name == "transformers":
            device = self._plan.devices[0]
            return transformers_reference(
                self._model, prompts, num_decode, self._plan.dtype, device
            )
        if name == "uncut":
            return self._uncut(prompts, num_decode)
        raise ConfigError(f"reference {name!r} is not known; use uncut or transformers")

    def _lead(
        self, plan: WorkerPlan, sequences: Sequences, name: str, *, probes: bool
    ) -> list[torch.Tensor]:
        folder = self._folder / name
        folder.mkdir()
        executor = WorkerExecutor(plan, self._pool)
        logits = lead(executor, plan, sequences, folder, probes=probes)
        executor.close()
        return logits

    def _uncut(self, prompts: list[list[int]], num_decode: int) -> Reference:
        """Greedy continuations by one rank, and its logits along them."""
        executor = WorkerExecutor(self._uncut_plan, self._pool)
        sequences = Sequences(
            [_continue(executor, self._uncut_plan, prompt, num_decode) for prompt in prompts],
            [len(p) for p in prompts],
        )
        folder = self._folder / "uncut"
        folder.mkdir()
        expected = lead(executor, self._uncut_plan, sequences, folder, probes=False)
        executor.close()
        return Reference("uncut", sequences, expected)

    def _compare(self, reference: Reference, found: list[torch.Tensor]) -> Certificate:
        plan, sequences, expected = self._plan, reference.sequences, reference.logits
        spread = float(torch.cat(expected).std())
        difference = torch.cat([(a - b).abs() for a, b in zip(expected, found, strict=True)])
        tolerance = TOLERANCES[plan.dtype]
        agreement = [
            _agreement(a, b, tolerance * spread) for a, b in zip(expected, found, strict=True)
        ]
        same, excused = (torch.cat([part[index] for part in agreement]) for index in (0, 1))
        is_prefill = torch.cat(
            [
                torch.arange(len(ids)) < prompt
                for ids, prompt in zip(sequences.ids, sequences.num_prompt, strict=True)
            ]
        )
        worst = float(difference.max()) / spread
        return Certificate(
            model=self._model.name,
            layout=str(plan.config.parallel),
            layers_per_stage=plan.layers_per_stage,
            dtype=plan.dtype,
            device=plan.devices[0].partition(":")[0],
            reference=reference.name,
            num_prompts=len(sequences.ids),
            num_prefill_positions=int(is_prefill.sum()),
            num_decode_positions=int((~is_prefill).sum()),
            max_difference=float(difference.max()),
            mean_difference=float(difference.mean()),
            spread=spread,
            relative_difference=worst,
            tolerance=tolerance,
            prefill_agreement=float(same[is_prefill].float().mean()),
            decode_agreement=float(same[~is_prefill].float().mean())
            if (~is_prefill).any()
            else 1.0,
            num_excused=int((~same & excused).sum()),
            departure=None,
            is_same=worst <= tolerance and bool((same | excused).all()),
        )

    def _first_departure(self, sequences: Sequences) -> Departure | None:
        """A second pass that keeps every layer's results of both sides."""
        self._lead(self._uncut_plan, sequences, "uncut-probes", probes=True)
        self._lead(self._plan, sequences, "cut-probes", probes=True)
        whole = model_layout(self._model.config, ParallelConfig())
        cut = model_layout(self._model.config, self._config.parallel)
        localiser = _Localiser(
            self._source(whole), self._plan, whole, cut, TOLERANCES[self._plan.dtype]
        )
        for batch in _batches(sequences, self._plan):
            reference = _read_capture(capture_path(self._folder / "uncut-probes", batch.step_id, 0))
            ids = torch.tensor([id_ for piece in batch.pieces for id_ in piece.token_ids or []])
            for rank in range(self._config.parallel.world_size):
                path = capture_path(self._folder / "cut-probes", batch.step_id, rank)
                localiser.add(batch.step_id, rank, reference, _read_capture(path), ids)
            if localiser.found:
                return min(localiser.found)[2]
        return None

    def _source(self, whole: ModelLayout) -> TensorSource:
        if self._plan.folder is None:
            return DummySource(whole.sources, self._config.seed)
        return open_folder(self._plan.folder)


def transformers_reference(
    model: PreparedModel,
    prompts: Sequence[Sequence[int]],
    num_decode: int,
    dtype: str,
    device: str = "cpu",
) -> Reference:
    """What transformers computes, token by token and then in one pass over each whole sequence."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            "reference transformers needs that package; pip install transformers"
        ) from None
    oracle = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    oracle = oracle.eval().to(device)
    rope = model.config.rope
    greedy = _greedy_at_full_length if rope and depends_on_length(rope) else _greedy
    reference = Reference("transformers", Sequences([], []), [])
    with torch.inference_mode():
        for prompt in prompts:
            ids = greedy(oracle, torch.tensor([list(prompt)], device=device), num_decode)
            reference.sequences.ids.append(ids[0].tolist())
            reference.sequences.num_prompt.append(len(prompt))
            reference.logits.append(oracle(ids).logits[0].float().cpu())
    return reference


def _greedy(oracle: Any, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[1, T] ids -> [1, T + num_tokens], with a cache."""
    parts, cache = [prompt], None
    for _ in range(num_tokens):
        out = oracle(parts[-1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(parts, dim=-1)


def _greedy_at_full_length(oracle: Any, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The same where frequencies depend on length, as they are at the final one: every pass has
    that length, and what lies behind the last known token is not seen by those before it."""
    oracle(
        prompt[:, :1]
    )  # transformers keeps the frequencies of the longest so far until a short one
    ids = torch.nn.functional.pad(prompt, (0, num_tokens))
    for at in range(prompt.shape[1], ids.shape[1]):
        ids[0, at] = oracle(ids).logits[0, at - 1].argmax()
    return ids


def _continue(
    executor: WorkerExecutor, plan: WorkerPlan, prompt: list[int], num_tokens: int
) -> list[int]:
    """The prompt and its greedy continuation of exactly `num_tokens`."""
    blocks = BlockManager(plan.num_blocks, plan.config.block_size)
    ids = list(prompt)
    for step in range(num_tokens):
        start = 0 if step == 0 else len(ids) - 1
        new = blocks.extend(0, len(ids))
        piece = ScheduledPiece(0, start, len(ids) - start, ids[start:], [new], True)
        setups = [SlotSetup(0, 0, 0.0, 0, 1.0, len(prompt) + num_tokens)] if step == 0 else []
        executor.submit(ScheduledBatch(0, step, setups, [piece]))
        ids.extend(executor.collect().token_ids[0])
    return ids


def _agreement(
    expected: torch.Tensor, found: torch.Tensor, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [T] each: same greedy token; and the reference's two best closer than `margin`."""
    best = expected.topk(2, dim=-1).values
    return expected.argmax(-1) == found.argmax(-1), best[:, 0] - best[:, 1] < 2 * margin


def _read_capture(path: Path) -> dict[str, torch.Tensor]:
    """In the order in which it was computed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        order = json.loads(file.metadata()["order"])
    return {key: tensors[key] for key in order}


class _Localiser:
    """Compares a rank's results with the whole model's, each with the part that it should be."""

    def __init__(
        self,
        source: TensorSource,
        plan: WorkerPlan,
        whole: ModelLayout,
        cut: ModelLayout,
        tolerance: float,
    ) -> None:
        self._source, self._plan, self._cut, self._tolerance = source, plan, cut, tolerance
        self._whole = {param.name: param for param in whole.ranks[0].params}
        self.found: list[tuple[int, int, Departure]] = []

    def add(
        self,
        step: int,
        rank: int,
        reference: dict[str, torch.Tensor],
        local: dict[str, torch.Tensor],
        ids: torch.Tensor,
    ) -> None:
        """Notes the first key at which `rank` departs, if any."""
        params = {param.name: param for param in self._cut.ranks[rank].params}
        for position, key in enumerate(reference):
            if key not in local or key == "logits":
                continue
            expected = self._expected(key, reference, params, rank, ids)
            # a norm over heads (q_norm) is whole on every rank, its results are of local heads
            if expected is None or expected.shape != local[key].shape:
                continue
            # a sum of partial results rounds at the scale of its largest addend
            scale = max(float(expected.std()), float(local[key].std()), 1e-6)
            off = float((expected - local[key]).abs().max()) / scale
            if not off <= 10 * self._tolerance:
                self.found.append((position, rank, self._departure(step, rank, key, off)))
                return

    def _departure(self, step: int, rank: int, key: str, off: float) -> Departure:
        name, _, what = key.partition(":")
        digits = [part for part in name.split(".") if part.isdigit()]
        said = {"out": "result of", "in": "input of", "partial": "addend of", "": "result of"}[what]
        return Departure(step, int(digits[0]) if digits else None, rank, f"{said} {name}", off)

    def _expected(
        self,
        key: str,
        reference: dict[str, torch.Tensor],
        params: dict[str, ParamLayout],
        rank: int,
        ids: torch.Tensor,
    ) -> torch.Tensor | None:
        """What the rank should have computed; None where the whole cannot say."""
        name, _, what = key.partition(":")
        layout = params.get(name)
        if layout is None or layout.cut == "replicated":
            return reference[key]
        if len(layout.shape) == 3:
            return reference[key] if what == "out" else None
        if layout.cut == "column":
            return reference[key][:, self._rows(layout)]
        if what == "out":
            return reference[key]
        if layout.cut == "vocabulary":
            width = self._plan.config.parallel.widths[self._cut.ranks[rank].stage]
            vocab = self._plan.model.vocab_size
            first, last = vocabulary_range(vocab, width, self._cut.ranks[rank].tp_rank)
            return reference[f"{name}:out"] * ((ids >= first) & (ids < last)).unsqueeze(-1)
        columns = slice(*layout.pieces[0].box[1])
        addend = reference[f"{name}:in"][:, columns]
        return addend if what == "in" else addend @ self._weight(layout)[:, columns].T

    def _rows(self, layout: ParamLayout) -> torch.Tensor:
        """Where the local rows lie in the whole model's parameter."""
        rows = []
        for piece in layout.pieces:
            home = next(
                other
                for other in self._whole[layout.name].pieces
                if other.source.name == piece.source.name
                and other.box[0][0] <= piece.box[0][0]
                and piece.box[0][1] <= other.box[0][1]
            )
            shift = home.local[0][0] - home.box[0][0]
            rows.append(torch.arange(piece.box[0][0] + shift, piece.box[0][1] + shift))
        return torch.cat(rows)

    def _weight(self, layout: ParamLayout) -> torch.Tensor:
        source: Source = self._plan.names.source(layout.pieces[0].source)
        dtype = self._source.tensors[source.name].dtype
        bits: NDArray[Any] = np.empty(box_shape(full_box(source.shape)), dtype=bits_dtype(dtype))
        self._source.read(source, full_box(source.shape), bits)
        whole = torch.from_numpy(bits).view(_FILE_DTYPES[dtype])
        return whole.to(getattr(torch, self._plan.dtype)).float()


def certificate_json(certificate: Certificate) -> str:
    return json.dumps(asdict(certificate), indent=1)


def certificate_text(found: Certificate) -> str:
    """A certificate for people, in a few lines."""
    verdict = "the same model" if found.is_same else "NOT the same model"
    lines = [
        f"{found.model} at {found.layout} ({found.dtype}, {found.device}) against {found.reference}: {verdict}",
        f"  compared       {found.num_prefill_positions} prefill and {found.num_decode_positions} decode positions "
        f"of {found.num_prompts} prompts",
        f"  logits         max |difference| {found.max_difference:.2e}, mean {found.mean_difference:.2e}, "
        f"spread {found.spread:.2f}",
        f"  relative       {found.relative_difference:.1e} of the spread; {found.tolerance:.0e} is allowed",
        f"  greedy tokens  {found.prefill_agreement:.2%} of prefill, {found.decode_agreement:.2%} of decode"
        + (f"; {found.num_excused} near ties" if found.num_excused else ""),
    ]
    if found.departure is not None:
        lines.append(f"  departs first at {found.departure}")
    return "\n".join(lines)
