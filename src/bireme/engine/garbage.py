"""Garbage collections, which stop the thread that tells ranks of their steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_objects_left_out() -> Iterator[None]:
    """What is there now is no work of collections until the end: to look through all that torch and others brought
    takes longer than many steps. Unless the program left objects out itself."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect(1)  # else what is young and dead now would be old, and counted nowhere
    try:
        gc.freeze()
        yield
    finally:
        gc.unfreeze()
