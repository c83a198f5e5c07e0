"""Where ranks of several hosts meet: a store of torch's, at one address of one host, on a socket that was bound
before, so that it takes no port that is fixed and listens nowhere else."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store


def hold_meeting(listener: socket.socket, timeout_s: float) -> Store:
    """Takes the socket over."""
    host, port = listener.getsockname()[:2]
    return dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def come_to_meeting(host: str, port: int, timeout_s: float) -> Store:
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
