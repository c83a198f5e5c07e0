"""Spans as Chrome/Perfetto trace events, and back: a track a rank and one for the engine, and an arrow a
message. Times are microseconds from the earliest span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from bireme.errors import UserError
from bireme.trace import RankSpans, Span, SpanKind

_FORMAT = 3
_ENGINE = "engine"


@dataclass(frozen=True)
class Recorded:
    """What a trace holds: the ranks' spans and the engine's own."""

    ranks: Sequence[RankSpans]
    engine: Sequence[Span]

    @property
    def start_ns(self) -> int:
        """Of the earliest span: where a trace begins."""
        tracks = [self.engine, *(rank.spans for rank in self.ranks)]
        return min((span.start_ns for spans in tracks for span in spans), default=0)

    def since(self, start_ns: int) -> Recorded:
        """What began then or later; what the engine was in the middle of, from then on."""
        engine = [
            msgspec.structs.replace(span, start_ns=max(span.start_ns, start_ns))
            for span in self.engine
            if span.end_ns > start_ns
        ]
        ranks = [
            replace(rank, spans=[span for span in rank.spans if span.start_ns >= start_ns])
            for rank in self.ranks
        ]
        return Recorded(ranks, engine)

    def until(self, end_ns: int) -> Recorded:
        """What began before."""
        ranks = [
            replace(rank, spans=[span for span in rank.spans if span.start_ns < end_ns])
            for rank in self.ranks
        ]
        return Recorded(ranks, [span for span in self.engine if span.start_ns < end_ns])


def chrome_trace(recorded: Recorded) -> dict[str, Any]:
    """As `traceEvents`; `otherData` says which format this is."""
    tracks: list[tuple[str, dict[str, Any], Sequence[Span]]] = [
        (rank.name, {"stage": rank.stage, "tp_rank": rank.tp_rank}, rank.spans)
        for rank in recorded.ranks
    ]
    tracks.append((_ENGINE, {}, recorded.engine))
    origin = recorded.start_ns
    events: list[dict[str, Any]] = []
    for track, (name, place, spans) in enumerate(tracks):
        events += _heading(track, name, place)
        in_order = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
        events += [_event(track, span, origin) for span in in_order]
    events += _arrows(recorded.ranks, origin)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"bireme_trace": _FORMAT},
    }


def _heading(track: int, name: str, place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    about = {"ph": "M", "pid": 0, "tid": track}
    yield {**about, "name": "thread_name", "args": {"name": name, **place}}
    yield {**about, "name": "thread_sort_index", "args": {"sort_index": track}}


def _event(track: int, span: Span, origin: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.kind.name.lower(),
        "cat": span.category,
        "pid": 0,
        "tid": track,
        "ts": (span.start_ns - origin) / 1000,
        "dur": (span.end_ns - span.start_ns) / 1000,
        "args": {
            "step_id": span.step_id,
            "bytes": span.num_bytes,
            "incarnation": span.incarnation,
        },
    }


def _arrows(ranks: Sequence[RankSpans], origin: int) -> Iterator[dict[str, Any]]:
    """From each message that was sent to where it was received: hidden states to the next stage, ids to
    the first."""
    last = max((rank.stage for rank in ranks), default=0)
    sends: dict[tuple[int, int, int], tuple[int, Span]] = {}  # first of (stage, incarnation, step)
    for track, rank in enumerate(ranks):
        for span in rank.spans:
            if span.kind is SpanKind.SEND:
                sends.setdefault((rank.stage, span.incarnation, span.step_id), (track, span))
    numbers = count(1)
    for track, rank in enumerate(ranks):
        for span in rank.spans:
            at = (rank.stage - 1) % (last + 1), span.incarnation, span.step_id
            if span.kind is SpanKind.RECV and at in sends:
                source, sent = sends[at]
                about = {"name": "message", "cat": "transfer", "pid": 0, "id": next(numbers)}
                yield {**about, "ph": "s", "tid": source, "ts": (sent.start_ns - origin) / 1000}
                end_us = (span.end_ns - origin) / 1000
                yield {**about, "ph": "f", "bp": "e", "tid": track, "ts": end_us}


class _About(msgspec.Struct):
    """The arguments of an event: of a track's name, or of a span."""

    name: str = ""
    stage: int | None = None
    tp_rank: int = 0
    step_id: int = 0
    bytes: int = 0
    incarnation: int = 0


class _Event(msgspec.Struct):
    ph: str
    name: str
    tid: int
    ts: float = 0.0
    dur: float = 0.0
    args: _About = msgspec.field(default_factory=_About)


class _Version(msgspec.Struct):
    bireme_trace: int | None = None


class _File(msgspec.Struct):
    traceEvents: list[msgspec.Raw]  # noqa: N815
    otherData: _Version = msgspec.field(default_factory=_Version)  # noqa: N815


class _Events(msgspec.Struct):
    traceEvents: list[_Event]  # noqa: N815


def read_chrome_trace(path: Path) -> Recorded:
    """What `chrome_trace` wrote; UserError for another file, or one of an earlier version."""
    try:
        body = path.read_bytes()
        found = msgspec.json.decode(body, type=_File).otherData.bireme_trace
        recorded = None
        if found == _FORMAT:
            recorded = _recorded(msgspec.json.decode(body, type=_Events).traceEvents)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, OverflowError):
        raise UserError(f"{path} is no trace of bireme's; --trace writes one") from None
    if recorded is None:
        version = "without a format, of an earlier version or another program's"
        raise UserError(
            f"{path} is a trace {version if found is None else f'of format {found}'}, and {_FORMAT} is read; "
            "record it again with --trace"
        )
    if problem := _lack(recorded):
        raise UserError(f"{path} is no whole trace: {problem}; record it again with --trace")
    return recorded


def _lack(recorded: Recorded) -> str | None:
    """What was taken from a trace, or added to it, as far as that can be seen."""
    stages = sorted({rank.stage for rank in recorded.ranks})
    if stages != list(range(len(stages))):
        return f"of its stages 0 to {stages[-1]} it has {', '.join(map(str, stages))}"
    for stage in stages:
        ranks = sorted(rank.tp_rank for rank in recorded.ranks if rank.stage == stage)
        if ranks != list(range(len(ranks))):
            return f"of stage {stage}'s ranks it has {', '.join(map(str, ranks))}"
    for rank in recorded.ranks:
        steps = [(it.start_ns, it.end_ns) for it in rank.spans if it.kind is SpanKind.STEP]
        if len(set(steps)) < len(steps):
            return f"{rank.name} has a step twice"
        if any(span.end_ns < span.start_ns for span in rank.spans):
            return f"a span of {rank.name} ends before it begins"
    return None


def _recorded(events: Sequence[_Event]) -> Recorded:
    headings = {event.tid: event.args for event in events if event.name == "thread_name"}
    spans: dict[int, list[Span]] = {track: [] for track in headings}
    for event in events:
        if event.ph == "X":
            spans[event.tid].append(_span(event))
    ranks = [
        RankSpans(about.name, about.stage, about.tp_rank, spans[track])
        for track, about in headings.items()
        if about.stage is not None
    ]
    engine = [
        span for track, about in headings.items() if about.stage is None for span in spans[track]
    ]
    return Recorded(ranks, engine)


def _span(event: _Event) -> Span:
    start_ns = round(event.ts * 1000)
    about = event.args
    return Span(
        SpanKind[event.name.upper()],
        start_ns,
        start_ns + round(event.dur * 1000),
        about.bytes,
        about.step_id,
        about.incarnation,
    )
