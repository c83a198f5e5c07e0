"""The driver's side of one world: ranks that are told things together, listened to, and named when they fail."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import NoReturn

import msgspec

from bireme.engine.channel import StepChannel
from bireme.engine.clocks import Look, quickest
from bireme.engine.culprit import Standing, find_culprit
from bireme.engine.deadline import Patience
from bireme.engine.messages import Clock, Failed, Leave, ReadClock, encode, frame
from bireme.engine.pool import GRACE_S, WorkerPool
from bireme.engine.process_stat import is_stopped
from bireme.errors import BiremeError, RankError, UserError
from bireme.parallel.pipeline import stage_ranks
from bireme.trace import Now, Span


def _are_secondary(seen: dict[int, Failed | None]) -> bool:
    return all(reply is not None and reply.is_secondary for reply in seen.values())


class World:
    """Commands out, replies in, failures named.

    On a failure the pool's processes are ended and RankError (or the user's error) is raised.
    """

    def __init__(
        self, pool: WorkerPool, names: Sequence[str], widths: Sequence[int], timeout_s: float
    ) -> None:
        self._pool, self.names, self._widths = pool, names, widths
        self.ranks = pool.take(len(names))
        self._selector = selectors.DefaultSelector()
        for index, rank in enumerate(self.ranks):
            rank.sock.settimeout(timeout_s)
            self._selector.register(rank.sock, selectors.EVENT_READ, index)
        self.is_broken = False
        self._timeout_s = timeout_s
        self._early: deque[tuple[int, msgspec.Struct]] = deque()
        self.channel: StepChannel | None = None  # through which all are told what follows Join

    def close(self) -> None:
        """Lets go of the ranks; nothing can be sent or received from here on."""
        self.is_broken = True
        self._selector.close()

    def leave(self, timeout_s: float) -> None:
        """Ranks drop what they hold; their processes stay with the pool."""
        self.send_all(Leave())
        self.gather(timeout_s, "leaving")
        self.close()

    def compare_clocks(self, timeout_s: float) -> None:
        """Has every rank's times read on this process's clock."""
        behind_ns = quickest(lambda: self._look_at_clocks(timeout_s)).behind_ns
        for rank, offset_ns in zip(self.ranks, behind_ns, strict=True):
            rank.spans.set_clock(offset_ns)

    def _look_at_clocks(self, timeout_s: float) -> Look:
        start_ns = time.monotonic_ns()
        self.send_all(ReadClock())
        replies = self.gather(timeout_s, "reading its clock")
        end_ns = time.monotonic_ns()
        return Look(start_ns, end_ns, [it.ns for it in replies if isinstance(it, Clock)])

    def spans(self, since_ns: int = 0) -> dict[str, list[Span]]:
        """Every rank's spans since then, by the rank's name."""
        ranks = zip(self.names, self.ranks, strict=True)
        return {name: rank.spans.read(since_ns) for name, rank in ranks}

    def send_all(self, command: msgspec.Struct, patience: Patience | None = None) -> None:
        """The same to every rank, encoded once."""
        assert self.channel is not None
        patience = patience or Patience(self._timeout_s, self._timeout_s)

        def watch(index: int) -> None:
            self._read_early()  # a rank that waits to be heard takes no command
            rank = self.ranks[index]
            if rank.process.poll() is not None:
                self._fail({index: None})
            sign = index, rank.spans.now()
            if time.monotonic() >= patience.next_look and patience.is_over(sign):
                raise self._no_answer({index}, "taking a command")

        self.channel.send(encode(command), watch)

    def send(self, index: int, command: msgspec.Struct) -> None:
        """To one rank, over its socket."""
        try:
            self.ranks[index].sock.sendall(frame(command))
        except TimeoutError:  # its buffer is full and it reads nothing
            raise self._no_answer({index}, "taking a command") from None
        except (BrokenPipeError, ConnectionResetError):
            self._fail({index: None})

    def gather(self, timeout_s: float, doing: str) -> list[msgspec.Struct]:
        """One reply of every rank, in rank order."""
        replies: dict[int, msgspec.Struct] = {}
        deadline = time.monotonic() + timeout_s
        while len(replies) < len(self.ranks):
            found = self._next(deadline)
            if found is None:
                raise self._no_answer(set(range(len(self.ranks))) - replies.keys(), doing)
            replies[found[0]] = found[1]
        return [replies[index] for index in range(len(self.ranks))]

    def wait(self, wake: int, patience: Patience, step_id: int, until: float | None = None) -> bool:
        """False if `wake` becomes readable, or it is `until` (of the monotonic clock), before a rank
        replies; as patient as `step_reply`."""
        while not self._early:
            next_look = patience.next_look
            found = self._await_any(wake, next_look if until is None else min(next_look, until))
            if wake not in found and found:
                return True
            self._check_lateness(patience, step_id)
            if found or (until is not None and time.monotonic() >= until):
                return False
        return True

    def wait_idle(self, wake: int, until: float | None = None) -> bool:
        """False once `wake` is readable or it is `until`; raises as soon as a rank is gone or says that
        it failed."""
        while (found := self._await_any(wake, until)) and wake not in found:
            self._read_early()
        return False

    def _await_any(self, wake: int, until: float | None) -> set[int]:
        """Which descriptors can be read: `wake`, or else ranks'; None by that time."""
        self._selector.register(wake, selectors.EVENT_READ)
        try:
            timeout = None if until is None else max(0.0, until - time.monotonic())
            found = {key.fd for key, _ in self._selector.select(timeout)}
        finally:
            self._selector.unregister(wake)
        return found - {wake} or found

    def has_reply(self) -> bool:
        return bool(self._early or self._selector.select(0))

    def step_reply(self, patience: Patience, step_id: int) -> msgspec.Struct:
        """The next reply of any rank, which should be the output of step `step_id`."""
        while (found := self._next(patience.next_look, step_id)) is None:
            self._check_lateness(patience, step_id)
        return found[1]

    def _check_lateness(self, patience: Patience, step_id: int) -> None:
        """Takes a look where one is due; RankError where patience ends with it."""
        if time.monotonic() >= patience.next_look and patience.is_over(self._sign_of_life(step_id)):
            raise self._late_answer(step_id, patience.why_over)

    def _sign_of_life(self, step_id: int) -> tuple[int | None, Now | None]:
        """The rank that keeps a step from its end, and what it is in the middle of."""
        standings = self._standings()
        culprit = find_culprit(standings, step_id)
        return culprit, None if culprit is None else standings[culprit].now

    def _late_answer(self, step_id: int, why: str) -> RankError:
        error = self._late(step_id, how=f", {why}")
        self._break()
        return error or RankError("the answering rank", f"did not answer step {step_id} in time")

    def _next(
        self, deadline: float, step_id: int | None = None
    ) -> tuple[int, msgspec.Struct] | None:
        """The next rank that replies, with its reply; None if there is none by the deadline."""
        if self._early:
            return self._early.popleft()
        return self._read(deadline, step_id)

    def _read_early(self) -> None:
        """What ranks say while they are told something."""
        while (found := self._read(0.0)) is not None:
            self._early.append(found)

    def _read(
        self, deadline: float, step_id: int | None = None
    ) -> tuple[int, msgspec.Struct] | None:
        while events := self._selector.select(max(0.0, deadline - time.monotonic())):
            index = events[0][0].data
            reply, is_gone = self._take(index)
            if is_gone or isinstance(reply, Failed):
                self._fail({index: reply if isinstance(reply, Failed) else None}, step_id)
            if reply is not None:
                return index, reply
        return None

    def _take(self, index: int) -> tuple[msgspec.Struct | None, bool]:
        """What a rank has said, None while it is not whole; and whether the rank is gone."""
        try:
            return self.ranks[index].replies.next(), False
        except EOFError:
            return None, True

    def _no_answer(self, awaited: set[int], doing: str) -> RankError:
        stopped = {index for index in awaited if is_stopped(self.ranks[index].process.pid)}
        names = ", ".join(self.names[index] for index in sorted(stopped or awaited))
        self._break()
        why = " (its process is stopped)" if stopped else ""
        return RankError(names, f"did not answer in time while {doing}{why}")

    def _late(
        self, step_id: int, given_up: Collection[int] = (), how: str = ""
    ) -> RankError | None:
        """Names the rank that keeps a step from its end, beside those that waited in vain."""
        standings = self._standings(given_up)
        culprit = find_culprit(standings, step_id)
        if culprit is None:
            return None
        seen = standings[culprit].describe(step_id)
        return RankError(
            self.names[culprit], f"did not finish step {step_id} in time ({seen}{how})"
        )

    def _standings(self, given_up: Collection[int] = ()) -> dict[int, Standing]:
        return {
            index: self._standing(index, stage)
            for stage, members in enumerate(stage_ranks(self._widths))
            for index in members
            if index not in given_up
        }

    def _standing(self, index: int, stage: int) -> Standing:
        rank = self.ranks[index]
        return Standing(stage, is_stopped(rank.process.pid), rank.spans.now())

    def _fail(self, seen: dict[int, Failed | None], step_id: int | None = None) -> NoReturn:
        """Raises the first cause, or names the rank that others waited for in vain."""
        self._listen(seen)
        error: BiremeError | None = None
        if _are_secondary(seen) and step_id is not None:
            error = self._late(step_id, seen)
        error = error or self._cause(seen)
        self._break()
        raise error

    def _listen(self, seen: dict[int, Failed | None]) -> None:
        """Adds what other ranks say within a moment, until one says more than that a peer is gone."""
        deadline = time.monotonic() + GRACE_S
        while _are_secondary(seen):
            for index in seen:
                if self.ranks[index].sock in self._selector.get_map():
                    self._selector.unregister(self.ranks[index].sock)
            events = self._selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                return
            for key, _ in events:
                reply, is_gone = self._take(key.data)
                if is_gone or isinstance(reply, Failed):
                    seen[key.data] = reply if isinstance(reply, Failed) else None

    def _cause(self, seen: dict[int, Failed | None]) -> BiremeError:
        causes = [index for index, reply in seen.items() if reply is None or not reply.is_secondary]
        index = next(iter(causes or seen))
        reply, name = seen[index], self.names[index]
        if reply is None:
            end = self.ranks[index].describe_end()
            return RankError(name, f"its process {end}")
        if reply.is_user_error:
            return UserError(f"{name}: {reply.cause.partition(': ')[2]}")
        return RankError(name, reply.cause, reply.traceback)

    def give_up(self) -> None:
        """Ends the ranks at once, whatever they are at."""
        if not self.is_broken:
            self._break()

    def _break(self) -> None:
        self.is_broken = True
        self._selector.close()
        self._pool.close(grace_s=0.0)
