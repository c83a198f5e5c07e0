"""The part of a recording that is profiled: all of it, or what all rings still hold."""

from __future__ import annotations

from dataclasses import replace

from piped import US, Piped

from bireme.chrome_trace import Recorded
from bireme.observe.causes import Row
from bireme.observe.ledger import make_ledger
from bireme.observe.window import whole_since

GAP = Piped(2, 40, 2, empty_ns=5000 * US, after_empty=frozenset({20})).run()
EMPTY_NS = max(span.start_ns for span in GAP.driver if span.kind.name == "EMPTY")


def test_what_ran_before_is_left_out() -> None:
    found, is_whole = whole_since(GAP.recorded, EMPTY_NS + 1000 * US)
    assert is_whole
    assert found.start_ns == EMPTY_NS + 1000 * US
    steps = {span.step_id for rank in found.ranks for span in rank.spans}
    assert steps - {18, 19} == set(range(20, 40))  # ids that are awaited may be earlier ones
    for rank in make_ledger(found).ranks:
        assert sum(rank.ns.values()) == rank.wall_ns
        assert rank.ns[Row.UNATTRIBUTED] < 0.01 * rank.wall_ns


def test_where_a_ring_was_overwritten_all_begin_later() -> None:
    first, second = GAP.recorded.ranks
    overwritten = replace(second, spans=second.spans[-30:])
    lost = Recorded([first, overwritten], GAP.recorded.engine)
    found, is_whole = whole_since(lost, EMPTY_NS)
    assert not is_whole
    known_ns = min(span.start_ns for span in overwritten.spans)
    assert found.start_ns >= known_ns
    for rank in make_ledger(found).ranks:
        assert sum(rank.ns.values()) == rank.wall_ns


def test_a_part_begins_and_ends_where_it_is_told() -> None:
    recorded = Piped(2, 20, 2).run().recorded
    starts = [span.start_ns for span in recorded.ranks[0].spans]
    first, last = starts[len(starts) // 4], starts[len(starts) // 2]
    part = recorded.since(first).until(last)
    for rank, whole in zip(part.ranks, recorded.ranks, strict=True):
        assert rank.spans == [span for span in whole.spans if first <= span.start_ns < last]
    assert all(span.start_ns < last and span.end_ns > first for span in part.engine)
