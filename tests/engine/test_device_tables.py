"""Block tables on a device are those that the pieces told of, whatever came before."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from bireme.engine.device_tables import DeviceTables
from bireme.parallel.layout import CacheKind

NUM_SLOTS, MAX_BLOCKS = 3, 7
KINDS = (CacheKind(None, 100), CacheKind(64, 50), CacheKind(32, 50))
HELD = {None, 32}  # of layers of 64 another stage has all

counts = st.lists(st.integers(0, 3), min_size=NUM_SLOTS, max_size=NUM_SLOTS)


@given(st.lists(counts, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_tables_grow_by_what_each_slot_was_given(steps: list[list[int]], random: Random) -> None:
    tables = DeviceTables(KINDS, HELD, NUM_SLOTS, MAX_BLOCKS, torch.device("cpu"))
    wanted = {window: [[0] * MAX_BLOCKS for _ in range(NUM_SLOTS + 1)] for window in HELD}
    sizes = [0] * NUM_SLOTS
    for step in steps:
        added = []
        for slot, count in enumerate(step):
            size = sizes[slot] if sizes[slot] + count <= MAX_BLOCKS else 0  # a new request's
            blocks = [[random.randrange(1, 50) for _ in range(count)] for _ in KINDS]
            added.append((slot, size, blocks))
            sizes[slot] = size + count
            for kind, ids in zip(KINDS, blocks, strict=True):
                if kind.window in HELD:
                    wanted[kind.window][slot][size : size + count] = ids
        tables.extend(added)
    assert {window: table.tolist() for window, table in tables.of.items()} == wanted
