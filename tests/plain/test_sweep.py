"""Where throughput stops growing."""

from __future__ import annotations

import pytest

from bireme.observe.sweep import best_size


@pytest.mark.parametrize(
    ("rates", "size"),
    [
        ({}, None),
        ({8: 5.0}, 8),
        ({1: 10.0, 2: 20.0, 4: 40.0}, 4),  # it still grows
        ({1: 10.0, 2: 19.0, 4: 20.0, 8: 12.0}, 2),
        ({4: 30.0, 1: 29.0}, 1),
    ],
)
def test_the_smallest_size_that_is_nearly_the_best(
    rates: dict[int, float], size: int | None
) -> None:
    assert best_size(rates) == size
