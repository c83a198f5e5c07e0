"""What the GPUs of a host keep room for in one another's memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PeerRoom:
    """Bytes of the largest message of hidden states from stage to stage, and of sampled ids back to the first; of a
    token's hidden states that a tensor group sums, and of the largest sum. 0: these go over NCCL. `sends_beside`:
    messages leave on a stream of their own, so that what follows them goes on meanwhile, and whoever sends leaves alone
    what is on its way."""

    hidden_bytes: int = 0
    sampled_bytes: int = 0
    row_bytes: int = 0
    sum_bytes: int = 0
    sends_beside: bool = False
