"""What ranks make together or do without, such as memory of one another's GPUs, which a driver or a container may
refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch._C._distributed_c10d import Store

T = TypeVar("T")


def made_by_all(
    make: Callable[[], T], name: str, instead: str, ranks: Sequence[int], rank: int, store: Store
) -> T | None:
    """What `make` made, where it did on all `ranks`, which call this with the same `name`, once a store. None where
    it failed on one of them, whose log tells why, and what is done `instead`."""
    made = _tried(make, instead)
    store.set(f"{name}/{rank}", "0" if made is None else "1")
    return made if all(store.get(f"{name}/{peer}") == b"1" for peer in ranks) else None


def _tried(make: Callable[[], T], instead: str) -> T | None:
    try:
        return make()
    except (RuntimeError, OSError, ImportError) as error:  # of a driver, its bindings, and stores
        logging.getLogger(__name__).warning("%s: %s", instead, error)
        return None
