"""Which block of the cache holds which tokens of which slot: bookkeeping only, no tensors.

A block is a fixed number of token places. Block ids mean the same on every rank and stage. Block 0
is the null block: padding reads it and nobody writes it.
"""

from __future__ import annotations

from bireme.errors import CapacityError

NULL_BLOCK = 0


class BlockManager:
    """Free blocks and the block table of each slot.

    Invariant: free + used == total - 1 (the null block is neither).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._tables: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return sum(len(table) for table in self._tables.values())

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing(self, slot: int, num_tokens: int) -> int:
        """Blocks that `slot` needs beside those that it has, to hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(self._tables.get(slot, ())))

    def can_hold(self, slot: int, num_tokens: int) -> bool:
        return self.num_missing(slot, num_tokens) <= self.num_free

    def extend(self, slot: int, num_tokens: int) -> list[int]:
        """Gives `slot` blocks until it holds `num_tokens` tokens; returns the new ones."""
        missing = self.num_missing(slot, num_tokens)
        if missing > self.num_free:
            raise CapacityError(
                f"slot {slot} needs {missing} more blocks, {self.num_free} are free"
            )
        new = [self._free.pop() for _ in range(missing)]
        self._tables.setdefault(slot, []).extend(new)
        return new

    def release(self, slot: int) -> None:
        """Takes all blocks of `slot` back."""
        self._free.extend(reversed(self._tables.pop(slot, [])))

    def check_integrity(self) -> None:
        """Every block but the null block is in exactly one place."""
        held = [block for table in self._tables.values() for block in table]
        everything = sorted(held + self._free)
        assert everything == list(range(1, self.num_blocks)), "a cache block was lost or held twice"
