"""Traces for Perfetto: what is written can be read back, and anything else is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from piped import US, Piped

from bireme.chrome_trace import Recorded, chrome_trace, read_chrome_trace
from bireme.cli.options import is_trace
from bireme.errors import UserError
from bireme.observe.ledger import make_ledger
from bireme.trace import RankSpans, Span, SpanKind

TRACK = (
    '{"traceEvents": [{"ph": "M", "name": "thread_name", "tid": 0, "args": {"name": "rank", "stage": %s}}],'
    ' "otherData": {"bireme_trace": 3}}'
)


def written(recorded: Recorded, folder: Path) -> Path:
    path = folder / "trace.json"
    path.write_bytes(msgspec.json.encode(chrome_trace(recorded)))
    return path


def test_there_is_a_track_a_rank_and_microseconds() -> None:
    spans = [
        Span(SpanKind.STEP, 5_000, 9_000, 0, 3, 0),
        Span(SpanKind.SEND, 6_000, 7_000, 64, 3, 0),
    ]
    ranks = [RankSpans("rank 0", 0, 0, spans), RankSpans("rank 1", 0, 1, spans[:1])]
    events = chrome_trace(Recorded(ranks, []))["traceEvents"]
    names = {it["args"]["name"]: it["tid"] for it in events if it["name"] == "thread_name"}
    assert names == {"rank 0": 0, "rank 1": 1, "engine": 2}
    send = next(it for it in events if it["name"] == "send")
    assert (send["ts"], send["dur"], send["cat"], send["args"]["bytes"]) == (
        1.0,
        1.0,
        "transfer",
        64,
    )


def test_messages_are_arrows_that_begin_and_end_in_spans() -> None:
    piped = Piped(3, 5, 2, link_ns=7 * US).run()
    events = chrome_trace(piped.recorded)["traceEvents"]
    received = sum(span.kind is SpanKind.RECV for spans in piped.stages for span in spans)
    begins = {it["id"]: it for it in events if it["ph"] == "s"}
    ends = {it["id"]: it for it in events if it["ph"] == "f"}
    assert begins.keys() == ends.keys()
    assert len(ends) == received
    for number, begin in begins.items():
        end = ends[number]
        assert (begin["tid"] + 1) % 3 == end["tid"]
        assert begin["ts"] <= end["ts"]
        assert lies_in(begin, "send", events)
        assert lies_in(end, "recv", events)


def lies_in(arrow: dict[str, Any], name: str, events: list[dict[str, Any]]) -> bool:
    return any(
        it["ph"] == "X"
        and (it["tid"], it["name"]) == (arrow["tid"], name)
        and it["ts"] <= arrow["ts"] <= it["ts"] + it["dur"] + 1e-6
        for it in events
    )


def test_what_is_read_back_has_the_same_ledger(tmp_path: Path) -> None:
    piped = Piped(3, 20, 2, lambda stage, step: (100 + 7 * stage + step) * US + 1).run()
    again = read_chrome_trace(written(piped.recorded, tmp_path))
    assert make_ledger(again).ranks == make_ledger(shifted(piped.recorded)).ranks


def shifted(recorded: Recorded) -> Recorded:
    """A trace begins at 0."""
    tracks = [recorded.engine, *(rank.spans for rank in recorded.ranks)]
    first_ns = min(span.start_ns for spans in tracks for span in spans)

    def moved(spans: Sequence[Span]) -> list[Span]:
        return [
            msgspec.structs.replace(
                it, start_ns=it.start_ns - first_ns, end_ns=it.end_ns - first_ns
            )
            for it in spans
        ]

    return Recorded(
        [replace(rank, spans=moved(rank.spans)) for rank in recorded.ranks], moved(recorded.engine)
    )


def test_a_trace_of_ours_may_be_written_anew() -> None:
    assert is_trace(chrome_trace(Recorded([], [])).keys())
    assert not is_trace({"traceEvents", "model"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no trace of bireme"),
        ("[]", "no trace of bireme"),
        ("{}", "no trace of bireme"),
        ('{"traceEvents": [{}], "otherData": {"bireme_trace": 3}}', "no trace of bireme"),
        (TRACK % '"1"', "no trace of bireme"),
        (TRACK % "1", "of its stages 0 to 1 it has 1"),
        ('{"traceEvents": []}', "without a format, of an earlier version or another program's"),
        ('{"traceEvents": [], "otherData": {"bireme_trace": 1}}', "of format 1, and 3 is read"),
        ('{"traceEvents": [], "otherData": {"bireme_trace": 9}}', "format 9, and 3 is read"),
    ],
)
def test_another_file_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        read_chrome_trace(path)


def of_step(start_ns: int, end_ns: int) -> Span:
    return Span(SpanKind.STEP, start_ns, end_ns, 0, 0, 0)


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([RankSpans("rank 1", 0, 1, [])], "of stage 0's ranks it has 1"),
        (
            [RankSpans("rank 0", 0, 0, [of_step(0, 9000), of_step(0, 9000)])],
            "rank 0 has a step twice",
        ),
        ([RankSpans("rank 0", 0, 0, [of_step(9000, 0)])], "a span of rank 0 ends before it begins"),
    ],
)
def test_what_was_taken_away_or_added_is_noticed(
    ranks: list[RankSpans], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"no whole trace: {told}"):
        read_chrome_trace(written(Recorded(ranks, []), tmp_path))
