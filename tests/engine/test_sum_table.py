"""Which way of summing rows a table names; it is measured in tests/gpu/test_peer_group_on_gpu.py."""

from __future__ import annotations

from bireme.parallel.sum_table import SumTable, Way


def test_a_bound_holds_up_to_it_and_the_last_beyond() -> None:
    table = SumTable(((32, Way.ONE_SHOT), (96, Way.ONE_SHOT), (4096, Way.TWO_SHOT)))
    assert [table.way(rows) for rows in (1, 32, 96)] == [Way.ONE_SHOT] * 3
    assert [table.way(rows) for rows in (97, 4096, 5000)] == [Way.TWO_SHOT] * 3
