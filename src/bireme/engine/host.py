"""A model made ready in this program: its plan, its ranks, its engine, and the way in for prompts.

Its ranks import torch while this process does: what brings it is imported once they have begun.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from bireme.chrome_trace import Recorded, chrome_trace
from bireme.config import EngineConfig, ParallelConfig, check_settings
from bireme.engine.engine import Engine
from bireme.engine.input_processor import InputProcessor
from bireme.engine.joining import threads_per_rank
from bireme.engine.messages import Loaded
from bireme.engine.pool import WorkerPool
from bireme.engine.scheduler import Scheduler
from bireme.engine.service_messages import RingPlace, Stats
from bireme.engine.setup import RankSetup, Setup, environment, num_cores
from bireme.errors import ConfigError, EngineError
from bireme.text.tokenizer import Message, Tokenizer
from bireme.trace import RankSpans, Span, SpanRing

if TYPE_CHECKING:
    from bireme.checkpoint.prepared import PreparedModel
    from bireme.engine.executor import WorkerExecutor
    from bireme.parallel.mesh import Mesh


class EngineHost:
    """Base of `LLM` and `AsyncLLM`: everything but how outputs are handed over.

    Making one raises UserError for what cannot work; no rank has been told anything before.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tensor_parallel_size: int | Sequence[int] | str = 1,
        pipeline_parallel_size: int | None = None,
        layers_per_stage: Sequence[int] | None = None,
        pool: WorkerPool | None = None,
        **settings: Any,
    ) -> None:
        is_auto = tensor_parallel_size == "auto"
        if isinstance(tensor_parallel_size, str) and not is_auto:
            raise ConfigError(
                f"tensor_parallel_size {tensor_parallel_size!r} is neither a number nor 'auto'"
            )
        widths = 1 if isinstance(tensor_parallel_size, str) else tensor_parallel_size
        parallel = ParallelConfig.of(
            tuple(widths) if isinstance(widths, Sequence) else widths,
            pipeline_parallel_size,
            tuple(layers_per_stage) if layers_per_stage is not None else None,
        )
        check_settings(settings, EngineHost.__init__.__kwdefaults__ or ())
        config = EngineConfig(parallel=parallel, **settings)
        self._prepare(str(model), config, is_auto, pool)

    @classmethod
    def of(cls, model: str, config: EngineConfig, *, is_auto: bool = False) -> Self:
        """From settings that are put together already; `is_auto`: the smallest width that fits."""
        host = cls.__new__(cls)
        host._prepare(model, config, is_auto, None)
        return host

    def _prepare(
        self, model: str, config: EngineConfig, is_auto: bool, pool: WorkerPool | None
    ) -> None:
        self._own_pool, self._pool = pool is None, pool or WorkerPool()
        self._executor: WorkerExecutor | None = None
        self._engine: Engine | None = None
        self._spans: SpanRing | None = None  # the engine's own
        self._begun_ns = 0
        self._ending = weakref.finalize(self, self._pool.close)  # where nobody starts or closes it
        if not self._own_pool:
            self._ending.detach()
        try:
            if self._own_pool and not is_auto:
                self._pool.start(config.parallel.world_size)
            self._plan_for(model, config, is_auto)
        except BaseException:
            if self._own_pool:
                self._pool.close()
            raise

    def _plan_for(self, model: str, config: EngineConfig, is_auto: bool) -> None:
        from bireme.checkpoint.prepared import prepare_model
        from bireme.engine.prepare import make_plan, resolve_auto_width, served_model

        self.model: PreparedModel = prepare_model(
            model, needs_weights=config.load_format != "dummy"
        )
        self.config = resolve_auto_width(self.model, config) if is_auto else config
        self.plan = make_plan(self.model, self.config)
        self.inputs = InputProcessor(served_model(self.model, self.plan))

    def start(self) -> Engine:
        """Starts the ranks unless they run; RankError where one of them fails."""
        if self._executor is not None and self._executor.is_broken:
            raise EngineError("a rank of this model failed before; close it and make a new LLM")
        if self._engine is None:
            from bireme.engine.executor import WorkerExecutor
            from bireme.engine.prepare import scheduler_limits

            self._begun_ns = time.monotonic_ns()
            self._ending.detach()  # what runs may be held by others
            self._executor = WorkerExecutor(self.plan, self._pool)
            self._spans = SpanRing.create()
            scheduler = Scheduler(scheduler_limits(self.plan), self.plan.kinds)
            self._engine = Engine(scheduler, self._executor, spans=self._spans)
        return self._engine

    def close(self) -> None:
        """Ends the ranks, or gives them back to the pool that was passed in; a later use starts them
        again."""
        executor, self._executor, self._engine = self._executor, None, None
        spans, self._spans = self._spans, None
        if spans is not None:
            spans.close()
        if executor is not None and self._own_pool:
            executor.forget()
        elif executor is not None:
            executor.close()
        if self._own_pool:
            self._pool.close()

    @property
    def executor(self) -> WorkerExecutor:
        """The running ranks; EngineError before they started or after they ended."""
        if self._executor is None:
            raise EngineError("no rank is running; start the model first")
        return self._executor

    @property
    def loaded(self) -> list[Loaded]:
        """What each rank holds and read, in bytes."""
        return self.executor.loaded

    def describe(self) -> list[str]:
        """Lines for people, once the ranks run: the layout, what each rank holds and read, what the
        cache holds and why not more."""
        plan = self.plan
        device = plan.devices[0].partition(":")[0]
        ranks = zip(plan.rank_names, self.loaded, strict=True)
        return [
            f"{self.model.name}: {plan.config.parallel}, {plan.dtype}, {device}",
            *(f"  {name}: {loaded.describe()}" for name, loaded in ranks),
            f"  {plan.budget.describe(plan.rank_names)}",
        ]

    def setup(self) -> Setup:
        """How it runs; EngineError before the ranks started."""
        plan = self.plan
        return Setup(
            model=self.model.name,
            folder=str(self.model.folder.absolute()),
            dtype=plan.dtype,
            transport=plan.config.transport,
            ranks=[
                RankSetup(
                    it.name, it.stage, it.tp_rank, device, threads_per_rank(len(plan.devices))
                )
                for it, device in zip(self.ring_places(), plan.devices, strict=True)
            ],
            num_cores=num_cores(),
            environment=environment(),
            num_requests=float(plan.budget.num_requests),
        )

    def stats(self) -> Stats:
        """Plain counts, each right by itself, read while the engine goes on: no step waits for them."""
        scheduler = self.start().scheduler
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            cache_usage=scheduler.blocks.usage,
            num_preemptions_total=scheduler.num_preemptions,
            prefix_queries_total=scheduler.num_prefix_queries,
            prefix_hits_total=scheduler.num_prefix_hits,
            ranks=self.executor.rank_stats(),
        )

    def spans(self) -> dict[str, list[Span]]:
        """The newest spans of every rank."""
        return self.executor.spans()

    def ring_places(self) -> list[RingPlace]:
        """Where other processes find what the ranks write."""
        paths = self.executor.ring_paths()
        return [
            RingPlace(mesh.name, mesh.stage, mesh.tp_rank, device, paths[mesh.name])
            for mesh, device in zip(self._meshes(), self.plan.devices, strict=True)
        ]

    def _meshes(self) -> list[Mesh]:
        """Of all ranks."""
        from bireme.parallel.mesh import Mesh

        widths = self.plan.config.parallel.widths
        return [Mesh(widths, rank) for rank in range(sum(widths))]

    @property
    def engine_ring(self) -> str:
        """And where what the engine writes itself."""
        assert self._spans is not None, "it runs"
        return self._spans.path

    def engine_spans(self) -> list[Span]:
        """The newest spans of the engine itself; EngineError before it started."""
        if self._spans is None:
            raise EngineError("no rank is running; start the model first")
        return self._spans.read()

    def write_trace(self, path: str | Path) -> None:
        """A Chrome/Perfetto trace of the newest spans, a track a rank and one for the engine."""
        Path(path).write_bytes(msgspec.json.encode(chrome_trace(self.recorded())))

    def recorded(self) -> Recorded:
        """The newest spans of all since the ranks were this model's, to be written down or accounted for."""
        told_by, ranks = self.executor.spans(self._begun_ns), []
        for mesh in self._meshes():
            own = [span for span in told_by[mesh.name] if span.start_ns >= self._begun_ns]
            ranks.append(RankSpans(mesh.name, mesh.stage, mesh.tp_rank, own))
        told = self.engine_spans()
        if self._engine is not None and not self._engine.has_unfinished:
            told.append(Span.empty_since(told))
        return Recorded(ranks, told)

    # --- the way in ----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """CheckpointError where the model has none."""
        return self.inputs.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Token ids work without any tokenizer file; texts of outputs are empty then."""
        return self.inputs.has_tokenizer

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a conversation; the template writes the special tokens itself."""
        return self.inputs.chat_ids(messages)
