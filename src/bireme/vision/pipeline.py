"""The driver of a vision pipeline: ranks that hold its stages, runs, and when each rank worked."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from bireme.chrome_trace import Recorded
from bireme.config import Transport
from bireme.engine.deadline import Patience, StepCost
from bireme.engine.joining import WorldPlan, join_world
from bireme.engine.messages import RankUsage, ReadUsage
from bireme.engine.pool import WorkerPool
from bireme.engine.world import World
from bireme.errors import EngineError, RequestError
from bireme.parallel.counters import create_memory
from bireme.parallel.mesh import Mesh
from bireme.parallel.pipeline import Action, Schedule, bubble_shares, forward_schedule, timeline
from bireme.trace import DEFAULT_CAPACITY, RankSpans, Span, SpanKind
from bireme.vision.messages import Load, Loaded, Logits, Measure, Measured, Run
from bireme.vision.model import VisionModel
from bireme.vision.plan import BlockCost
from bireme.vision.tracing import Traced

_SPANS_A_MICRO_BATCH = (
    4  # that a rank in the middle writes: the step, what it takes, computes and sends
)


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """Where ranks run, and how long they may take (seconds)."""

    devices: tuple[str, ...]
    num_threads: int
    is_captured: bool = True
    transport: Transport = "auto"
    step_timeout_s: float = 300.0
    start_timeout_s: float = 900.0

    @property
    def ring_depth(self) -> int | None:
        """Micro-batches that a GPU has room for at either end of an edge; None where no GPU keeps any."""
        return len(self.devices) + 1 if self.devices[0].startswith("cuda") else None

    def alone(self) -> RankSettings:
        """The same for the first device alone."""
        return dataclasses.replace(self, devices=self.devices[:1])


@dataclass(frozen=True)
class Passed:
    """A batch that went through: its logits [N, classes] in float32, and when each action ran
    (seconds of the monotonic clock). Its micro-batches are the steps from `first_step` on; `told_ns`: when the
    driver began to tell the ranks."""

    logits: torch.Tensor
    schedule: Schedule
    times: dict[Action, tuple[float, float]]
    first_step: int
    told_ns: int

    @cached_property
    def elapsed_s(self) -> float:
        """From the first forward's start to the last one's end."""
        starts, ends = zip(*self.times.values(), strict=True)
        return float(max(ends) - min(starts))

    @property
    def window_ns(self) -> tuple[int, int]:
        """From the first forward's start to the last one's end, of the monotonic clock."""
        starts, ends = zip(*self.times.values(), strict=True)
        return round(min(starts) * 1e9), round(max(ends) * 1e9)

    def part_of(self, recorded: Recorded) -> Recorded:
        """Of all that was recorded, what this batch was: from when it was told to the last forward's end."""
        return recorded.since(self.told_ns).until(self.window_ns[1])

    @property
    def images_per_s(self) -> float:
        return len(self.logits) / self.elapsed_s

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Each rank's share of the elapsed time without work."""
        return bubble_shares(self.schedule, self.times)

    @property
    def predicted_bubbles(self) -> tuple[float, ...]:
        """What the schedule alone says, had nothing but the actions taken time."""
        costs = {action: end - start for action, (start, end) in self.times.items()}
        return bubble_shares(self.schedule, timeline(self.schedule, costs.__getitem__))


def micro_batch_sizes(batch: int, num_micro_batches: int) -> tuple[int, ...]:
    """As even as can be, the larger ones first."""
    if not 1 <= num_micro_batches <= batch:
        raise RequestError(
            f"{batch} images cannot make {num_micro_batches} micro-batches; use at most {batch}"
        )
    size, num_larger = divmod(batch, num_micro_batches)
    return (size + 1,) * num_larger + (size,) * (num_micro_batches - num_larger)


def check_row(num_micro_batches: int, num_batches: int) -> None:
    """RequestError for more at once than ranks keep the spans of."""
    most = DEFAULT_CAPACITY // _SPANS_A_MICRO_BATCH
    if num_micro_batches * num_batches > most:
        raise RequestError(
            f"{num_batches} batches of {num_micro_batches} micro-batches are {num_micro_batches * num_batches} in "
            f"a row, and a rank keeps the spans of {most}; use at most {most // num_micro_batches} batches"
        )


@contextmanager
def joined(pool: WorkerPool, settings: RankSettings, hidden_bytes: int) -> Iterator[World]:
    """Ranks of one stage each; they leave at the end, or are ended where something failed."""
    widths = (1,) * len(settings.devices)
    names = [Mesh(widths, rank).name for rank in range(len(widths))]
    world = World(pool, names, widths, settings.step_timeout_s)
    plan = WorldPlan(
        widths=widths,
        devices=settings.devices,
        hidden_bytes=hidden_bytes,
        sampled_bytes=0,
        num_threads=settings.num_threads,
        transport=settings.transport,
        step_timeout_s=settings.step_timeout_s,
        start_timeout_s=settings.start_timeout_s,
        sends_beside=True,
    )
    with ExitStack() as held:
        try:
            join_world(world, plan, held)
            yield world
            world.leave(settings.step_timeout_s)
        except BaseException:
            world.give_up()
            raise


def measure_blocks(
    model: VisionModel,
    traced: Traced,
    pool: WorkerPool,
    settings: RankSettings,
    micro_batch: int,
    repeats: int = 5,
) -> tuple[BlockCost, ...]:
    """What each block takes on the first device."""
    with joined(pool, settings.alone(), 0) as world:
        world.send_all(Measure(model, micro_batch, repeats, settings.is_captured))
        (found,) = world.gather(settings.start_timeout_s, "measuring its blocks")
    assert isinstance(found, Measured)
    return tuple(
        BlockCost(
            block.shape.name,
            compute_s,
            transfer_s,
            block.parameter_bytes,
            block.shape.out_bytes,
            block.shape.peak_bytes,
            block.scratch_bytes,
        )
        for block, compute_s, transfer_s in zip(
            traced.blocks, found.compute_s, found.transfer_s, strict=True
        )
    )


class VisionPipeline:
    """Ranks that hold the stages of a model and one batch of images; runs it as often as asked."""

    def __init__(
        self,
        world: World,
        model: VisionModel,
        blocks_per_stage: tuple[int, ...],
        images: torch.Tensor,
        settings: RankSettings,
    ) -> None:
        self._world, self._settings, self._batch = world, settings, len(images)
        self._cost, self._next_step = StepCost(), 1
        self._begun_ns = time.monotonic_ns()
        self._told: list[Span] = []
        with _shared(images) as path:
            world.send_all(Load(model, blocks_per_stage, path, len(images), settings.is_captured))
            replies = world.gather(settings.start_timeout_s, "loading its stage")
        self.weight_bytes = [it.weight_bytes for it in replies if isinstance(it, Loaded)]

    @classmethod
    @contextmanager
    def open(
        cls,
        model: VisionModel,
        traced: Traced,
        blocks_per_stage: tuple[int, ...],
        images: torch.Tensor,
        pool: WorkerPool,
        settings: RankSettings,
        largest_micro_batch: int | None = None,
    ) -> Iterator[VisionPipeline]:
        """Loads the stages; the ranks leave at the end."""
        ends = [traced.blocks[stop - 1] for stop in accumulate(blocks_per_stage[:-1])]
        largest = max((block.shape.out_bytes for block in ends), default=0)
        hidden_bytes = largest * (largest_micro_batch or len(images))
        with joined(pool, settings, hidden_bytes) as world:
            yield cls(world, model, blocks_per_stage, images, settings)

    def run(
        self, num_micro_batches: int, schedule: Schedule | None = None, num_batches: int = 1
    ) -> Passed:
        """Passes the batch through, in order if no other schedule is given, as often as `num_batches` says
        without a pause; RankError names a rank that died or hangs."""
        sizes = micro_batch_sizes(self._batch, num_micro_batches) * num_batches
        if schedule is None:
            schedule = forward_schedule(len(self._settings.devices), len(sizes))
        first_step, last_step = self._next_step, self._next_step + len(sizes) - 1
        self._next_step = last_step + 1
        texts = tuple(tuple(map(str, actions)) for actions in schedule)
        limit_s = self._settings.step_timeout_s * len(sizes)
        start_ns = time.monotonic_ns()
        self._world.send_all(Run(texts, sizes, first_step))
        sent_ns = time.monotonic_ns()
        patience = Patience(self._cost.patience_s([sum(sizes)], limit_s), limit_s)
        replies = [self._world.step_reply(patience, last_step) for _ in schedule]
        end_ns = time.monotonic_ns()
        self._note_run(range(first_step, last_step + 1), start_ns, sent_ns, end_ns)
        self._cost.observe(sum(sizes), (end_ns - start_ns) / 1e9)
        answer = next((reply for reply in replies if isinstance(reply, Logits)), None)
        if answer is None:
            raise EngineError("no rank answered a batch with logits")
        logits = torch.frombuffer(bytearray(answer.values), dtype=torch.float32)
        times = self._times(schedule, first_step, start_ns)
        logits = logits.view(sum(sizes), answer.num_classes)
        return Passed(logits, schedule, times, first_step, start_ns)

    def _times(
        self, schedule: Schedule, first_step: int, told_ns: int
    ) -> dict[Action, tuple[float, float]]:
        """Of each action, from the spans that its rank wrote."""
        times = {}
        for rank, actions in zip(self._world.ranks, schedule, strict=True):
            computed = {
                span.step_id - first_step: span
                for span in rank.spans.read(told_ns)
                if span.kind == SpanKind.COMPUTE and span.step_id >= first_step
            }
            for action in actions:
                span = computed[action.micro_batch]
                times[action] = span.start_ns / 1e9, span.end_ns / 1e9
        return times

    def usage(self) -> tuple[RankUsage, ...]:
        """What every rank holds between batches, and at most since it was last asked."""
        self._world.send_all(ReadUsage())
        replies = self._world.gather(self._settings.step_timeout_s, "saying what it holds")
        return tuple(reply for reply in replies if isinstance(reply, RankUsage))

    def recorded(self, since_ns: int = 0) -> Recorded:
        """Every rank's spans since then and since it was told to load, and what the driver did meanwhile."""
        begun_ns = max(since_ns, self._begun_ns)
        ranks = [
            RankSpans(name, stage, 0, [it for it in spans if it.start_ns >= begun_ns])
            for stage, (name, spans) in enumerate(self._world.spans(begun_ns).items())
        ]
        told = [span for span in self._told if span.end_ns > begun_ns]
        return Recorded(ranks, [*told, Span.empty_since(told)])

    def _note_run(self, steps: range, start_ns: int, sent_ns: int, end_ns: int) -> None:
        """As the engine tells it of its steps: nothing to do, a batch's steps at once, the wait."""
        last_ns = max((span.end_ns for span in self._told), default=self._begun_ns)
        self._told.append(Span(SpanKind.EMPTY, last_ns, start_ns, 0, 0, 0))
        self._told += [Span(SpanKind.SUBMIT, start_ns, sent_ns, 0, step, 0) for step in steps]
        self._told.append(Span(SpanKind.WAIT, sent_ns, end_ns, 0, 0, 0))


@contextmanager
def _shared(images: torch.Tensor) -> Iterator[str]:
    """The path of memory that holds them in float32."""
    data = images.float().contiguous().numpy()
    fd, path = create_memory(data.nbytes, "bireme-images")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data.data)
        yield path
    finally:
        os.close(fd)
