"""How much of a prompt is found in the cache: as much as every kind has, as far back as it looks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bireme.kvcache.block_manager import BlockManager
from bireme.parallel.layout import CacheKind

BLOCK = 4


def cached(windows: list[int | None], present: list[list[bool]]) -> BlockManager:
    """Block i of kind k is there, under the key of i, where `present[k][i]`."""
    length = len(present[0])
    blocks = BlockManager([CacheKind(window, length + 1) for window in windows], BLOCK)
    blocks.start(0, [])
    blocks.extend(0, length * BLOCK)
    for pool, table, there in zip(blocks._pools, blocks._tables[0], present, strict=True):
        for index in range(length):
            if there[index]:
                pool.publish(table.blocks[index], bytes([index]))
    return blocks


def is_enough(window: int | None, there: list[bool], num_blocks: int) -> bool:
    """A query at the first token behind the blocks finds all that it looks at."""
    query = num_blocks * BLOCK
    seen = range(0 if window is None else max(0, query - window + 1), query)
    return all(there[position // BLOCK] for position in seen)


@given(st.data())
def test_the_longest_beginning_that_every_kind_has_is_found(data: st.DataObject) -> None:
    windows = data.draw(
        st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=3, unique=True)
    )
    length = data.draw(st.integers(0, 12))
    mostly = st.sampled_from([True, True, True, False])
    row = st.lists(mostly, min_size=length, max_size=length)
    present = [data.draw(row) for _ in windows]
    longest = max(
        count
        for count in range(length + 1)
        if all(is_enough(w, there, count) for w, there in zip(windows, present, strict=True))
    )
    blocks = cached(windows, present)
    assert blocks.num_cached_blocks([bytes([index]) for index in range(length)]) == longest
