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
from bireme.errors import EngineError
from bireme.observe.recorder import Asked, AskedRank
from bireme.observe.told import NUM_COLUMNS, ToldLedger

_ANSWER_S = 30.0
_MOST_BYTES = 16 << 20


class LedgerReader:
    """Reads the rings of one engine's ranks, also when they or the engine are gone."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._ranks: list[AskedRank] = []
        self._engine_fd = -1

    def begin(self, rings: Sequence[RingPlace], engine_ring: str) -> None:
        """Opens the rings, while the engine is there to ask for them."""
        if engine_ring:
            self._engine_fd = os.open(engine_ring, os.O_RDWR)
            self._ranks = [
                AskedRank(ring.name, ring.stage, ring.tp_rank, os.open(ring.path, os.O_RDWR))
                for ring in rings
            ]

    @property
    def is_there(self) -> bool:
        return bool(self._ranks)

    async def last(self, seconds: float, num_columns: int = NUM_COLUMNS) -> ToldLedger:
        """Of that many seconds up to now; EngineError where it cannot be made."""
        asked = msgspec.json.encode(Asked(self._ranks, self._engine_fd, seconds, num_columns))
        async with self._lock:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    return msgspec.json.decode(await self._ask(asked), type=ToldLedger)
            except (TimeoutError, OSError, msgspec.DecodeError) as error:
                await self._end()
                raise EngineError(f"the ledger could not be made: {error!r}") from None

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
            pass_fds=[self._engine_fd, *(rank.fd for rank in self._ranks)],
            start_new_session=True,
            limit=_MOST_BYTES,
            env={**os.environ, "PYTHONPATH": root + (os.pathsep + path if path else "")},
        )  # fmt: skip

    async def aclose(self) -> None:
        await self._end()
        for fd in (self._engine_fd, *(rank.fd for rank in self._ranks)):
            if fd >= 0:
                os.close(fd)
        self._ranks, self._engine_fd = [], -1

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
