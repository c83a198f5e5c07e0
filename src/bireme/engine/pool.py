"""Rank processes: started and ended. They can serve one model after another (`engine/world.py` talks to them).

A rank starts as `python -m bireme.engine.worker` (or what its `Program` says), in a session of its
own (Ctrl-C reaches the driver alone), with a socket pair as its lifeline and a span ring in
anonymous shared memory.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bireme.engine.messages import LANGUAGE_MODEL, Program, ReplyReader
from bireme.engine.setup import num_cores
from bireme.trace import SpanRing

GRACE_S = 2.0  # for the first cause to arrive once a failure was seen
_EXIT_S = 5.0


@dataclass
class RankProcess:
    """One worker process and the driver's ends of what it was given."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    replies: ReplyReader
    spans: SpanRing
    is_begun: bool = False  # a world has told it something

    def describe_end(self) -> str:
        try:
            code = self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return "closed its socket and did not end"
        return f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"


def _environment() -> dict[str, str]:
    """The caller's, with this package importable and gloo and NCCL kept on loopback."""
    package_root = str(Path(__file__).parents[2])
    path = os.environ.get("PYTHONPATH")
    return {
        "GOMP_SPINCOUNT": "10000",  # about 30 us: a thread that spins longer starves other ranks
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "PYTHONPATH": package_root + (os.pathsep + path if path else ""),
        "OMP_NUM_THREADS": "1",  # torch is told its number of threads when a world is joined
    }


def _start(program: Program) -> RankProcess:
    ours, theirs = socket.socketpair()
    spans = SpanRing.create()
    fds = (theirs.fileno(), spans.fd)
    command = [sys.executable, "-P", "-m", program.module, *map(str, fds)]
    try:
        process = subprocess.Popen(
            command,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=_environment(),
        )
    except BaseException:
        spans.close_fd()
        raise
    finally:
        theirs.close()
    return RankProcess(process, ours, ReplyReader(ours, program), spans)


class WorkerPool:
    """Processes that become the ranks of one world after another; a context manager.

    After a failure all are ended; the next `take` starts new ones. `program` is what each runs.
    """

    def __init__(self, program: Program = LANGUAGE_MODEL) -> None:
        self._program = program
        self._processes: list[RankProcess] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, num_ranks: int) -> None:
        """Has processes import what they need, before a world takes them; where there is a core for each, since
        they would hold up who waits for them."""
        if num_ranks <= num_cores():
            self._live(num_ranks)

    def take(self, num_ranks: int) -> list[RankProcess]:
        """`num_ranks` live processes; the same ones every time, more where more are needed."""
        ranks = self._live(num_ranks)
        for rank in ranks:
            rank.is_begun = True
        return ranks

    def _live(self, num_ranks: int) -> list[RankProcess]:
        if any(rank.process.poll() is not None for rank in self._processes):
            self.close()
        while len(self._processes) < num_ranks:
            self._processes.append(_start(self._program))
        return self._processes[:num_ranks]

    def kill(self) -> None:
        """Ends all processes at once, from any thread; who talks with them finds them gone."""
        for rank in list(self._processes):
            rank.process.kill()

    def close(self, grace_s: float = _EXIT_S) -> None:
        """Ends all processes: closing their lifelines, then by force; at once those that hold nothing yet."""
        for rank in self._processes:
            rank.sock.close()
            if not rank.is_begun:
                rank.process.kill()
        deadline = time.monotonic() + grace_s
        try:
            for rank in self._processes:
                with suppress(subprocess.TimeoutExpired):
                    rank.process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # also where a second Ctrl-C broke the wait off
            for rank in self._processes:
                rank.process.kill()
            for rank in self._processes:
                rank.process.wait()
                rank.spans.close_fd()
            self._processes = []
