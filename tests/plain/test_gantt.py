"""The last steps as bars: what is long is where it was, what is short is put together, and all is bounded."""

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


def bars(ledger: Ledger, num_columns: int, num_steps: int | None = None) -> list[Bar]:
    (rank,) = Gantt.of(ledger, num_columns, num_steps).ranks
    return rank.bars


def test_a_pipeline_is_drawn_as_it_ran() -> None:
    ledger = Piped(2, 3, 1, lambda *_: 1000 * US).run().ledger()
    first, second = Gantt.of(ledger, 1000).ranks
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


def test_what_is_shorter_than_a_column_shows_as_what_took_most_of_it() -> None:
    ledger = of_pieces(
        (0, 500, Row.COMPUTE, 1),
        (500, 530, Row.COLLECTIVE_MOVE, 1),
        (530, 600, Row.COLLECTIVE_WAIT, 1),
        (600, 1000, Row.COMPUTE, 1),
    )
    assert bars(ledger, 10) == [
        Bar(0, 500, Row.COMPUTE, 1),
        Bar(500, 600, Row.COLLECTIVE_WAIT, 1),
        Bar(600, 1000, Row.COMPUTE, 1),
    ]


def test_many_short_pieces_change_within_a_column() -> None:
    rows = [Row.COMPUTE] * 50 + [Row.TRANSFER] * 50
    ledger = of_pieces(*((10 * it, 10 * it + 10, row, 1) for it, row in enumerate(rows)))
    assert bars(ledger, 10) == [
        Bar(0, 500, Row.COMPUTE, 1),
        Bar(500, 1000, Row.TRANSFER, 1),
    ]


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
    lengths: list[tuple[int, bool]], num_columns: int
) -> None:
    at, pieces, gaps = 0, [], 0
    for index, (length, is_there) in enumerate(lengths):
        if is_there or not pieces:
            pieces.append((at, at + length, list(Row)[index % 5], index))
        else:
            gaps += 1
        at += length
    found = bars(of_pieces(*pieces), num_columns)
    assert len(found) <= 2 * num_columns + 3 + gaps
    assert all(bar.start_us < bar.end_us for bar in found)
    assert all(before.end_us <= after.start_us for before, after in pairwise(found))
    covered = sum(end - start for start, end, _, _ in pieces)
    assert sum(bar.end_us - bar.start_us for bar in found) == covered
