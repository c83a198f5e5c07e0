"""Rank processes: started, talked to, and ended. They can serve one model after another.

A rank starts as `python -m bireme.engine.worker`, in a session of its own (Ctrl-C reaches the
driver alone), with a socket pair as its lifeline and a span ring in anonymous shared memory.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bireme
from bireme.engine.messages import Command, Failed, Reply, receive_reply, send
from bireme.errors import RankError, UserError
from bireme.trace import SpanRing

_GRACE_S = 2.0  # for the first cause to arrive once a failure was seen
_EXIT_S = 5.0


@dataclass
class RankProcess:
    """One worker process and the driver's ends of what it was given."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    spans: SpanRing

    def describe_end(self) -> str:
        code = self.process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exited with status {code}"


def _environment() -> dict[str, str]:
    """The caller's, with this package importable and gloo and NCCL kept on loopback."""
    package_root = str(Path(bireme.__file__).parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {
        "GOMP_SPINCOUNT": "10000",  # about 30 us: a thread that spins longer starves other ranks
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "PYTHONPATH": package_root + (os.pathsep + path if path else ""),
        "OMP_NUM_THREADS": "1",  # torch is told its number of threads when a world is joined
    }


def _start() -> RankProcess:
    ours, theirs = socket.socketpair()
    spans = SpanRing.create()
    fds = (theirs.fileno(), spans.fd)
    command = [sys.executable, "-P", "-m", "bireme.engine.worker", *map(str, fds)]
    try:
        process = subprocess.Popen(
            command,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=_environment(),
        )
    finally:
        theirs.close()
    return RankProcess(process, ours, spans)


class WorkerPool:
    """Processes that become the ranks of one world after another; a context manager.

    After a failure all are ended; the next `take` starts new ones.
    """

    def __init__(self) -> None:
        self._processes: list[RankProcess] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, num_ranks: int) -> list[RankProcess]:
        """`num_ranks` live processes; the same ones every time, more where more are needed."""
        if any(rank.process.poll() is not None for rank in self._processes):
            self.close()
        while len(self._processes) < num_ranks:
            self._processes.append(_start())
        return self._processes[:num_ranks]

    def close(self) -> None:
        """Ends all processes: closing their lifelines, then by force."""
        for rank in self._processes:
            rank.sock.close()
        deadline = time.monotonic() + _EXIT_S
        for rank in self._processes:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
            rank.spans.close()
        self._processes = []


class World:
    """The driver's side of one world: commands out, replies in, failures named.

    On a failure the pool's processes are ended and RankError (or the user's error) is raised.
    """

    def __init__(self, pool: WorkerPool, names: Sequence[str]) -> None:
        self._pool, self._names = pool, names
        self.ranks = pool.take(len(names))
        self._selector = selectors.DefaultSelector()
        for index, rank in enumerate(self.ranks):
            self._selector.register(rank.sock, selectors.EVENT_READ, index)
        self.is_broken = False

    def close(self) -> None:
        self._selector.close()

    def send(self, index: int, command: Command) -> None:
        try:
            send(self.ranks[index].sock, command)
        except (BrokenPipeError, ConnectionResetError):
            self._fail({index: None})

    def send_all(self, command: Command) -> None:
        for index in range(len(self.ranks)):
            self.send(index, command)

    def gather(self, timeout_s: float, doing: str) -> list[Reply]:
        """One reply of every rank, in rank order."""
        replies: dict[int, Reply] = {}
        deadline = time.monotonic() + timeout_s
        while len(replies) < len(self.ranks):
            index, reply = self._next(deadline, doing, set(range(len(self.ranks))) - replies.keys())
            replies[index] = reply
        return [replies[index] for index in range(len(self.ranks))]

    def next_reply(self, timeout_s: float, doing: str) -> Reply:
        """The next reply of any rank."""
        return self._next(time.monotonic() + timeout_s, doing, set())[1]

    def _next(self, deadline: float, doing: str, awaited: set[int]) -> tuple[int, Reply]:
        events = self._selector.select(max(0.0, deadline - time.monotonic()))
        if not events:
            late = (
                ", ".join(self._names[index] for index in sorted(awaited)) or "the answering rank"
            )
            self._break()
            raise RankError(late, f"did not answer in time while {doing}")
        found = {key.data: receive_reply(self.ranks[key.data].sock) for key, _ in events[:1]}
        ((index, reply),) = found.items()
        if reply is None or isinstance(reply, Failed):
            self._fail({index: reply})
        assert reply is not None
        return index, reply

    def _fail(self, seen: dict[int, Failed | None]) -> None:
        """Collects what other ranks say for a moment, then raises the first cause."""
        deadline = time.monotonic() + _GRACE_S
        while all(isinstance(reply, Failed) and reply.is_secondary for reply in seen.values()):
            for index in seen:
                if self.ranks[index].sock in self._selector.get_map():
                    self._selector.unregister(self.ranks[index].sock)
            events = self._selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                break
            for key, _ in events:
                reply = receive_reply(self.ranks[key.data].sock)
                if reply is None or isinstance(reply, Failed):
                    seen[key.data] = reply
        self._raise(seen)

    def _raise(self, seen: dict[int, Failed | None]) -> None:
        def is_cause(index: int) -> bool:
            reply = seen[index]
            return reply is None or not reply.is_secondary

        index = next((index for index in seen if is_cause(index)), next(iter(seen)))
        reply, name = seen[index], self._names[index]
        end = None
        if reply is None:
            end = self.ranks[index].describe_end()
        self._break()
        if reply is None:
            raise RankError(
                name,
                f"its process was {end}"
                if end and end.startswith("killed")
                else f"its process {end}",
            )
        if reply.is_user_error:
            raise UserError(f"{name}: {reply.cause.partition(': ')[2]}")
        raise RankError(name, reply.cause, reply.traceback)

    def _break(self) -> None:
        self.is_broken = True
        self._selector.close()
        self._pool.close()
