"""When requests are sent: seconds after the start, from a seed or from a trace, in order.

An open loop sends at these times whatever the answers do. The gaps of a Poisson process are those of
a gamma distribution of shape 1; a smaller shape (`burstiness`) comes in bursts, a larger one evenly.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from bireme.errors import RequestError

KINDS = ("poisson", "gamma", "constant")


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """`rate` requests a second; infinite: all at once. The first is due at 0."""

    kind: str = "poisson"
    rate: float = math.inf
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"arrival={self.kind!r} must be one of {', '.join(KINDS)}")
        if not self.rate > 0:
            raise RequestError(f"request_rate={self.rate} must be above 0; inf sends all at once")
        if not 0 < self.burstiness < math.inf:
            raise RequestError(f"burstiness={self.burstiness} must be above 0 and finite")
        if self.kind != "gamma" and self.burstiness != 1:
            raise RequestError(
                f"burstiness={self.burstiness} shapes gamma arrivals, not {self.kind} ones; "
                "leave it at 1, or take gamma"
            )

    def offsets(self) -> Iterator[float]:
        """Without end; the same for the same seed."""
        if math.isinf(self.rate):
            return itertools.repeat(0.0)
        if self.kind == "constant":
            return (index / self.rate for index in itertools.count())
        return itertools.accumulate(self._gaps(), initial=0.0)

    def _gaps(self) -> Iterator[float]:
        draw = random.Random(f"arrivals {self.seed}")
        scale = 1 / (self.rate * self.burstiness)
        while True:
            yield draw.gammavariate(self.burstiness, scale)
