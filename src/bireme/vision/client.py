"""A vision model for callers on one asyncio loop: its ranks, and the thread that drives them.

A thread and no process, as a language model's engine has: images go straight from a request's body to
the memory that the first stage reads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from bireme.config import format_bytes
from bireme.engine.inbox import Inbox
from bireme.engine.pool import WorkerPool
from bireme.engine.rank_stats import RankStats
from bireme.engine.service_messages import RingPlace
from bireme.engine.setup import RankSetup, Setup, environment, num_cores
from bireme.errors import ConfigError, EngineError
from bireme.trace import SpanRing
from bireme.vision.batching import BatchQueue
from bireme.vision.callers import ImageCallers
from bireme.vision.engine import Command, ImageEngine, ImageRequest
from bireme.vision.live import LivePipeline
from bireme.vision.messages import VISION
from bireme.vision.model import VisionModel
from bireme.vision.pipeline import RankSettings, joined, measure_blocks
from bireme.vision.plan import PipelinePlan, check_num_stages, make_plan
from bireme.vision.sweep import work_of
from bireme.vision.tracing import trace
from bireme.vision.weights import open_weights

_EXIT_S = 10.0
_MOST_DELAY_S = 60.0
_NUM_REPEATS = 2  # of the measurement: the server is to be there soon


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What is served. `points` are the blocks that begin a later stage; none: by measured cost."""

    model: VisionModel
    points: tuple[str, ...]
    ranks: RankSettings
    limit_bytes: int
    max_batch_size: int
    max_queue_delay_s: float
    max_queue_size: int  # images, those in flight among them

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.max_queue_delay_s <= _MOST_DELAY_S:
            raise ConfigError(
                f"max_queue_delay_ms={self.max_queue_delay_s * 1e3:g} must be from 0 to "
                f"{_MOST_DELAY_S * 1e3:g}"
            )


@dataclass(frozen=True)
class ImageReady:
    """Every rank has passed a micro-batch on. `told` are the lines for people."""

    num_classes: int
    told: list[str]
    setup: Setup
    rings: list[RingPlace]
    engine_ring: str


@dataclass(frozen=True)
class ImageStats:
    """Images that wait and that are in flight; those that end in `_total` since the start."""

    num_waiting: int
    num_running: int
    num_images_total: int
    num_micro_batches_total: int
    ranks: list[RankStats]


class ImageClient:
    """`doing` says what it is at before it is `ready`. The thread ends, and the ranks with it unless they
    are of a `pool` that was passed in, once this is closed or a rank fails."""

    def __init__(self, settings: ImageSettings, pool: WorkerPool | None = None) -> None:
        self.settings, self.doing = settings, "starting"
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[ImageReady] = self._loop.create_future()
        self._inbox, self._own_pool = Inbox[Command](), pool is None
        self._pool = pool or WorkerPool(VISION)
        self.callers = ImageCallers(settings.max_queue_size, self._inbox.put)
        self._spans = SpanRing.create()
        self._engine: ImageEngine | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="images", daemon=True)

    async def begin(self) -> None:
        self._thread.start()

    async def aclose(self) -> None:
        """Ends what runs, then the ranks."""
        self.callers.fail(EngineError("the engine was closed"))
        self._is_closing = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, _EXIT_S)
        self._spans.close_fd()

    def hurry(self) -> None:
        """Ends the ranks at once, whatever they are at."""
        self._is_closing = True
        self._pool.kill()

    def stats(self) -> ImageStats:
        """Plain counts, each right by itself; EngineError where there is no engine."""
        engine = self._engine
        if engine is None or self.callers.error is not None:
            raise self.callers.error or EngineError("the engine does not run yet")
        return ImageStats(
            engine.queue.num_images,
            engine.num_images_running,
            engine.num_images_total,
            engine.num_micro_batches_total,
            engine.pipeline.rank_stats(),
        )

    # --- on the loop ---------------------------------------------------------------------------

    def _begin(self, ready: ImageReady) -> None:
        self.doing = "ready"
        self.callers.begin()
        self.ready.set_result(ready)

    def _fail(self, error: Exception) -> None:
        self.doing = "broken"
        self.callers.fail(error)
        if not self.ready.done():
            self.ready.set_exception(error)

    # --- in the thread -------------------------------------------------------------------------

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(call, *args)

    def deliver(self, requests: list[ImageRequest]) -> None:
        self._tell(self.callers.deliver, requests)

    def _run(self) -> None:
        try:
            with self._pool if self._own_pool else nullcontext():
                self._serve()
        except Exception as error:  # every failure is told to the callers
            self._tell(self._fail, error)

    def _at(self, doing: str) -> None:
        """EngineError where the rest is not wanted any more."""
        if self._is_closing:
            raise EngineError("the engine was closed")
        self.doing = doing

    def _serve(self) -> None:
        settings, plan = self.settings, self._plan()
        self._at(f"loading {len(plan.stages)} stage{'s' * (len(plan.stages) > 1)}")
        hidden_bytes = max((stage.out_bytes for stage in plan.stages[:-1]), default=0)
        with joined(self._pool, settings.ranks, hidden_bytes) as world:
            pipeline = LivePipeline(world, settings.model, plan, settings.ranks)
            num_classes = pipeline.warm_up()
            queue = BatchQueue[ImageRequest](settings.max_batch_size, settings.max_queue_delay_s)
            self._engine = ImageEngine(pipeline, queue, self._spans, self._inbox, self)
            ready = ImageReady(
                num_classes, _told(settings, plan), _setup(settings, pipeline), pipeline.ring_places(),
                self._spans.path,
            )  # fmt: skip
            self._tell(self._begin, ready)
            self._engine.run()

    def _plan(self) -> PipelinePlan:
        settings, model = self.settings, self.settings.model
        num_stages, most = len(settings.ranks.devices), settings.max_batch_size
        self._at(f"tracing {model.name}")
        module = model.build()
        open_weights(model, module)  # refuses what is missing, before any process starts
        self._pool.take(num_stages)  # which start meanwhile
        traced = trace(module, model.image_shape, model.torch_dtype)
        traced.check_classifies()
        check_num_stages(num_stages, len(traced.blocks))
        starts = [traced.block_at(point) for point in settings.points] or None
        self._at("measuring its blocks")
        costs = measure_blocks(model, traced, self._pool, settings.ranks, most, _NUM_REPEATS)
        work = work_of(model, most, 1, settings.ranks.ring_depth)
        return make_plan(costs, num_stages, work, settings.limit_bytes, starts)


def _setup(settings: ImageSettings, pipeline: LivePipeline) -> Setup:
    model, ranks = settings.model, settings.ranks
    return Setup(
        model=model.name,
        folder=None if model.weights is None else str(model.weights),
        dtype=model.dtype,
        transport=ranks.transport,
        ranks=[
            RankSetup(it.name, it.stage, it.tp_rank, device, ranks.num_threads)
            for it, device in zip(pipeline.ring_places(), ranks.devices, strict=True)
        ],
        num_cores=num_cores(),
        environment=environment(),
    )


def _told(settings: ImageSettings, plan: PipelinePlan) -> list[str]:
    model, ranks, num_stages = settings.model, settings.ranks, len(plan.stages)
    delay_ms = settings.max_queue_delay_s * 1e3
    return [
        f"{model.name}: {len(plan.costs)} blocks in {num_stages} stage{'s' * (num_stages > 1)}, "
        f"{ranks.num_threads} thread{'s' * (ranks.num_threads > 1)} each, {model.dtype}, "
        f"weights {model.weights or 'made up'}",
        *(
            f"  stage {it.stage} on {device}: {it.names[0]} to {it.names[1]}, "
            f"{it.compute_s * 1e3:.1f} ms, weights {format_bytes(it.parameter_bytes)}"
            for it, device in zip(plan.stages, ranks.devices, strict=True)
        ),
        f"  micro-batches of at most {settings.max_batch_size} images of {model.image_size} x "
        f"{model.image_size}, {num_stages + 1} in flight; an image waits at most {delay_ms:g} ms for others",
    ]
