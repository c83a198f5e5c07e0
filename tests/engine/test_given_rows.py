"""What a graph is told of a step's rows: those of its pieces, then rows of no request."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bireme.engine.given_rows import GivenRows
from bireme.kernels.query_tiles import tiles_of
from bireme.request import ScheduledPiece

ROWS, MOST_TILES, PADDING = 128, 40, 9

pieces = st.builds(
    lambda slot, start, ids: ScheduledPiece(slot, start, len(ids or [0]), ids, [], samples=True),
    st.integers(0, 8), st.integers(0, 500), st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=70),
)  # fmt: skip
steps = st.lists(pieces, min_size=1, max_size=20).filter(
    lambda step: sum(piece.num_tokens for piece in step) <= ROWS
)


@given(st.lists(steps, min_size=1, max_size=3))
def test_rows_with_prompts(steps: list[list[ScheduledPiece]]) -> None:
    memory = torch.full(
        (GivenRows.num_words(2 * ROWS, MOST_TILES),), -7
    )  # and of a larger size too
    rows = GivenRows(memory, ROWS, MOST_TILES)
    for step in steps:
        count = sum(piece.num_tokens for piece in step)
        rows.become(step, count, PADDING)
        tokens = [
            (piece.slot, piece.start + at, -1 if piece.token_ids is None else piece.token_ids[at])
            for piece in step
            for at in range(piece.num_tokens)
        ]
        tokens += [(PADDING, 0, 0)] * (ROWS - count)
        assert rows.ids is not None
        assert torch.stack((rows.slots, rows.positions, rows.ids), 1).tolist() == [
            list(token) for token in tokens
        ]
        assert rows.tiles is not None
        cut = tiles_of([it.start for it in step], [it.num_tokens for it in step]).tolist()
        assert rows.tiles.on_device.tolist() == cut + [[0] * 4] * (MOST_TILES - len(cut))
    assert memory[GivenRows.num_words(ROWS, MOST_TILES) :].eq(-7).all()


def test_rows_of_new_tokens_alone() -> None:
    rows = GivenRows(torch.full((GivenRows.num_words(4, None),), -7), 4, None)
    rows.become([ScheduledPiece(5, 30, 1, None, [], samples=True)], 1, PADDING)
    assert rows.slots.tolist() == [5, PADDING, PADDING, PADDING]
    assert rows.positions.tolist() == [30, 0, 0, 0]
    assert rows.ids is None
    assert rows.tiles is None
    rows.clear(PADDING)
    assert rows.slots.tolist() == [PADDING] * 4
    assert rows.positions.tolist() == [0] * 4
