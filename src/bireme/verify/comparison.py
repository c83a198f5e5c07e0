"""Compares a cut model with the whole one, logit by logit.

The uncut model (or transformers) continues some prompts greedily. Then both models are led through
the same tokens, prompts first and the rest one by one, and every logit is compared. Where they
depart, a second pass compares what every layer of every rank computed, and names the first.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bireme.checkpoint.dummy import DummySource
from bireme.checkpoint.manifest import is_artifact, read_manifest
from bireme.checkpoint.opener import open_folder
from bireme.checkpoint.prepared import PreparedModel
from bireme.checkpoint.reader import TensorSource
from bireme.config import EngineConfig, ParallelConfig
from bireme.engine.capture import capture_path
from bireme.engine.executor import WorkerExecutor, WorkerPlan
from bireme.engine.input_processor import check_prompt
from bireme.engine.pool import WorkerPool
from bireme.engine.prepare import make_plan, served_model
from bireme.errors import CapacityError, ConfigError
from bireme.models.registry import model_layout
from bireme.parallel.layout import ModelLayout
from bireme.verify.certificate import (
    ROUTED_TOLERANCES,
    TOLERANCES,
    Certificate,
    Departure,
    Tolerance,
)
from bireme.verify.departure import Localiser, read_capture
from bireme.verify.oracle import transformers_reference
from bireme.verify.sequences import Reference, Sequences, batches_of, continue_greedily, lead


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
        check_prompt(served_model(model, plan), index, prompt, num_decode)
    artifact = read_manifest(model.folder).xxh3 if is_artifact(model.folder) else None
    with tempfile.TemporaryDirectory(prefix="bireme-verify-") as folder:
        own_pool = pool or WorkerPool()
        try:
            comparison = _Comparison(model, config, plan, own_pool, Path(folder))
            found = comparison.run([list(prompt) for prompt in prompts], num_decode, reference)
            return dataclasses.replace(found, artifact=artifact)
        finally:
            if pool is None:
                own_pool.close()


def uncut_reference(
    model: PreparedModel,
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    num_decode: int = 32,
) -> Reference:
    """What this engine computes on one rank as `config` says: a reference for `verify` of another dtype."""
    alone = dataclasses.replace(config, parallel=ParallelConfig(), devices=None)
    plan = make_plan(model, alone)
    with WorkerPool() as pool, tempfile.TemporaryDirectory(prefix="bireme-verify-") as folder:
        comparison = _Comparison(model, alone, plan, pool, Path(folder))
        return comparison.uncut(plan, [list(prompt) for prompt in prompts], num_decode)


def compare(
    model_name: str, plan: WorkerPlan, reference: Reference, found: list[torch.Tensor]
) -> Certificate:
    """Sums up how far `found`, float32 [T, V] of each sequence, is from the reference's logits."""
    sequences, expected = reference.sequences, reference.logits
    spread = float(torch.cat(expected).std())
    difference = torch.cat([(a - b).abs() for a, b in zip(expected, found, strict=True)])
    largest, mean, tolerance = float(difference.max()), float(difference.mean()), tolerance_of(plan)
    relative, relative_mean = _in_spreads(largest, spread), _in_spreads(mean, spread)
    near_tie = tolerance.near_tie * spread
    agreement = [_agreement(a, b, near_tie) for a, b in zip(expected, found, strict=True)]
    same, excused = (torch.cat([part[index] for part in agreement]) for index in (0, 1))
    is_prefill = torch.cat(
        [
            torch.arange(len(ids)) < prompt
            for ids, prompt in zip(sequences.ids, sequences.num_prompt, strict=True)
        ]
    )
    num_not_finite = sum(int((~logits.isfinite()).sum()) for logits in (*expected, *found))
    is_close = relative <= tolerance.largest and relative_mean <= tolerance.mean
    return Certificate(
        model=model_name,
        layout=str(plan.config.parallel),
        widths=plan.config.parallel.widths,
        layers_per_stage=plan.layers_per_stage,
        dtype=plan.dtype,
        device=plan.devices[0].partition(":")[0],
        reference=reference.name,
        num_prompts=len(sequences.ids),
        num_prefill_positions=int(is_prefill.sum()),
        num_decode_positions=int((~is_prefill).sum()),
        max_difference=largest,
        mean_difference=mean,
        spread=spread,
        relative_difference=relative,
        tolerance=tolerance.largest,
        relative_mean=relative_mean,
        mean_tolerance=tolerance.mean,
        prefill_agreement=float(same[is_prefill].float().mean()),
        decode_agreement=float(same[~is_prefill].float().mean()) if (~is_prefill).any() else 1.0,
        num_excused=int((~same & excused).sum()),
        num_not_finite=num_not_finite,
        departure=None,
        departure_unknown=None,
        is_same=is_close and bool((same | excused).all()) and not num_not_finite,
    )


def tolerance_of(plan: WorkerPlan) -> Tolerance:
    return (ROUTED_TOLERANCES if plan.model.moe else TOLERANCES)[plan.dtype]


def _in_spreads(difference: float, spread: float) -> float:
    return difference / spread if spread else math.inf if difference else 0.0


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
        self._uncut_plan = self._plan_uncut()  # before the ranks hold any memory

    def _plan_uncut(self) -> WorkerPlan | CapacityError:
        """The error, if the uncut model needs several devices: not every comparison runs it."""
        uncut = dataclasses.replace(
            self._config,
            parallel=ParallelConfig(),
            devices=None,
            device="cpu" if self._plan.devices[0] == "cpu" else "cuda",
            memory_limit_bytes=None,
        )
        try:
            return make_plan(self._model, uncut)
        except CapacityError as error:
            return error

    def run(
        self, prompts: list[list[int]], num_decode: int, reference: str | Reference
    ) -> Certificate:
        if isinstance(reference, str):
            reference = self._reference(prompts, num_decode, reference)
        found = self._lead(self._plan, reference.sequences, "cut", probes=False)
        certificate = compare(self._model.name, self._plan, reference, found)
        if certificate.is_same:
            return certificate
        if isinstance(self._uncut_plan, CapacityError):
            return dataclasses.replace(certificate, departure_unknown=str(self._uncut_plan))
        departure = self._first_departure(self._uncut_plan, reference.sequences)
        return dataclasses.replace(certificate, departure=departure)

    def _reference(self, prompts: list[list[int]], num_decode: int, name: str) -> Reference:
        uncut = self._uncut_plan
        if name == "transformers":
            device = "cpu" if isinstance(uncut, CapacityError) else self._plan.devices[0]
            return transformers_reference(
                self._model, prompts, num_decode, self._plan.dtype, device
            )
        if name == "uncut":
            if isinstance(uncut, CapacityError):
                raise CapacityError(
                    f"reference uncut needs the model on one device: {uncut}; "
                    "or use reference transformers"
                )
            return self.uncut(uncut, prompts, num_decode)
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

    def uncut(self, plan: WorkerPlan, prompts: list[list[int]], num_decode: int) -> Reference:
        """Greedy continuations by one rank, and its logits along them."""
        executor = WorkerExecutor(plan, self._pool)
        sequences = Sequences(
            [continue_greedily(executor, plan, prompt, num_decode) for prompt in prompts],
            [len(p) for p in prompts],
        )
        folder = self._folder / "uncut"
        folder.mkdir()
        expected = lead(executor, plan, sequences, folder, probes=False)
        executor.close()
        return Reference("uncut", sequences, expected)

    def _first_departure(self, uncut: WorkerPlan, sequences: Sequences) -> Departure | None:
        """A second pass that keeps every layer's results of both sides."""
        self._lead(uncut, sequences, "uncut-probes", probes=True)
        self._lead(self._plan, sequences, "cut-probes", probes=True)
        whole = model_layout(self._model.config, ParallelConfig())
        cut = model_layout(self._model.config, self._config.parallel)
        localiser = Localiser(self._source(whole), self._plan, whole, cut, tolerance_of(self._plan))
        for batch in batches_of(sequences, self._plan):
            reference = read_capture(capture_path(self._folder / "uncut-probes", batch.step_id, 0))
            ids = torch.tensor([id_ for piece in batch.pieces for id_ in piece.token_ids or []])
            for rank in range(self._config.parallel.world_size):
                path = capture_path(self._folder / "cut-probes", batch.step_id, rank)
                localiser.add(batch.step_id, rank, reference, read_capture(path), ids)
            if localiser.found:
                return min(localiser.found)[2]
        return None

    def _source(self, whole: ModelLayout) -> TensorSource:
        if self._plan.folder is None:
            return DummySource(whole.sources, self._config.seed)
        return open_folder(self._plan.folder)


def _agreement(
    expected: torch.Tensor, found: torch.Tensor, near_tie: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [T] each: same greedy token; and the reference's two best closer than `near_tie`."""
    best = expected.topk(2, dim=-1).values
    return expected.argmax(-1) == found.argmax(-1), best[:, 0] - best[:, 1] < near_tie
