"""How programs come to a GPU's multiprocessors."""

from __future__ import annotations

from bireme.kernels.choice import MULTIPROCESSORS


def at_once(num_programs: int) -> int:
    """Of which a multiprocessor has to have so many that none waits for another."""
    return -(-num_programs // MULTIPROCESSORS)


def busy(num_programs: int) -> float:
    """The share of multiprocessors that have one, while the last ones run too."""
    return num_programs / (MULTIPROCESSORS * at_once(num_programs))
