"""Micro-batches are made first come, first served, within their size, and nobody waits too long."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bireme.vision.batching import BatchQueue, Share

DELAY_S = 2.0


@dataclass(eq=False)
class Asked:
    num_images: int
    arrival_s: float
    shares: list[tuple[int, Share[Asked]]] = field(default_factory=list)  # with its micro-batch


@given(
    max_batch_size=st.integers(1, 8),
    events=st.lists(
        st.tuples(st.floats(0, 3), st.integers(0, 20), st.booleans()), min_size=1, max_size=40
    ),
)
def test_images_go_in_their_order_and_in_time(
    max_batch_size: int, events: list[tuple[float, int, bool]]
) -> None:
    """Each event: time passes, perhaps a request comes, perhaps the pipeline takes all that is there."""
    queue = BatchQueue[Asked](max_batch_size, DELAY_S)
    asked: list[Asked] = []
    taken: list[list[Share[Asked]]] = []
    now_s = 0.0
    for seconds, num_images, takes in events:
        now_s += seconds
        if num_images:
            asked.append(Asked(num_images, now_s))
            queue.put(asked[-1], num_images, now_s)
        while takes and (shares := queue.take(now_s)):
            taken.append(shares)
        if takes:
            check_waiting(queue, now_s)
    while (due_s := queue.due_s) is not None:
        shares = queue.take(due_s)
        assert shares, "it is due"
        taken.append(shares)
    assert queue.num_images == 0
    check_taken(asked, taken, max_batch_size)


def check_waiting(queue: BatchQueue[Asked], now_s: float) -> None:
    """What is left after all was taken is less than a micro-batch, and may still wait."""
    assert queue.num_images < queue.max_batch_size
    assert queue.due_s is None or now_s < queue.due_s <= now_s + DELAY_S


def check_taken(asked: list[Asked], taken: list[list[Share[Asked]]], most: int) -> None:
    in_order = [share for shares in taken for share in shares]
    expected = [(one, index) for one in asked for index in range(one.num_images)]
    found = [(it.request, index) for it in in_order for index in range(it.first, it.stop)]
    assert found == expected, "first come, first served, each image once"
    for number, shares in enumerate(taken):
        assert 0 < sum(share.num_images for share in shares) <= most
        for share in shares:
            share.request.shares.append((number, share))
    for one in asked:
        parts = [share.num_images for _, share in one.shares]
        assert len(parts) == -(-one.num_images // most), "cut only where it is larger than one"


def test_a_full_micro_batch_waits_for_nothing() -> None:
    queue = BatchQueue[str](4, DELAY_S)
    queue.put("a", 3, 0.0)
    assert (queue.take(0.0), queue.due_s) == ([], DELAY_S)
    queue.put("b", 1, 1.0)
    assert queue.take(1.0) == [Share("a", 0, 3), Share("b", 0, 1)]


def test_one_that_does_not_fit_lets_those_before_it_go() -> None:
    queue = BatchQueue[str](4, DELAY_S)
    queue.put("a", 3, 0.0)
    queue.put("b", 2, 0.5)
    assert queue.take(0.5) == [Share("a", 0, 3)]
    assert (queue.take(0.5), queue.due_s) == ([], 0.5 + DELAY_S)
    assert queue.take(0.5 + DELAY_S) == [Share("b", 0, 2)]


def test_the_rest_of_a_large_request_takes_others_along() -> None:
    queue = BatchQueue[str](4, 0.0)
    queue.put("a", 9, 0.0)
    queue.put("b", 2, 0.0)
    assert [queue.take(0.0) for _ in range(4)] == [
        [Share("a", 0, 4)], [Share("a", 4, 8)], [Share("a", 8, 9), Share("b", 0, 2)], [],
    ]  # fmt: skip


@pytest.mark.parametrize("dropped", ["a", "b", "c"])
def test_what_was_dropped_is_not_taken(dropped: str) -> None:
    queue = BatchQueue[str](4, DELAY_S)
    for name in "abc":
        queue.put(name, 1, 0.0)
    queue.drop(dropped)
    assert queue.num_images == 2
    assert [share.request for share in queue.take(DELAY_S)] == [it for it in "abc" if it != dropped]
