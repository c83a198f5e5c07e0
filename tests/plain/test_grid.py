"""The grid shows what took most of each moment."""

from __future__ import annotations

from piped import US, Piped

from bireme.observe.grid import grid


def test_a_pipeline_of_micro_batches_fills_and_drains() -> None:
    piped = Piped(3, 4, 4, lambda *_: 1000 * US).run()
    assert grid(piped.ledger(), 6) == {
        "rank 0": "0123//",
        "rank 1": "/0123/",
        "rank 2": "//0123",
    }


def test_one_request_alternates_between_the_stages() -> None:
    piped = Piped(2, 3, 1, lambda *_: 1000 * US).run()
    assert grid(piped.ledger(), 6) == {"rank 0": "0~1~2/", "rank 1": "/0~1/2"}
