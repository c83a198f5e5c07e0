"""Callers of one ledger reader, which asks a process one at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress

import pytest

from bireme.engine.service_messages import RingPlace
from bireme.errors import CapacityError, EngineError
from bireme.observe.told import ToldLedger
from bireme.server.ledger_reader import LedgerReader
from bireme.trace import SpanKind, SpanRing

SECOND_NS = 10**9


@asynccontextmanager
async def reading() -> AsyncIterator[LedgerReader]:
    """Of a rank that computed from three seconds ago to two, of an engine that waited for it until then
    and is in the middle of waiting."""
    now_ns = time.monotonic_ns()
    with closing(SpanRing.create()) as rank, closing(SpanRing.create()) as engine:
        first_ns, last_ns = now_ns - 3 * SECOND_NS, now_ns - 2 * SECOND_NS
        rank.set_step(1, 0)
        engine.set_step(1, 0)
        engine.write(SpanKind.SUBMIT, first_ns - 1000, first_ns)
        for kind in (SpanKind.COMPUTE, SpanKind.STEP):
            rank.write(kind, first_ns, last_ns)
        engine.write(SpanKind.WAIT, first_ns, last_ns)
        engine.begin(SpanKind.WAIT)
        reader = LedgerReader()
        reader.begin([RingPlace("rank 0", 0, 0, "cpu", rank.path)], engine.path)
        try:
            yield reader
        finally:
            await reader.aclose()


def test_more_callers_than_a_few_are_told_to_come_later() -> None:
    async def run() -> None:
        async with reading() as reader:
            asked = [reader.last(1.0) for _ in range(7)]
            *answers, metrics = await asyncio.gather(
                *asked, reader.soon(1.0, 60), return_exceptions=True
            )
            assert isinstance(metrics, ToldLedger), "has a place of its own"
            refused = [one for one in answers if isinstance(one, BaseException)]
            assert len(refused) == 3
            for error in refused:
                with pytest.raises(
                    CapacityError, match="4 callers wait for a ledger, of at most 4"
                ):
                    raise error
            assert await reader.last(1.0), "and goes on"

    asyncio.run(run())


def test_a_caller_that_leaves_does_not_leave_its_answer_to_the_next() -> None:
    async def run() -> None:
        async with reading() as reader:
            assert len((await reader.last(1.0, 5)).ranks[0].line) == 5
            leaving = asyncio.create_task(reader.last(1.0, 7))
            await asyncio.sleep(0)  # it has asked
            leaving.cancel()
            with suppress(asyncio.CancelledError):
                await leaving
            assert len((await reader.last(1.0, 9)).ranks[0].line) == 9

    asyncio.run(run())


def test_who_does_not_wait_for_others_goes_without() -> None:
    async def run() -> None:
        async with reading() as reader:
            first = asyncio.create_task(reader.last(1.0))
            await asyncio.sleep(0)  # it has begun
            with pytest.raises(EngineError, match="its turn did not come within 0 s"):
                await reader.soon(1.0, 0)
            assert await first

    asyncio.run(run())


def test_of_an_engine_that_is_gone_the_last_seconds_of_its_life_are_told() -> None:
    async def run() -> None:
        async with reading() as reader:
            told = await reader.last(0.5, is_running=False)
            assert told.ranks[0].shares["compute"] == pytest.approx(1)
            assert told.until_s >= 2
            assert (await reader.last(0.5)).ranks[0].shares["compute"] == 0

    asyncio.run(run())
