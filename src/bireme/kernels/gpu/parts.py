"""Products whose sum over their inputs is not made yet: parts float32 [P, T, N], which the next kernel adds up as it
reads them, so that more programs can read a weight of few outputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def summed(first, inside, apart, PARTS: tl.constexpr, dtype: tl.constexpr):
    """The elements at `first`, of PARTS that lie `apart` elements from one another, rounded as a whole product is."""
    total = tl.load(first, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(first + part * apart, mask=inside, other=0.0)
    return total.to(dtype)
