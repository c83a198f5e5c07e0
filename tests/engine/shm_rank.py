"""One rank of a world over shared memory, for tests: `python shm_rank.py WHAT RANK PLAN PATH`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys

import msgspec
import torch

from bireme.errors import PeerLost
from bireme.parallel.segment_plan import CHUNK_BYTES, SegmentPlan
from bireme.parallel.shm import Segment, ShmGroup, join_group
from bireme.trace import SpanRing

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
SIZES = (1, 300, 1025, CHUNK_BYTES // 4 + 7)
NUM_ROUNDS = 200


def addend(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + size % 997)
    return (torch.randn(size, generator=generator) * 100).to(dtype)


def sums(group: ShmGroup, rank: int) -> list[str]:
    """The bits of every sum and gather, hashed."""
    found = []
    for dtype in DTYPES:
        for size in SIZES:
            total = group.all_reduce(addend(rank, size, dtype))
            whole = group.all_gather(addend(rank, size, dtype))
            found += [bits(total), bits(whole)]
    return found


def rounds(group: ShmGroup, rank: int) -> float:
    """Many small sums: ranks that share a core must take turns."""
    x = torch.zeros(512)
    for _ in range(NUM_ROUNDS):
        group.all_reduce(x.fill_(rank))
    return x[0].item()


def bits(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def main() -> None:
    what, rank = sys.argv[1], int(sys.argv[2])
    plan = msgspec.json.decode(sys.argv[3], type=SegmentPlan)
    segment = Segment(sys.argv[4], plan, 2.0 if what == "late" else 60.0)
    group = join_group(segment, rank, SpanRing.create(64))
    if what == "sums":
        print(json.dumps(sums(group, rank)))
    elif what == "rounds":
        print(rounds(group, rank))
    elif rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        try:
            group.all_reduce(torch.ones(4))
        except PeerLost as error:
            print(error)


if __name__ == "__main__":
    main()
