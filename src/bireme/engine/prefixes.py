"""Full blocks of requests under keys of all tokens up to their ends, so that requests that begin alike share them."""

from __future__ import annotations

from bireme.engine.request_state import RequestState
from bireme.kvcache.block_manager import BlockManager, block_keys


class Prefixes:
    """Keys are made once a request, as far as its tokens are known. `depends_on_length`: keys and values are those of
    requests with the same longest length only."""

    def __init__(self, blocks: BlockManager, *, is_on: bool, depends_on_length: bool) -> None:
        self._blocks, self._is_on, self._depends_on_length = blocks, is_on, depends_on_length

    def cached_keys(self, state: RequestState) -> list[bytes]:
        """Of the full blocks that it need not compute; its last token is computed in any case."""
        if not self._is_on:
            return []
        self._extend_keys(state)
        if state.request.params.prompt_logprobs is not None:
            return []
        most = (len(state.token_ids) - 1) // self._blocks.block_size
        return state.keys[: self._blocks.num_cached_blocks(state.keys[:most])]

    def share(self, state: RequestState, slot: int) -> None:
        """Just before its first chunk: even a prompt of the same batch may have begun alike."""
        keys = self.cached_keys(state)
        self._blocks.release(slot)  # where it could not begin before, what it shared then
        state.shared = self._blocks.start(slot, keys)
        state.num_published = len(keys)
        state.num_computed = state.num_cached = state.num_places = self._blocks.num_held(slot)

    def publish(self, state: RequestState) -> None:
        """Blocks that are full, under way, and whose tokens are known can be shared."""
        if not self._is_on or state.slot is None:
            return
        known = min(state.num_computed, len(state.token_ids)) // self._blocks.block_size
        if known <= state.num_published:
            return
        self._extend_keys(state)
        first, state.num_published = state.num_published, known
        self._blocks.publish(state.slot, first, state.keys[first:known])

    def _extend_keys(self, state: RequestState) -> None:
        size, keys = self._blocks.block_size, state.keys
        if len(state.token_ids) >= (len(keys) + 1) * size:
            parent = keys[-1] if keys else self._root(state)
            keys += block_keys(parent, state.token_ids[len(keys) * size :], size)

    def _root(self, state: RequestState) -> bytes:
        """Where rotary frequencies depend on a request's longest length, so do its keys and values."""
        salt = state.request.max_len if self._depends_on_length else 0
        return salt.to_bytes(8, "little")
