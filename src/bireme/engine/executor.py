"""The executor of real workers: one process a rank, steps out, outputs back in order."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from bireme.checkpoint.names import NameMap
from bireme.config import DTYPE_BYTES, EngineConfig
from bireme.engine.budget import CacheBudget
from bireme.engine.channel import Steps
from bireme.engine.deadline import StepsInFlight, step_size
from bireme.engine.joining import WorldPlan, join_world, threads_per_rank
from bireme.engine.messages import (
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
from bireme.engine.pool import WorkerPool
from bireme.engine.rank_stats import RankBytes, RankStats, RankWatch
from bireme.engine.world import World
from bireme.errors import EngineError
from bireme.kernels.cpu.library import library
from bireme.model_config import ModelConfig
from bireme.native import is_switched_off
from bireme.parallel.layout import CacheKind
from bireme.parallel.mesh import Mesh
from bireme.request import (
    WARM_UP_STEP,
    SamplingSetup,
    ScheduledBatch,
    ScheduledPiece,
    SlotSetup,
    StepHeader,
    StepMasks,
    StepOutput,
)
from bireme.trace import Span

T = TypeVar("T", bound=msgspec.Struct)
_LONG_PROMPT = 65  # tokens, of which graphs leave out the last layer


def _has_c_kernels() -> bool:
    """Whether ranks that start with the environment as it is now can load them."""
    return not is_switched_off() and library() is not None


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """Everything that the ranks are told to become one model; made before any of them is told anything."""

    model: ModelConfig
    config: EngineConfig
    layers_per_stage: tuple[int, ...]
    folder: Path | None
    names: NameMap
    budget: CacheBudget
    max_model_len: int
    dtype: str
    devices: tuple[str, ...]

    @property
    def kinds(self) -> tuple[CacheKind, ...]:
        return self.budget.kinds

    @property
    def rank_names(self) -> list[str]:
        widths = self.config.parallel.widths
        return [Mesh(widths, rank).name for rank in range(sum(widths))]


class WorkerExecutor:
    """Ranks of one model in processes of `pool`."""

    def __init__(self, plan: WorkerPlan, pool: WorkerPool) -> None:
        self._plan = plan
        self._waiting: deque[StepHeader] = deque()
        self._steps = StepsInFlight(plan.config.step_timeout_s)
        self._was_awaited = False  # the oldest output came while `wait` looked
        self._held = ExitStack()  # what the ranks share, for as long as their world is there
        self._world = World(
            pool, plan.rank_names, plan.config.parallel.widths, plan.config.step_timeout_s
        )
        try:
            steps = self._join()
            self.loaded = self._load()
            self._watches = self._watch()
            steps.remove()  # all have heard something by now
            self._make_first_step()
        except BaseException:
            self._abandon(pool)
            raise

    def _abandon(self, pool: WorkerPool) -> None:
        self._held.close()
        if not self._world.is_broken:
            self._world.close()
            pool.close()

    def _join(self) -> Steps:
        plan, config = self._plan, self._plan.config
        row_bytes = plan.model.hidden_size * DTYPE_BYTES[plan.dtype]
        hidden_bytes = config.max_num_batched_tokens * row_bytes
        world = WorldPlan(
            widths=config.parallel.widths,
            devices=plan.devices,
            hidden_bytes=hidden_bytes,
            sampled_bytes=8 * (config.max_num_seqs + 1),
            num_threads=threads_per_rank(len(plan.devices)),
            transport=config.transport,
            step_timeout_s=config.step_timeout_s,
            start_timeout_s=config.start_timeout_s,
            row_bytes=row_bytes,
            sum_bytes=0 if config.deterministic else hidden_bytes,
        )
        return join_world(self._world, world, self._held)

    def _load(self) -> list[Loaded]:
        plan = self._plan
        self._world.send_all(
            Load(
                model=plan.model,
                config=plan.config,
                layers_per_stage=plan.layers_per_stage,
                folder=str(plan.folder) if plan.folder else None,
                names=plan.names,
                kinds=plan.kinds,
                max_model_len=plan.max_model_len,
                dtype=plan.dtype,
                has_c_kernels=plan.devices[0] == "cpu" and _has_c_kernels(),
            )
        )
        replies = self._world.gather(plan.config.start_timeout_s, "loading its weights")
        return [reply for reply in replies if isinstance(reply, Loaded)]

    def _make_first_step(self) -> None:
        """Of made-up tokens, before any request's: from here on every rank is known to work, what a step may take is
        learned, and a GPU's kernels for long prompts are compiled."""
        config, kinds = self._plan.config, self._plan.kinds
        wanted = 1 if self._plan.devices[0] == "cpu" else -(-_LONG_PROMPT // config.block_size)
        num_blocks = min((wanted, *(kind.num_blocks - 1 for kind in kinds)))
        most = min(config.max_num_batched_tokens, self._plan.max_model_len)
        num_tokens = min(num_blocks * config.block_size, most)
        blocks = list(range(1, 1 + -(-num_tokens // config.block_size)))
        setup = SlotSetup(0, num_tokens, SamplingSetup(seed=0))
        piece = ScheduledPiece(
            0, 0, num_tokens, [0] * num_tokens, [blocks] * len(kinds), samples=True
        )
        self.submit(ScheduledBatch(0, WARM_UP_STEP, [setup], [piece]))
        self.collect()

    def _watch(self) -> list[RankWatch]:
        """All ranks, from here on: they are loaded, and none is in the middle of anything."""
        plan, watches = self._plan, []
        for index, (rank, loaded) in enumerate(zip(self._world.ranks, self.loaded, strict=True)):
            step_bytes = plan.budget.ranks[index].activation_bytes
            memory = RankBytes(loaded.weight_bytes, loaded.cache_bytes, step_bytes)
            stage = Mesh(plan.config.parallel.widths, index).stage
            watches.append(RankWatch(stage, index, rank.spans, memory, rank.process.pid))
        return watches

    @property
    def is_broken(self) -> bool:
        """True once a rank failed or the world was left."""
        return self._world.is_broken

    def submit(self, batch: ScheduledBatch) -> None:
        self._waiting.append(batch.header)
        is_tiled = self._plan.config.deterministic
        self._steps.begin(batch.header[1], step_size(batch.pieces, is_tiled=is_tiled))
        self._world.send_all(Execute(batch), self._steps.patience_with_all())

    def give_masks(self, masks: StepMasks) -> None:
        self._world.send_all(Masks(masks), self._steps.patience_with_all())

    def wait(self, wake: int) -> bool:
        if not self._waiting:
            return self._world.wait_idle(wake)
        self._was_awaited = not self._world.has_reply()
        return self._world.wait(wake, self._steps.patience_with_oldest(), self._steps.oldest)

    def collect(self) -> StepOutput:
        expected = self._waiting[0]
        was_there, self._was_awaited = self._world.has_reply() and not self._was_awaited, False
        reply = self._world.step_reply(self._steps.patience_with_oldest(), expected[1])
        if not isinstance(reply, Output):
            raise EngineError(f"a rank answered step {expected[1]} with {type(reply).__name__}")
        output = reply.output
        if (output.incarnation, output.step_id) != expected:
            raise EngineError(
                f"step {output.step_id} was answered where {expected[1]} was expected"
            )
        self._waiting.popleft()
        self._steps.end(is_bound=was_there)
        return output

    def give_up(self) -> None:
        """Ends the ranks at once; their spans can still be read."""
        self._world.give_up()

    def capture(self, folder: Path | None, *, probes: bool = False) -> None:
        """From the next step on, ranks write what they compute under `folder`; None stops it."""
        self._ask(Capture(str(folder) if folder else None, probes), Done, "starting to capture")

    def usage(self) -> list[RankUsage]:
        """What every rank holds between steps; the spans of all steps so far are written by then."""
        return self._ask(ReadUsage(), RankUsage, "saying what it holds")

    def begin_profile(self, kernels: Path | None = None) -> None:
        """From the next step on, ranks note what every layer takes, or with `kernels`, a path with
        `{rank}` in it, let torch.profiler write traces there. Steps are slower meanwhile."""
        self._ask(BeginProfile(str(kernels) if kernels else None), Done, "starting to profile")

    def end_profile(self) -> list[Profiled]:
        """What every rank saw."""
        return self._ask(EndProfile(), Profiled, "ending its profile")

    def _ask(self, command: msgspec.Struct, kind: type[T], doing: str) -> list[T]:
        """One reply a rank; while no step is in flight."""
        self._world.send_all(command)
        replies = self._world.gather(self._plan.config.step_timeout_s, doing)
        for reply in replies:
            if not isinstance(reply, kind):
                raise EngineError(f"a rank answered {doing} with {type(reply).__name__}")
        return [reply for reply in replies if isinstance(reply, kind)]

    def spans(self, since_ns: int = 0) -> dict[str, list[Span]]:
        """Every rank's spans since then, by the rank's name."""
        return self._world.spans(since_ns)

    def ring_paths(self) -> dict[str, str]:
        """Where every rank's ring can be opened, by the rank's name."""
        names = self._plan.rank_names
        return {name: rank.spans.path for name, rank in zip(names, self._world.ranks, strict=True)}

    def rank_stats(self) -> list[RankStats]:
        """What every rank did since it was loaded; from one thread at a time, at any time."""
        return [watch.stats() for watch in self._watches]

    def close(self) -> None:
        """Ranks drop the model and leave; their processes stay with the pool."""
        try:
            if not self._world.is_broken:
                while self._waiting:  # of a stream that nobody took to its end
                    self.collect()
                self._world.leave(self._plan.config.step_timeout_s)
        finally:
            self._held.close()

    def forget(self) -> None:
        """Lets go of ranks that are about to be ended with their pool."""
        self._held.close()
        if not self._world.is_broken:
            self._world.close()
