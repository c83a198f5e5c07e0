"""The last steps as bars: the last ones as they were, those before by their shares of time, and all is bounded."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from piped import US, Piped

from bireme.observe.causes import Row
from bireme.observe.gantt import Bar, Gantt
from bireme.observe.ledger import Ledger, Piece, RankLedger


def of_pieces(*pieces: tuple[int, int, Row, int | None]) -> Ledger:
    """In microseconds."""
    found = [
        Piece(start * US, end * US, row, None if step is None else (0, step))
        for start, end, row, step in pieces
    ]
    end_ns = max(piece.end_ns for piece in found)
    return Ledger(0, end_ns, [RankLedger("rank 0", 0, end_ns, found, {}, 0, False)])


def bars(ledger: Ledger, most_bars: int, num_steps: int | None = None) -> list[Bar]:
    (rank,) = Gantt.of(ledger, most_bars, num_steps).ranks
    return rank.bars


def test_a_pipeline_is_drawn_as_it_ran() -> None:
    ledger = Piped(2, 3, 1, lambda *_: 1000 * US).run().ledger()
    drawn = Gantt.of(ledger, 1000)
    first, second = drawn.ranks
    assert (drawn.num_steps, drawn.whole_us, drawn.column_us) == (3, 0, 0)
    assert [(bar.row, bar.step) for bar in first.bars if bar.end_us - bar.start_us > 100] == [
        ("compute", 0),
        ("token_dependency", None),
        ("compute", 1),
        ("token_dependency", None),
        ("compute", 2),
        ("fill_drain", None),
    ]
    of_stage_1 = {bar.step: bar for bar in second.bars if bar.row is Row.COMPUTE}
    for bar in first.bars:
        if bar.row is Row.COMPUTE and bar.end_us - bar.start_us > 100:
            assert of_stage_1[bar.step].start_us >= bar.end_us


def test_all_is_drawn_as_it_was_where_there_is_room() -> None:
    ledger = of_pieces(
        (0, 500, Row.COMPUTE, 1),
        (500, 501, Row.COLLECTIVE_MOVE, 1),
        (501, 1000, Row.COMPUTE, 1),
    )
    assert bars(ledger, 3) == [
        Bar(0, 500, Row.COMPUTE, 1),
        Bar(500, 501, Row.COLLECTIVE_MOVE, 1),
        Bar(501, 1000, Row.COMPUTE, 1),
    ]


def test_the_last_bars_are_whole_and_those_before_keep_their_shares() -> None:
    """A step is 6 us of work and 4 of waiting: 12 of 20 us in each column, in whatever order."""
    pieces = [
        piece
        for it in range(100)
        for piece in (
            (10 * it, 10 * it + 6, Row.COMPUTE, it),
            (10 * it + 6, 10 * it + 10, Row.TOKEN_DEPENDENCY, None),
        )
    ]
    drawn = Gantt.of(of_pieces(*pieces), 160)
    assert (drawn.num_steps, drawn.whole_us, drawn.column_us) == (100, 400, 20)
    (rank,) = drawn.ranks
    before = [bar for bar in rank.bars if bar.end_us <= 400]
    assert before == [
        bar
        for at in range(0, 400, 20)
        for bar in (
            Bar(at, at + 12, Row.COMPUTE, None),
            Bar(at + 12, at + 20, Row.TOKEN_DEPENDENCY, None),
        )
    ]
    whole = [Bar(*piece) for piece in pieces if piece[0] >= 400]
    assert [bar for bar in rank.bars if bar.end_us > 400] == whole


def test_what_lasts_longer_than_a_column_is_one_bar() -> None:
    short = [(1000 + it, 1001 + it, list(Row)[it % 3], 2) for it in range(60)]
    found = bars(of_pieces((0, 1000, Row.COMPUTE, 1), *short), 40)
    assert found[0] == Bar(0, 1000 - 1000 % 344, Row.COMPUTE, 1)


def test_neighbours_that_look_alike_are_one() -> None:
    ledger = of_pieces(
        (0, 400, Row.COMPUTE, 1), (400, 800, Row.COMPUTE, 1), (800, 1000, Row.HOST, 1)
    )
    assert bars(ledger, 10) == [Bar(0, 800, Row.COMPUTE, 1), Bar(800, 1000, Row.HOST, 1)]


def test_only_the_last_steps_are_there_when_asked() -> None:
    ledger = of_pieces(*((100 * it, 100 * it + 100, Row.COMPUTE, it) for it in range(10)))
    assert bars(ledger, 100, 2) == [Bar(0, 100, Row.COMPUTE, 8), Bar(100, 200, Row.COMPUTE, 9)]
    assert Gantt.of(ledger, 100, 2).seconds == 200e-6
    assert len(bars(ledger, 100, 99)) == 10


LENGTHS = st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 50))
def test_bars_are_bounded_and_cover_what_the_pieces_cover(
    lengths: list[tuple[int, bool]], most_bars: int
) -> None:
    at, pieces = 0, []
    for index, (length, is_there) in enumerate(lengths):
        if is_there or not pieces:
            pieces.append((at, at + length, list(Row)[index % 5], index))
        at += length
    found = bars(of_pieces(*pieces), most_bars)
    assert len(found) <= most_bars + 5
    assert all(bar.start_us < bar.end_us for bar in found)
    assert all(before.end_us <= after.start_us for before, after in pairwise(found))
    for row in Row:
        spent = sum(end - start for start, end, it, _ in pieces if it is row)
        assert sum(bar.end_us - bar.start_us for bar in found if bar.row is row) == spent
