"""What ranks exchange, by size: nothing is lost or counted twice, and who comes late is named."""

from __future__ import annotations

import pytest
from grouped import Sum, recorded_sums
from hypothesis import given, settings
from hypothesis import strategies as st
from piped import US, Piped

from bireme.chrome_trace import Recorded
from bireme.observe.causes import Row
from bireme.observe.exchanges import collective_sizes, message_sizes
from bireme.observe.ledger import make_ledger
from bireme.trace import COLLECTIVES, RankSpans, Span, SpanKind


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 4), st.data())
def test_sizes_add_up_to_all_spans_and_to_the_ledger(width: int, data: st.DataObject) -> None:
    late = st.lists(st.integers(0, 900), min_size=width, max_size=width)
    one = st.builds(
        Sum, st.sampled_from([64, 4096]), late, st.integers(0, 900), st.sampled_from(COLLECTIVES)
    )
    steps = data.draw(st.lists(st.lists(one, min_size=1, max_size=5), min_size=1, max_size=5))
    recorded = recorded_sums(steps, width)
    found = collective_sizes(recorded, None)
    spans = [span for rank in recorded.ranks for span in rank.spans if span.kind in COLLECTIVES]
    assert sum(size.count for size in found) * width == len(spans)
    assert sum(size.total_bytes for size in found) * width == sum(it.num_bytes for it in spans)
    assert len({(size.kind, size.num_bytes) for size in found}) == len(found)

    ledger = make_ledger(recorded).ranks
    moved = sum(rank.ns[Row.COLLECTIVE_MOVE] for rank in ledger)
    waited = sum(rank.ns[Row.COLLECTIVE_WAIT] for rank in ledger)
    time_s, move_s = (
        sum(size.time_s for size in found) * width,
        sum(size.move_s for size in found) * width,
    )
    assert time_s == pytest.approx((moved + waited) / 1e9)
    assert move_s == pytest.approx(moved / 1e9)
    late_s = sum(sum(size.late_s.values()) for size in found)
    assert late_s == pytest.approx(sum(sum(it.late_ns.values()) for it in ledger) / 1e9)


def test_rates_are_of_when_all_had_come_and_the_last_is_named() -> None:
    sums = [Sum(4000, (0, 700), 2000), Sum(4000, (100, 0), 2000), Sum(4000, (0, 0), 2000)]
    (size,) = collective_sizes(recorded_sums([sums, [Sum(4000, (0, 3000), 2000)]], 2), None)
    assert (size.kind, size.num_ranks, size.num_bytes, size.count) == ("all_reduce", 2, 4000, 4)
    assert size.bytes_per_s == pytest.approx(4000 / 2e-6)
    assert size.ceiling_bytes_per_s is None
    assert (size.max_skew_s, size.max_skew_by) == (pytest.approx(3e-6), "rank 1")
    assert size.mean_skew_s == pytest.approx((700 + 100 + 3000) / 4 * 1e-9)
    assert size.late_s == {"rank 0": pytest.approx(1e-7), "rank 1": pytest.approx(3.7e-6)}
    assert not size.is_sampled
    assert size.overlapped_s == 0


def test_where_only_some_steps_are_marked_it_is_told() -> None:
    (size,) = collective_sizes(recorded_sums([[Sum(64, (0, 0), 100)], []], 2), None)
    assert size.is_sampled


def test_a_collective_beside_other_work_is_overlapped() -> None:
    def rank(number: int) -> RankSpans:
        spans = [
            Span(SpanKind.STEP, 0, 1000, 0, 1, 0),
            Span(SpanKind.COMPUTE, 0, 400, 0, 1, 0),
            Span(SpanKind.ALL_REDUCE, 300, 700, 64, 1, 0),
            Span(SpanKind.SAMPLE, 500, 1000, 0, 1, 0),
        ]
        return RankSpans(f"rank {number}", 0, number, spans)

    (size,) = collective_sizes(Recorded([rank(0), rank(1)], []), None)
    assert size.overlapped_s == pytest.approx(200e-9)


def test_a_collective_that_a_ring_has_lost_is_left_out() -> None:
    recorded = recorded_sums([[Sum(64, (0, 0), 100)], [Sum(64, (0, 0), 100)]], 2)
    cut = Recorded([recorded.ranks[0], recorded.since(2000).ranks[1]], recorded.engine)
    (size,) = collective_sizes(cut, None)
    assert size.count == 1


def test_messages_take_from_when_they_are_sent() -> None:
    """Hidden states to the next stage, ids back to the first."""
    piped = Piped(3, 12, 2, lambda stage, step: (100 + 50 * stage) * US, link_ns=30 * US).run()
    found = {(one.src_stage, one.dst_stage): one for one in message_sizes(piped.recorded, None)}
    assert found.keys() == {(0, 1), (1, 2), (2, 0)}
    for edge, one in found.items():
        assert one.count == (10 if edge == (2, 0) else 12)
        assert one.median_s <= 30e-6 + 1e-9
    assert found[0, 1].time_s == pytest.approx(12 * 30e-6, rel=0.2)
