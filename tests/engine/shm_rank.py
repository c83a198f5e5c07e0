"""One rank of a world over shared memory, for tests: `python shm_rank.py WHAT RANK WIDTHS PATH`."""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

from bireme.errors import PeerLost
from bireme.parallel.shm import CHUNK_BYTES, Segment, SegmentPlan, ShmGroup
from bireme.trace import SpanRing

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SIZES = (1, 300, CHUNK_BYTES // 4 + 7)


def addend(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + size % 997)
    return (torch.randn(size, generator=generator) * 100).to(dtype)


def sums(group: ShmGroup, rank: int) -> list[str]:
    """The bits of every sum and gather, as one number each."""
    found = []
    for dtype in DTYPES:
        for size in SIZES:
            total = group.all_reduce(addend(rank, size, dtype))
            whole = group.all_gather(addend(rank, size, dtype))
            found += [str(total.double().sum().item()), str(whole.double().sum().item())]
            found += [bits(total), bits(whole)]
    return found


def bits(x: torch.Tensor) -> str:
    return str(hash(x.contiguous().view(torch.uint8).numpy().tobytes()))


def main() -> None:
    what, rank = sys.argv[1], int(sys.argv[2])
    widths = tuple(json.loads(sys.argv[3]))
    plan = SegmentPlan(widths=widths, hidden_bytes=4096, sampled_bytes=64)
    segment = Segment(sys.argv[4], plan, 2.0 if what == "late" else 60.0)
    group = ShmGroup(segment, rank, SpanRing.create(64))
    if what == "sums":
        print(json.dumps(sums(group, rank)))
    elif rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        try:
            group.all_reduce(torch.ones(4))
        except PeerLost as error:
            print(error)


if __name__ == "__main__":
    main()
