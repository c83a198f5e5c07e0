"""Which block of the cache holds which tokens of which slot: bookkeeping only, no tensors.

A block is a fixed number of token places. Layers that look back equally far are one kind, with
blocks and a table of their own; block ids mean the same on every rank and stage. Block 0 of each
kind is the null block: padding reads it and nobody writes it.

A full block is known by a key, the hash of its tokens and of all before them. Its content outlives
its users until the block is needed: requests that begin alike share it. Steps run in the order in
which they were scheduled, so a block may be shared before the step that writes it has run, and be
given away before the last step that reads it has.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, takewhile

from bireme.errors import CapacityError
from bireme.parallel.layout import CacheKind

NULL_BLOCK = 0


def block_keys(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Of the full blocks of tokens behind the block with key `parent`. Nobody can make two prompts
    collide."""
    data = array("i", token_ids).tobytes()
    num_bytes = len(data) // max(1, len(token_ids)) * block_size
    keys: list[bytes] = []
    for start in range(0, len(data) - num_bytes + 1, num_bytes):
        block = parent + data[start : start + num_bytes]
        parent = hashlib.blake2b(block, digest_size=16).digest()
        keys.append(parent)
    return keys


class BlockPool:
    """The blocks of one kind, each of them free, cached (its content is known, nobody uses it) or
    used by one or more tables."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_users = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_available

    def take(self, count: int) -> list[int]:
        """Blocks for new tokens; what was cached longest ago is forgotten first."""
        rest = max(0, len(self._free) - count)
        taken = self._free[rest:][::-1]
        del self._free[rest:]
        while len(taken) < count:
            block, _ = self._cached.popitem(last=False)
            del self._blocks[self._keys.pop(block)]
            taken.append(block)
        for block in taken:
            self._num_users[block] = 1
        return taken

    def find(self, key: bytes) -> int | None:
        return self._blocks.get(key)

    def num_leading(self, keys: Sequence[bytes]) -> int:
        """How many of the first ones are there."""
        return sum(1 for _ in takewhile(self._blocks.__contains__, keys))

    def runs(self, keys: Sequence[bytes]) -> list[int]:
        """For each key how many in a row are there, up to and with it."""
        there = map(self._blocks.__contains__, keys)
        return list(accumulate(there, lambda run, is_there: (run + 1) * is_there, initial=0))[1:]

    def is_used(self, block: int) -> bool:
        return self._num_users[block] > 0

    def share(self, block: int) -> None:
        self._cached.pop(block, None)
        self._num_users[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Lets others find the block, unless another one holds the same."""
        if block not in self._keys and key not in self._blocks:
            self._keys[block], self._blocks[key] = key, block

    def release(self, block: int) -> None:
        self._num_users[block] -= 1
        if self._num_users[block]:
            return
        if block in self._keys:
            self._cached[block] = None
        else:
            self._free.append(block)

    def check_integrity(self, held: Sequence[int]) -> None:
        """`held`: every block of every table. free + cached + used == total, each in one place."""
        used = {block for block in held if block != NULL_BLOCK}
        places = sorted([*self._free, *self._cached, *used])
        assert places == list(range(1, self.num_blocks)), "a cache block was lost or held twice"
        counts = [0] * self.num_blocks
        for block in held:
            counts[block] += block != NULL_BLOCK
        assert counts == self._num_users, "a cache block's users were miscounted"
        assert all(block in self._keys for block in self._cached), "a cached block has no key"
        assert {key: block for block, key in self._keys.items()} == self._blocks


class _Table:
    """Blocks of one slot in one kind, by position; those below `num_dropped` were let go."""

    def __init__(self, blocks: list[int], num_dropped: int) -> None:
        self.blocks, self.num_dropped = blocks, num_dropped

    @property
    def held(self) -> list[int]:
        return self.blocks[self.num_dropped :]


class BlockManager:
    """Block tables of the slots, one a kind. Invariant of each kind: free + cached + used == total."""

    def __init__(self, kinds: Sequence[CacheKind], block_size: int) -> None:
        self.block_size = block_size
        self._windows = [kind.window for kind in kinds]
        self._pools = [BlockPool(kind.num_blocks) for kind in kinds]
        self._tables: dict[int, list[_Table]] = {}

    @property
    def num_kinds(self) -> int:
        return len(self._pools)

    @property
    def num_used(self) -> int:
        return sum(pool.num_used for pool in self._pools)

    @property
    def usage(self) -> float:
        """The used share (0 to 1) of the kind that is fullest."""
        shares = (pool.num_used / (pool.num_blocks - 1) for pool in self._pools)
        return max(shares, default=0.0)

    @property
    def num_available(self) -> tuple[int, ...]:
        return tuple(pool.num_available for pool in self._pools)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_ever_hold(self, num_tokens: int, chunk: int) -> bool:
        """True if a request of so many tokens, alone, `chunk` at a time, fits."""
        return all(
            self._num_at_once(window, num_tokens, chunk) < pool.num_blocks
            for window, pool in zip(self._windows, self._pools, strict=True)
        )

    def _num_at_once(self, window: int | None, num_tokens: int, chunk: int) -> int:
        """Blocks that a request holds at most while it grows to `num_tokens`."""
        if window is not None:
            num_tokens = min(num_tokens, window + chunk + self.block_size)
        return self.blocks_for(num_tokens)

    # --- prefixes ------------------------------------------------------------------------------

    def num_cached_blocks(self, keys: Sequence[bytes]) -> int:
        """How many of the first blocks are there, in every kind as far back as it looks."""
        kinds = list(zip(self._windows, self._pools, strict=True))
        whole = (pool.num_leading(keys) for window, pool in kinds if window is None)
        most = min(whole, default=len(keys))
        windowed = [
            (window, pool.runs(keys[:most])) for window, pool in kinds if window is not None
        ]
        for length in range(most, 0, -1):
            if all(
                runs[length - 1] >= length - self._first_needed(window, length)
                for window, runs in windowed
            ):
                return length
        return 0

    def _first_needed(self, window: int | None, num_blocks: int) -> int:
        """The first block that a query behind `num_blocks` full blocks looks at."""
        if window is None:
            return 0
        return max(0, num_blocks * self.block_size - window + 1) // self.block_size

    def can_start(
        self, keys: Sequence[bytes], num_tokens: int, chunk: int, reserve: Sequence[int]
    ) -> bool:
        """True if a request of `num_tokens`, of which the blocks `keys` are cached, has room beside
        `reserve` blocks of each kind."""
        for window, pool, kept in zip(self._windows, self._pools, reserve, strict=True):
            needed = self._num_at_once(window, num_tokens, chunk)
            shared = keys[self._first_needed(window, len(keys)) :]
            blocks = [block for key in shared if (block := pool.find(key)) is not None]
            in_use = sum(pool.is_used(block) for block in blocks)
            if max(needed, len(shared)) - in_use + kept > pool.num_available:
                return False
        return True

    def start(self, slot: int, keys: Sequence[bytes]) -> list[list[int]]:
        """Makes the tables of a slot, which share the cached blocks `keys`; returns them."""
        tables = []
        for window, pool in zip(self._windows, self._pools, strict=True):
            first = self._first_needed(window, len(keys))
            found = [pool.find(key) for key in keys[first:]]
            blocks = [NULL_BLOCK if block is None else block for block in found]
            assert NULL_BLOCK not in blocks, "a prefix was taken that is not cached"
            for block in blocks:
                pool.share(block)
            tables.append(_Table([NULL_BLOCK] * first + blocks, first))
        self._tables[slot] = tables
        return [list(table.blocks) for table in tables] if keys else []

    def publish(self, slot: int, first: int, keys: Sequence[bytes]) -> None:
        """Blocks from index `first` on of the slot are full and have these keys."""
        for pool, table in zip(self._pools, self._tables[slot], strict=True):
            for index, key in enumerate(keys, first):
                if index >= table.num_dropped:
                    pool.publish(table.blocks[index], key)

    # --- growth --------------------------------------------------------------------------------

    def num_held(self, slot: int) -> int:
        """Tokens that the slot has places for."""
        return len(self._tables[slot][0].blocks) * self.block_size

    def num_missing(self, slot: int, num_tokens: int) -> int:
        """Blocks of each kind that `slot` needs beside its own to hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(self._tables[slot][0].blocks))

    def needed_at_once(self, num_tokens: int, chunk: int) -> list[int]:
        """Blocks of each kind that a request holds while it grows to `num_tokens`, `chunk` tokens at a
        time."""
        return [self._num_at_once(window, num_tokens, chunk) for window in self._windows]

    def missing_at_once(self, slot: int, num_tokens: int, chunk: int) -> list[int]:
        """The same, beside what the slot holds already."""
        needed = self.needed_at_once(num_tokens, chunk)
        tables = zip(needed, self._tables[slot], strict=True)
        return [max(0, count - len(table.held)) for count, table in tables]

    def drop_unseen(self, slot: int, start: int) -> None:
        """Lets go of blocks that no query from position `start` on looks at."""
        for window, pool, table in zip(self._windows, self._pools, self._tables[slot], strict=True):
            if window is None:
                continue
            stop = min(len(table.blocks), max(0, start - window + 1) // self.block_size)
            for index in range(table.num_dropped, stop):
                pool.release(table.blocks[index])
            table.num_dropped = max(table.num_dropped, stop)

    def can_extend(self, slot: int, num_tokens: int) -> bool:
        missing = self.num_missing(slot, num_tokens)
        return all(missing <= pool.num_available for pool in self._pools)

    def extend(self, slot: int, num_tokens: int) -> list[list[int]]:
        """Gives `slot` blocks until it holds `num_tokens` tokens; the new ones of each kind, or an
        empty list. CapacityError where there are not as many."""
        missing = self.num_missing(slot, num_tokens)
        if not missing:
            return []
        if not self.can_extend(slot, num_tokens):
            least = min(self.num_available)
            raise CapacityError(f"slot {slot} needs {missing} more blocks, {least} are free")
        new = [pool.take(missing) for pool in self._pools]
        for table, blocks in zip(self._tables[slot], new, strict=True):
            table.blocks.extend(blocks)
        return new

    def release(self, slot: int) -> None:
        """Takes all blocks of `slot` back; the last ones are forgotten first."""
        for pool, table in zip(self._pools, self._tables.pop(slot), strict=True):
            for block in reversed(table.held):
                pool.release(block)

    def check_integrity(self) -> None:
        """Every block but the null blocks is in exactly one place, with the right count of users."""
        for kind, pool in enumerate(self._pools):
            pool.check_integrity(
                [block for tables in self._tables.values() for block in tables[kind].held]
            )
