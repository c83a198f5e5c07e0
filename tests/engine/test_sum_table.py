"""Which way of summing rows a table names; it is measured in tests/gpu/test_peer_group_on_gpu.py."""

from __future__ import annotations

import math

from bireme.parallel.sum_table import SumTable, Way, quickest


def test_a_bound_holds_up_to_it_and_the_last_beyond() -> None:
    table = SumTable(((32, Way.ONE_SHOT), (96, Way.ONE_SHOT), (4096, Way.TWO_SHOT)))
    assert [table.way(rows) for rows in (1, 32, 96)] == [Way.ONE_SHOT] * 3
    assert [table.way(rows) for rows in (97, 4096, 5000)] == [Way.TWO_SHOT] * 3


def test_the_first_way_stays_unless_another_is_surely_quicker() -> None:
    ways = [Way.ONE_SHOT, Way.TWO_SHOT, Way.NCCL]
    assert quickest(ways, [1.0, 0.97, 2.0]) is Way.ONE_SHOT
    assert quickest(ways, [1.0, 0.8, 0.79]) is Way.TWO_SHOT
    assert quickest(ways, [math.inf, math.inf, 3.0]) is Way.NCCL
