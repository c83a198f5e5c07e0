"""What a rank hands over to ranks of other stages, whatever carries it.

A message is rows of one step behind a header that states step and size. A receiver that expected
something else raises: no transport is trusted to notice a short message.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch

from bireme.kernels.host_copies import download, upload
from bireme.parallel.message_header import Stated
from bireme.parallel.pipeline import Edge
from bireme.request import StepHeader


def message_head(stated: Stated, device: torch.device) -> torch.Tensor:
    """[HEADER_BYTES] uint8 on the device, without a host synchronisation."""
    return upload(torch.frombuffer(bytearray(stated.pack()), dtype=torch.uint8), device)


class LateChecks:
    """Of what messages state. On CUDA it is read a step later, without a host synchronisation."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._waiting: deque[tuple[torch.cuda.Event, torch.Tensor, Stated]] = deque()

    def check(self, head: torch.Tensor, expected: Stated) -> None:
        """EngineError where this message, or on CUDA an earlier one, states something else."""
        if not head.is_cuda:
            return self._compare(head, expected)
        arriving, event = download(head), torch.cuda.Event()
        event.record()
        self._waiting.append((event, arriving, expected))
        while self._waiting and self._waiting[0][0].query():
            _, arrived, wanted = self._waiting.popleft()
            self._compare(arrived, wanted)
        return None

    def finish(self) -> None:
        """Waits for all that is left."""
        while self._waiting:
            event, arrived, wanted = self._waiting.popleft()
            event.synchronize()
            self._compare(arrived, wanted)

    def _compare(self, head: torch.Tensor, expected: Stated) -> None:
        Stated.unpack(head.numpy().data).check(expected, self._edge)


class Sender(Protocol):
    """The sending side of a rank's edges of one kind."""

    def send(self, header: StepHeader, rows: torch.Tensor) -> None:
        """Sends rows [T, ...] of a step to every receiver of this rank; what follows in their stream may overwrite
        them, unless messages leave beside it (`PeerRoom.sends_beside`)."""
        ...

    def drain(self) -> None:
        """Returns when what was sent no longer needs this process."""
        ...


class Receiver(Protocol):
    """The receiving side of one edge."""

    def receive(
        self,
        header: StepHeader,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Rows of `shape`; EngineError if the sender states another step or size."""
        ...

    def finish(self) -> None:
        """Returns when what was received is known to be what was stated; EngineError where it is not."""
        ...
