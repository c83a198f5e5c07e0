"""The driver's side of a world: what a rank says amid whatever the driver does is heard, and a rank
that stops amid a reply holds nobody up. Threads and sleeping processes stand in for ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from bireme.engine.channel import RingSteps, open_channel, open_source
from bireme.engine.deadline import Patience
from bireme.engine.messages import Capture, Done, Output, Reply, ReplyReader, decode, frame
from bireme.engine.pool import RankProcess, WorkerPool
from bireme.engine.world import World
from bireme.errors import RankError
from bireme.parallel.broadcast import RingPlan
from bireme.parallel.counters import create_memory
from bireme.request import StepOutput
from bireme.trace import SpanRing

LARGE = 8 << 20  # more than a socket buffers


@dataclass
class StandIn(WorkerPool):
    """A pool of one process that says what the test says for it, over `said`."""

    rank: RankProcess
    said: socket.socket

    def take(self, num_ranks: int) -> list[RankProcess]:
        assert num_ranks == 1
        return [self.rank]

    def close(self, grace_s: float = 0.0) -> None:
        self.rank.process.kill()
        self.rank.process.wait()
        for end in (self.rank.sock, self.said):
            end.close()


@contextmanager
def world_of_one() -> Iterator[tuple[World, StandIn]]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(["sleep", "600"])
    pool = StandIn(RankProcess(process, ours, ReplyReader(ours), SpanRing.create()), theirs)
    try:
        yield World(pool, ["rank 0"], (1,), timeout_s=60.0), pool
    finally:
        pool.close()


def large_output() -> Output:
    return Output(StepOutput(0, 1, [0], [[7] * (LARGE // 2)]))


def test_replies_come_whole_whatever_the_pieces() -> None:
    replies: list[Reply] = [Done(), Output(StepOutput(0, 3, [1], [[2, 3]])), Done()]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        reader, found = ReplyReader(ours), []
        for byte in b"".join(map(frame, replies)):
            theirs.send(bytes([byte]))
            if (reply := reader.next()) is not None:
                found.append(reply)
        assert found == replies
        theirs.sendall(frame(Done())[:3])
        theirs.close()
        with pytest.raises(EOFError):
            reader.next()


def test_a_rank_that_stops_amid_a_reply_is_named_at_its_deadline() -> None:
    with world_of_one() as (world, pool):
        pool.said.sendall(frame(large_output())[:1000])
        os.kill(pool.rank.process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(RankError, match=r"rank 0: .*step 1 in time \(its process is stopped"):
            world.step_reply(Patience(0.2, 60.0), 1)
        assert time.monotonic() - start < 30, "the socket's own timeout is 60 s"


def test_a_rank_that_waits_to_be_heard_is_heard_while_it_is_told_something() -> None:
    """It takes no command before its reply is out, and the command does not fit the ring."""
    told = Capture("x" * LARGE, probes=False)
    with world_of_one() as (world, pool):
        plan = RingPlan(num_readers=1)
        fd, path = create_memory(plan.num_bytes, "steps")
        steps = RingSteps(path, plan)
        world.channel = open_channel(steps)
        source, heard = open_source(steps, 0), []

        def live() -> None:
            pool.said.sendall(frame(large_output()))
            body = source.receive(60.0)
            heard.append(decode(body) if body is not None else None)

        rank = threading.Thread(target=live)
        rank.start()
        world.send_all(told)
        rank.join(60.0)
        assert heard == [told]
        assert world.has_reply()
        assert world.step_reply(Patience(60.0, 60.0), 1) == large_output()
        os.close(fd)
