"""The ledger of the ranks behind this server, made by a process beside it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

import bireme
from bireme.engine.service_messages import RingPlace
from bireme.errors import CapacityError, EngineError
from bireme.observe.recorder import Asked, AskedRank
from bireme.observe.told import NUM_COLUMNS, ToldLedger

_ANSWER_S = 30.0  # with the wait for its turn
_MOST_CALLERS = 4  # one is answered, others wait
_MOST_BYTES = 16 << 20


class LedgerReader:
    """Reads the rings of one engine's ranks, also when they or the engine are gone."""

    def __init__(self) -> None:
        self._lock, self._num_callers = asyncio.Lock(), 0
        self._process: Process | None = None
        self.ranks: list[AskedRank] = []
        self._engine_fd = -1

    def begin(self, rings: Sequence[RingPlace], engine_ring: str) -> None:
        """Opens the rings, while the engine is there to ask for them."""
        if engine_ring:
            self._engine_fd = os.open(engine_ring, os.O_RDWR)
            self.ranks = [
                AskedRank(ring.name, ring.stage, ring.tp_rank, os.open(ring.path, os.O_RDWR))
                for ring in rings
            ]

    @property
    def is_there(self) -> bool:
        return bool(self.ranks)

    async def last(
        self, seconds: float, num_columns: int = NUM_COLUMNS, *, is_running: bool = True
    ) -> ToldLedger:
        """Of that many seconds up to now, or up to the end of an engine that runs no more. EngineError where
        it cannot be made, CapacityError behind too many."""
        if self._num_callers >= _MOST_CALLERS:
            raise CapacityError(
                f"{self._num_callers} callers wait for a ledger, of at most {_MOST_CALLERS}; "
                "try again later"
            )
        self._num_callers += 1
        try:
            return await self.soon(seconds, _ANSWER_S, num_columns, is_running=is_running)
        finally:
            self._num_callers -= 1

    async def soon(
        self,
        seconds: float,
        turn_s: float,
        num_columns: int = NUM_COLUMNS,
        *,
        is_running: bool = True,
        most_steps: int | None = None,
        gantt_steps: int = 0,
        gantt_bars: int = 0,
    ) -> ToldLedger:
        """The same, however many wait; EngineError where its turn does not come within `turn_s`. Of the last
        `most_steps` where there were more. With `gantt_steps` the last of them as bars."""
        asked = Asked(
            self.ranks, self._engine_fd, seconds, num_columns, is_running, most_steps,
            gantt_steps, gantt_bars,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._in_turn(msgspec.json.encode(asked), turn_s)
        except (TimeoutError, OSError, msgspec.DecodeError) as error:
            raise EngineError(f"the ledger could not be made: {error!r}") from None

    async def _in_turn(self, asked: bytes, turn_s: float) -> ToldLedger:
        try:
            async with asyncio.timeout(turn_s):
                await self._lock.acquire()
        except TimeoutError:
            raise EngineError(
                f"the ledger could not be made: its turn did not come within {turn_s:g} s"
            ) from None
        try:
            return msgspec.json.decode(await self._ask(asked), type=ToldLedger)
        except BaseException:  # its answer, still to come, would be taken for the next caller's
            await self._end()
            raise
        finally:
            self._lock.release()

    async def _ask(self, asked: bytes) -> bytes:
        if self._process is None:
            self._process = await self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(asked + b"\n")
        await self._process.stdin.drain()
        return await self._process.stdout.readline()

    async def _start(self) -> Process:
        root = str(Path(bireme.__file__).parent.parent)
        path = os.environ.get("PYTHONPATH")
        return await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "bireme.observe.recorder",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._engine_fd, *(rank.fd for rank in self.ranks)],
            start_new_session=True,
            limit=_MOST_BYTES,
            env={**os.environ, "PYTHONPATH": root + (os.pathsep + path if path else "")},
        )  # fmt: skip

    async def aclose(self) -> None:
        await self._end()
        for fd in (self._engine_fd, *(rank.fd for rank in self.ranks)):
            if fd >= 0:
                os.close(fd)
        self.ranks, self._engine_fd = [], -1

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
