"""The bubble ledger on pipelines whose every nanosecond is known: what is planted is what is told."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from piped import US, Piped

from bireme.chrome_trace import Recorded
from bireme.observe.causes import Row
from bireme.observe.ledger import RankLedger, make_ledger
from bireme.trace import RankSpans, Span, SpanKind

DELAYS = [50 * US, 200 * US, 1000 * US]
NUM_STEPS = 200


def ranks_of(piped: Piped) -> list[RankLedger]:
    return list(piped.run().ledger().ranks)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 2),
    st.integers(0, 300),
    st.integers(0, 300),
    st.data(),
)
def test_rows_add_up_to_the_wall_time(
    num_stages: int,
    num_steps: int,
    num_groups: int,
    lookahead: int,
    link: int,
    host: int,
    data: st.DataObject,
) -> None:
    """Of any window, and none is negative."""
    times = data.draw(st.lists(st.integers(1, 500), min_size=7, max_size=7))
    empty = data.draw(st.frozensets(st.integers(1, max(1, num_steps - 1)), max_size=2))
    piped = Piped(
        num_stages, num_steps, num_groups,
        lambda stage, step: times[(stage * 3 + step) % 7] * US,
        link * US, host * US, lookahead, 700 * US, empty,
    ).run()  # fmt: skip
    whole = piped.ledger()
    start = data.draw(st.integers(0, whole.end_ns - 1))
    end = data.draw(st.integers(start + 1, whole.end_ns))
    for ledger in (whole, make_ledger(piped.recorded, start, end)):
        for rank in ledger.ranks:
            assert rank.ns[Row.UNATTRIBUTED] == 0
            in_order = sorted(rank.pieces, key=lambda piece: piece.start_ns)
            edges = [time for piece in in_order for time in (piece.start_ns, piece.end_ns)]
            assert edges == sorted(edges)  # an instant counts once
            assert (edges[0], edges[-1]) == (ledger.start_ns, ledger.end_ns)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 2),
    st.lists(st.integers(1, 500), min_size=7, max_size=7),
    st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), min_size=1, max_size=5),
)
def test_ledgers_of_pieces_add_up_to_that_of_the_whole(
    num_stages: int,
    num_steps: int,
    num_groups: int,
    lookahead: int,
    times: list[int],
    cuts: list[float],
) -> None:
    piped = Piped(
        num_stages, num_steps, num_groups, lambda stage, step: times[(stage * 3 + step) % 7] * US,
        50 * US, 20 * US, lookahead, 700 * US, frozenset({num_steps // 2} - {0}),
    ).run()  # fmt: skip
    whole = piped.ledger()
    edges = sorted({0, whole.end_ns, *(1 + int(cut * (whole.end_ns - 2)) for cut in cuts)})
    pieces = [make_ledger(piped.recorded, *window) for window in pairwise(edges)]
    for index, rank in enumerate(whole.ranks):
        for row in Row:
            assert sum(piece.ranks[index].ns[row] for piece in pieces) == rank.ns[row]


def check_grows(base: Piped, planted: Piped, row: str, delay_ns: int, *, ranks: set[int]) -> None:
    """On these ranks by the delay within 5 %, and all other rows together by less than 5 % of it."""
    before = ranks_of(base)
    after = ranks_of(planted)
    for index in ranks:
        old, new = before[index].ns, after[index].ns
        grown = {name: new[name] - old[name] for name in Row}
        assert grown.pop(Row(row)) == pytest.approx(delay_ns, rel=0.05)
        assert sum(map(abs, grown.values())) < 0.05 * delay_ns


@pytest.mark.parametrize("delay_ns", DELAYS)
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("dependent", [True, False])
def test_a_slow_stage_is_imbalance_of_the_others(
    num_stages: int, slow: int, delay_ns: int, dependent: bool
) -> None:
    def work(extra: int) -> Callable[[int, int], int]:
        return lambda stage, _: 100 * US + extra * (stage == slow)

    def piped(extra: int) -> Piped:
        num_groups = num_stages if dependent else NUM_STEPS
        return Piped(num_stages, NUM_STEPS, num_groups, work(extra))

    others = set(range(num_stages)) - {slow}
    check_grows(
        piped(0), piped(delay_ns), "imbalance", NUM_STEPS * delay_ns, ranks=others,
    )  # fmt: skip


@pytest.mark.parametrize("work_ns", DELAYS)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_one_batch_in_flight_is_a_dependency_on_its_token(num_stages: int, work_ns: int) -> None:
    """Each stage idles while the others work."""
    for lookahead in (0, 1):
        piped = Piped(num_stages, NUM_STEPS, 1, lambda *_: work_ns, lookahead=lookahead)
        for row in ranks_of(piped):
            idle = NUM_STEPS * (num_stages - 1) * work_ns
            assert row.ns[Row.TOKEN_DEPENDENCY] == pytest.approx(idle, rel=0.05)
            assert row.ns[Row.IMBALANCE] == 0


@pytest.mark.parametrize("num_groups", [4, 5, 8])
def test_as_many_groups_as_stages_depend_on_no_token(num_groups: int) -> None:
    for row in ranks_of(Piped(4, NUM_STEPS, num_groups)):
        assert row.ns[Row.TOKEN_DEPENDENCY] < 0.02 * row.wall_ns


@pytest.mark.parametrize("delay_ns", [10_000 * US, 20_000 * US, 50_000 * US])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_an_empty_queue_starves_all_stages(num_stages: int, delay_ns: int) -> None:
    def piped(empty_ns: int) -> Piped:
        gap = frozenset({NUM_STEPS // 2})
        return Piped(num_stages, NUM_STEPS, num_stages, empty_ns=empty_ns, after_empty=gap)

    check_grows(piped(US), piped(US + delay_ns), "starved", delay_ns, ranks={0, num_stages - 1})


@pytest.mark.parametrize("delay_ns", DELAYS)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_blocked_host_is_told_on_every_stage(num_stages: int, delay_ns: int) -> None:
    def piped(host_ns: int) -> Piped:
        return Piped(num_stages, NUM_STEPS, 1, host_ns=host_ns, lookahead=0)

    grown = NUM_STEPS * delay_ns
    check_grows(piped(0), piped(delay_ns), "host", grown, ranks=set(range(num_stages)))


@pytest.mark.parametrize("delay_ns", DELAYS)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_slow_link_is_transfer_wherever_one_waits_for_it(num_stages: int, delay_ns: int) -> None:
    def piped(link_ns: int) -> Piped:
        return Piped(num_stages, NUM_STEPS, 1, link_ns=link_ns)

    grown = NUM_STEPS * num_stages * delay_ns  # between stages, and the ids' way back
    check_grows(piped(0), piped(delay_ns), "transfer", grown, ranks=set(range(num_stages)))


@pytest.mark.parametrize("delay_ns", DELAYS)
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("dependent", [True, False])
def test_a_link_slower_than_all_stages_is_transfer_for_those_before_it_too(
    num_stages: int, delay_ns: int, dependent: bool
) -> None:
    """They cannot send, or wait for ones that cannot."""

    def piped(link_ns: int) -> Piped:
        num_groups = num_stages + 1 if dependent else NUM_STEPS
        return Piped(num_stages, NUM_STEPS, num_groups, link_ns=link_ns, is_narrow=True)

    grown = NUM_STEPS * delay_ns
    base = 500 * US  # at which no step waits for ids
    check_grows(
        piped(base), piped(base + delay_ns), "transfer", grown, ranks=set(range(num_stages))
    )


@pytest.mark.parametrize("num_micro_batches", [2, 8, 16])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_micro_batches_leave_the_bubble_of_the_textbook(
    num_stages: int, num_micro_batches: int
) -> None:
    """(p - 1) / (m + p - 1), all of it filling and draining."""
    piped = Piped(num_stages, num_micro_batches, num_micro_batches, lambda *_: 10_000 * US)
    expected = (num_stages - 1) / (num_micro_batches + num_stages - 1)
    for row in ranks_of(piped):
        assert row.ns[Row.FILL_DRAIN] / row.wall_ns == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("delay_ns", DELAYS)
def test_a_late_rank_is_waited_for_and_named(delay_ns: int) -> None:
    """Two ranks of a group; each sum moves for 10 us once both are there."""
    spans: list[list[Span]] = [[], []]
    at = 0
    for step in range(20):
        last = at + 100 * US + delay_ns
        for rank, arrival in enumerate((at + 100 * US, last)):
            end = last + 10 * US
            spans[rank] += [
                Span(SpanKind.ALL_REDUCE, arrival, end, 64, step, 0),
                Span(SpanKind.COMPUTE, at, end, 0, step, 0),
                Span(SpanKind.STEP, at, end, 0, step, 0),
            ]
        at = last + 10 * US
    ranks = [RankSpans(f"rank {it}", 0, it, of_rank) for it, of_rank in enumerate(spans)]
    early, late = make_ledger(Recorded(ranks, []), 0, at).ranks
    assert early.ns[Row.COLLECTIVE_WAIT] == 20 * delay_ns
    assert dict(early.late_ns) == {"rank 1": 20 * delay_ns}
    assert late.ns[Row.COLLECTIVE_WAIT] == 0
    assert early.ns[Row.COLLECTIVE_MOVE] == late.ns[Row.COLLECTIVE_MOVE] == 200 * US
    assert (early.ns[Row.COMPUTE], late.ns[Row.COMPUTE]) == (2000 * US, 2000 * US + 20 * delay_ns)
    assert early.ns[Row.UNATTRIBUTED] == late.ns[Row.UNATTRIBUTED] == 0


def test_a_first_step_whose_collectives_are_lost_is_no_sign_of_sampling() -> None:
    def of_step(step: int) -> list[Span]:
        start = 100 * US * step
        return [
            Span(kind, start, start + 100 * US, 0, step, 0)
            for kind in (SpanKind.STEP, SpanKind.COMPUTE)
        ]

    marked = [
        Span(SpanKind.ALL_REDUCE, at * 100 * US, at * 100 * US + US, 0, at, 0) for at in (1, 2)
    ]
    spans = [*of_step(0), *of_step(1), *of_step(2), *marked]
    (found,) = make_ledger(Recorded([RankSpans("rank 0", 0, 0, spans)], []), 0, 300 * US).ranks
    assert not found.is_sampled
    assert found.ns[Row.COLLECTIVE_MOVE] == 2 * US


def test_collectives_that_are_marked_in_one_step_stand_for_those_of_the_others() -> None:
    def spans(late_us: int) -> list[Span]:
        """Steps of 100 us, 10 us of them moved in the first, behind what the other rank was late."""
        found = [
            span
            for step in range(10)
            for start in [1 + 100 * step]
            for span in (
                Span(SpanKind.STEP, start * US, (start + 100) * US, 0, step, 0),
                Span(SpanKind.COMPUTE, start * US, (start + 100) * US, 0, step, 0),
            )
        ]
        marked = Span(SpanKind.ALL_REDUCE, (71 - late_us) * US, 81 * US, 0, 0, 0)
        return [*found, marked]

    ranks = [RankSpans("rank 0", 0, 0, spans(20)), RankSpans("rank 1", 0, 1, spans(0))]
    told = [Span(SpanKind.SUBMIT, 0, US, 0, step, 0) for step in range(10)]
    early, late = make_ledger(Recorded(ranks, told), US, 1001 * US).ranks
    assert early.is_sampled
    assert early.share(Row.COLLECTIVE_WAIT) == pytest.approx(0.2)
    assert late.share(Row.COLLECTIVE_WAIT) == 0
    for rank in (early, late):
        assert rank.share(Row.COLLECTIVE_MOVE) == pytest.approx(0.1)
        assert rank.share(Row.UNATTRIBUTED) == 0


def test_a_marked_step_in_which_a_device_stood_still_stands_for_no_others() -> None:
    """33 steps of 100 us with 10 us of sums, each 16th marked; in the first of these sums take 2 ms more."""
    spans, at = [], 0
    for step in range(33):
        stall = 2000 * US if step == 1 else 0
        end = at + 100 * US + stall
        spans += [Span(kind, at, end, 0, step, 0) for kind in (SpanKind.STEP, SpanKind.COMPUTE)]
        if step % 16 == 1:
            spans.append(Span(SpanKind.ALL_REDUCE, end - 10 * US - stall, end, 0, step, 0))
        at = end
    (found,) = make_ledger(Recorded([RankSpans("rank 0", 0, 0, spans)], []), 0, at).ranks
    assert found.is_sampled
    assert found.ns[Row.COLLECTIVE_MOVE] == 2000 * US + 33 * 10 * US
    assert found.ns[Row.COMPUTE] == 33 * 90 * US


def test_a_marked_step_whose_work_is_lost_stands_for_no_others() -> None:
    spans = [
        Span(kind, 100 * US * step, 100 * US * (step + 1), 0, step, 0)
        for step in range(4)
        for kind in (SpanKind.STEP, SpanKind.COMPUTE)[: 1 if step == 0 else 2]
    ]
    spans += [Span(SpanKind.ALL_REDUCE, 0, 50 * US, 0, 0, 0)]
    (alone,) = make_ledger(Recorded([RankSpans("rank 0", 0, 0, spans)], []), 0, 400 * US).ranks
    assert not alone.is_sampled
    spans += [Span(SpanKind.ALL_REDUCE, 290 * US, 300 * US, 0, 2, 0)]
    (found,) = make_ledger(Recorded([RankSpans("rank 0", 0, 0, spans)], []), 0, 400 * US).ranks
    assert found.is_sampled
    assert found.ns[Row.COLLECTIVE_MOVE] == 50 * US + 3 * 10 * US


@pytest.mark.parametrize(("num_receivers", "senders"), [(2, [0, 1]), (4, [0, 0, 1, 1]), (1, [0])])
def test_each_rank_waits_for_the_one_that_sends_to_it(
    num_receivers: int, senders: list[int]
) -> None:
    """Of two that send at different times; each message takes 10 us."""
    sent = [100 * US, 300 * US]
    ranks = [
        RankSpans(f"rank {it}", 0, it, [Span(SpanKind.STEP, 0, at + US, 0, 0, 0),
                                        Span(SpanKind.COMPUTE, 0, at, 0, 0, 0),
                                        Span(SpanKind.SEND, at, at + US, 0, 0, 0)])
        for it, at in enumerate(sent)
    ]  # fmt: skip
    for index, sender in enumerate(senders):
        come = sent[sender] + 10 * US
        spans = [Span(SpanKind.STEP, 0, come, 0, 0, 0), Span(SpanKind.RECV, 0, come, 0, 0, 0)]
        ranks.append(RankSpans(f"rank {2 + index}", 1, index, spans))
    submit = Span(SpanKind.SUBMIT, 0, 1, 0, 0, 0)
    ledger = make_ledger(Recorded(ranks, [submit]), 0, 400 * US)
    for rank in ledger.ranks[2:]:
        assert rank.ns[Row.TRANSFER] == 10 * US


def test_a_send_beside_later_work_is_told_beside_the_rows() -> None:
    """Each step works for 100 us and idles for 50 us; its send lasts for 180 us, from its end on."""
    spans, num_steps = [], 10
    for step in range(num_steps):
        at = step * 150 * US
        end = at + 100 * US
        spans += [
            Span(SpanKind.STEP, at, end, 0, step, 0),
            Span(SpanKind.COMPUTE, at, end, 0, step, 0),
            Span(SpanKind.SEND, end, end + 180 * US, 64, step, 0),
        ]
    empty = [Span(SpanKind.EMPTY, 0, num_steps * 150 * US, 0, 0, 0)]
    (rank,) = make_ledger(
        Recorded([RankSpans("rank 0", 0, 0, spans)], empty), 0, num_steps * 150 * US
    ).ranks
    assert rank.overlapped_ns == (num_steps - 1) * 100 * US
    assert rank.ns[Row.COMPUTE] == num_steps * 100 * US
    assert rank.ns[Row.TRANSFER] == rank.ns[Row.UNATTRIBUTED] == 0


def test_sends_of_a_step_that_overlap_count_once() -> None:
    """One on a stream of its own, and the wait for room on the step's."""
    spans = [
        Span(SpanKind.STEP, 0, 130 * US, 0, 0, 0),
        Span(SpanKind.COMPUTE, 0, 100 * US, 0, 0, 0),
        Span(SpanKind.SEND, 100 * US, 160 * US, 64, 0, 0),
        Span(SpanKind.SEND, 110 * US, 130 * US, 0, 0, 0),
    ]
    (rank,) = make_ledger(Recorded([RankSpans("rank 0", 0, 0, spans)], []), 0, 130 * US).ranks
    assert rank.ns[Row.TRANSFER] == 30 * US
    assert (rank.ns[Row.UNATTRIBUTED], rank.overlapped_ns) == (0, 0)


def test_what_no_driver_tells_is_unattributed() -> None:
    """Of a trace without its engine, and of the time after an engine's end."""
    whole = Piped(2, 20, 2, host_ns=50 * US).run()
    end_ns = whole.ledger().end_ns
    without = make_ledger(Recorded(whole.recorded.ranks, []), 0, end_ns)
    later = make_ledger(whole.recorded, end_ns + US, end_ns + 2 * US)
    for rank in (*without.ranks, *later.ranks):
        assert rank.ns[Row.HOST] == 0
        assert rank.share(Row.UNATTRIBUTED) > 0.02
    assert all(rank.share(Row.UNATTRIBUTED) == 1 for rank in later.ranks)


def test_spans_that_are_gone_are_told_as_unattributed() -> None:
    piped = Piped(2, 20, 2).run()
    ranks = [RankSpans("rank 0", 0, 0, piped.stages[0]), RankSpans("rank 1", 1, 0, [])]
    first, second = make_ledger(Recorded(ranks, piped.driver), 0, 10**6).ranks
    assert second.ns[Row.UNATTRIBUTED] > 0
    assert first.ns[Row.COMPUTE] > 0


@pytest.mark.parametrize("lost", [SpanKind.COMPUTE, SpanKind.WAIT, SpanKind.WORK])
def test_no_other_row_takes_what_a_lost_kind_of_span_would_tell(lost: SpanKind) -> None:
    piped = Piped(2, 40, 2, lambda stage, step: (100, 300)[stage] * US, host_ns=200 * US).run()
    whole = piped.recorded
    ranks = [
        RankSpans(rank.name, rank.stage, rank.tp_rank, [it for it in rank.spans if it.kind is not lost])
        for rank in whole.ranks
    ]  # fmt: skip
    left = Recorded(ranks, [span for span in whole.engine if span.kind is not lost])
    window = 0, max(span.end_ns for span in whole.ranks[-1].spans)
    for before, after in zip(
        make_ledger(whole, *window).ranks, make_ledger(left, *window).ranks, strict=True
    ):
        assert before.ns[Row.UNATTRIBUTED] == 0
        assert after.ns[Row.UNATTRIBUTED] > 0 or after.ns == before.ns
        assert after.ns[Row.HOST] <= before.ns[Row.HOST]
    assert any(rank.ns[Row.UNATTRIBUTED] for rank in make_ledger(left, *window).ranks)


def test_ranks_may_begin_before_the_driver_is_back_from_telling_them() -> None:
    """Stage 0 works for 90 us, while the driver is still telling: stage 1 waits for it, and for no host."""
    first = [
        Span(SpanKind.STEP, US, 91 * US, 0, 0, 0),
        Span(SpanKind.COMPUTE, US, 91 * US, 0, 0, 0),
    ]
    second = [
        Span(SpanKind.STEP, US, 100 * US, 0, 0, 0),
        Span(SpanKind.RECV, US, 91 * US, 0, 0, 0),
        Span(SpanKind.COMPUTE, 91 * US, 100 * US, 0, 0, 0),
    ]
    ranks = [RankSpans("rank 0", 0, 0, first), RankSpans("rank 1", 1, 0, second)]
    told = [
        Span(SpanKind.SUBMIT, 0, 95 * US, 0, 0, 0),
        Span(SpanKind.WAIT, 95 * US, 100 * US, 0, 0, 0),
    ]
    ledger = make_ledger(Recorded(ranks, told), 0, 100 * US)
    assert ledger.ranks[1].ns[Row.FILL_DRAIN] == 90 * US
    assert ledger.ranks[1].ns[Row.HOST] == US


def test_what_overlaps_counts_once() -> None:
    """A sum that begins while ids are still received, and a send beside both."""
    spans = [
        Span(SpanKind.STEP, 0, 100 * US, 0, 0, 0),
        Span(SpanKind.RECV, 0, 30 * US, 0, 0, 0),
        Span(SpanKind.COMPUTE, 20 * US, 90 * US, 0, 0, 0),
        Span(SpanKind.ALL_REDUCE, 25 * US, 40 * US, 0, 0, 0),
        Span(SpanKind.SEND, 10 * US, 95 * US, 0, 0, 0),
    ]
    told = [Span(SpanKind.SUBMIT, -US, 0, 0, 0, 0), Span(SpanKind.WAIT, 0, 100 * US, 0, 0, 0)]
    (rank,) = make_ledger(Recorded([RankSpans("rank 0", 0, 0, spans)], told), 0, 100 * US).ranks
    assert rank.ns[Row.UNATTRIBUTED] == 0
    assert rank.ns[Row.COMPUTE] == 55 * US
    assert rank.ns[Row.COLLECTIVE_MOVE] == 15 * US
    assert sum(rank.ns.values()) == 100 * US
