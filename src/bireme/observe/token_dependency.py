"""How long stages idle because the only work there is needs an id that is not sampled yet.

The first stage waits for ids in a step (it receives them), or has no step because all requests are
in flight. What it waited so before a step, a later stage waited too, as far as it had nothing else
to do until that step came.

    stage 0  |--k-1--|......ids......|---k---|
    stage 1          |--k-1--|...............|---k---|     of which at most what stage 0 waited
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bireme.trace import Span, SpanKind


@dataclass(frozen=True, slots=True)
class _Step:
    """One step on one stage: begun at `start_ns`, received for `received_ns`, then worked until
    `end_ns`; its ids were there at `sampled_ns`."""

    start_ns: int
    received_ns: int
    work_ns: int
    end_ns: int
    sampled_ns: int


_Steps = dict[tuple[int, int], _Step]  # by (incarnation, step_id)


def token_dependency_shares(
    stages: Sequence[Sequence[Span]], first_step: int, last_step: int
) -> list[float]:
    """The share of each stage's time, from the end of `first_step` to the end of `last_step`.

    `stages` holds the spans of one rank a stage. ValueError where a stage's spans do not cover
    those steps.
    """
    found = [_steps(spans, first_step, last_step) for spans in stages]
    for stage, steps in enumerate(found):
        if len(steps) != last_step - first_step + 1 or len(steps) < 2:
            raise ValueError(
                f"stage {stage} has spans of {len(steps)} of the steps {first_step} to {last_step}"
            )
    waits = _first_waits(found[0], found[-1])
    shares = [sum(waits) / _elapsed_ns(found[0])]
    for steps in found[1:]:
        idle = [step.work_ns - before.end_ns for before, step in pairwise(steps.values())]
        waits = [min(wait, max(0, gap)) for wait, gap in zip(waits, idle, strict=True)]
        shares.append(sum(waits) / _elapsed_ns(steps))
    return shares


def _first_waits(first: _Steps, last: _Steps) -> list[int]:
    """What the first stage waited for ids before each step but the first; the last stage samples."""
    waits = []
    for (key, before), (_, step) in pairwise(first.items()):
        unknown_until = min(step.start_ns, last[key].sampled_ns)
        waits.append(step.received_ns + max(0, unknown_until - before.end_ns))
    return waits


def _elapsed_ns(steps: _Steps) -> int:
    ends = [step.end_ns for step in steps.values()]
    return ends[-1] - ends[0]


def _steps(spans: Sequence[Span], first_step: int, last_step: int) -> _Steps:
    """Whole steps only, in their order."""
    newest = max((span.incarnation for span in spans), default=0)
    by_step: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        if span.incarnation == newest and first_step <= span.step_id <= last_step:
            by_step.setdefault((newest, span.step_id), []).append(span)
    return {key: _step(by_step[key]) for key in sorted(by_step) if _is_whole(by_step[key])}


def _is_whole(spans: list[Span]) -> bool:
    return {SpanKind.STEP, SpanKind.COMPUTE} <= {span.kind for span in spans}


def _step(spans: list[Span]) -> _Step:
    whole = next(span for span in spans if span.kind is SpanKind.STEP)
    work = next(span for span in spans if span.kind is SpanKind.COMPUTE)
    sampled = [span.end_ns for span in spans if span.kind is SpanKind.SAMPLE]
    received = sum(span.end_ns - span.start_ns for span in spans if span.kind is SpanKind.RECV)
    return _Step(
        whole.start_ns, received, work.start_ns, whole.end_ns, max(sampled, default=whole.end_ns)
    )
