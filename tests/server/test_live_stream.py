"""`/debug/live`: one producer for all viewers, and the numbers that `/metrics` and `/debug/ledger` have."""

from __future__ import annotations

import asyncio
import http.client
import re
import signal
from contextlib import ExitStack, closing

import pytest
from served import DEADLINE_S, Served, serving
from streaming import Streaming, watching
from test_shutdown import until

from bireme.errors import CapacityError
from bireme.server.live import MOST_VIEWERS, Live
from bireme.server.protocol.common import Moment


class Looked:
    """Counts how often somebody looked; `fails` from then on."""

    def __init__(self, fails: bool = False) -> None:
        self.num, self._fails = 0, fails

    async def __call__(self) -> bytes:
        self.num += 1
        if self._fails:
            raise ZeroDivisionError
        return b"%d" % self.num


def test_an_event_is_made_once_for_all_viewers() -> None:
    async def run() -> None:
        looked = Looked()
        live = Live(looked, every_s=0.01)
        viewers = [live.events() for _ in range(3)]
        for _ in viewers:
            live.enter()
        for number in (1, 2, 3):
            found = await asyncio.gather(*(anext(it) for it in viewers))
            assert found == [b"event: moment\ndata: %d\n\n" % number] * 3
        assert looked.num == 3

    asyncio.run(run())


def test_nothing_is_done_while_nobody_looks() -> None:
    async def run() -> None:
        looked = Looked()
        live = Live(looked, every_s=0.001)
        live.enter()
        await anext(live.events())
        live.leave()
        await asyncio.sleep(0.05)
        seen = looked.num
        await asyncio.sleep(0.05)
        assert looked.num == seen <= 2
        live.enter()
        assert await anext(live.events()), "and it begins again"

    asyncio.run(run())


def test_who_is_slow_misses_what_came_meanwhile() -> None:
    async def run() -> None:
        looked = Looked()
        live = Live(looked, every_s=0.001)
        live.enter()
        slow = live.events()
        await anext(slow)
        while looked.num < 10:
            await asyncio.sleep(0.001)
        number = int((await anext(slow)).split(b"data: ")[1])
        assert number >= 10

    asyncio.run(run())


def test_viewers_are_bounded() -> None:
    live = Live(Looked())
    for _ in range(MOST_VIEWERS):
        live.enter()
    with pytest.raises(CapacityError, match=f"{MOST_VIEWERS} viewers look on, of at most"):
        live.enter()
    live.leave()
    live.enter()


def test_the_end_of_the_server_ends_all_streams() -> None:
    async def run() -> None:
        live = Live(Looked(), every_s=60)
        live.enter()
        events = live.events()
        await anext(events)
        waiting = asyncio.ensure_future(anext(events, None))
        await asyncio.sleep(0)
        live.close()
        assert await waiting is None
        assert [event async for event in live.events()] == []

    asyncio.run(run())


def test_a_bug_ends_the_streams_with_it() -> None:
    async def run() -> None:
        live = Live(Looked(fails=True))
        live.enter()
        with pytest.raises(ZeroDivisionError):
            await anext(live.events())

    asyncio.run(run())


# --- of a server -------------------------------------------------------------------------------


def test_a_moment_is_as_openapi_says_and_its_bars_are_of_the_last_steps(piped: Served) -> None:
    with watching(piped) as following:
        following()  # starts the process that makes ledgers
        stream = Streaming(piped, max_tokens=600)
        moment = following()
        while not moment["ledger"]["ranks"][1]["shares"]["compute"]:
            moment = following()
        stream.text()
    Moment.model_validate(moment)
    assert moment["health"] == {"status": "ready"}
    assert moment["server"]["models"] == ["demo"]
    assert moment["server"]["can_chat"]
    assert [(it["stage"], it["device"]) for it in moment["server"]["ranks"]] == [
        (0, "cpu"),
        (1, "cpu"),
    ]
    gantt = moment["ledger"]["gantt"]
    for rank in gantt["ranks"]:
        assert 0 < len(rank["bars"]) <= 601
        steps = {step for *_, row, step in rank["bars"] if row == "compute"}
        assert steps
        assert max(steps) - min(steps) <= 14
        assert all(0 <= start < end for start, end, *_ in rank["bars"])
        assert rank["bars"][-1][1] <= gantt["seconds"] * 1e6


def test_the_numbers_are_those_of_the_metrics(piped: Served) -> None:
    """Of a server at rest, so that they stay."""
    Streaming(piped, max_tokens=20).text()
    with watching(piped) as following:
        moment = following()
        while any(rank["shares"]["starved"] < 1 for rank in moment["ledger"]["ranks"]):
            moment = following()
        text = piped.ask("GET", "/metrics").text
    shown = {
        (found[1], found[2] or ""): float(found[3])
        for found in re.finditer(r'^bireme:(\w+){engine="0",(?:le="([^"]+)",)?model_name="demo"} (\S+)$', text, re.M)
    }  # fmt: skip
    stats, counts = moment["stats"], moment["counts"]
    for name, value in {
        "num_requests_running": stats["num_running"],
        "num_requests_waiting": stats["num_waiting"],
        "kv_cache_usage_perc": stats["cache_usage"],
        **counts["counters"],
    }.items():
        assert shown[name, ""] == value, name
    assert counts["counters"]["generation_tokens_total"] > 0
    assert set(counts["histograms"]) >= {
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
    }
    for name, histogram in counts["histograms"].items():
        buckets = [
            value for (found, le), value in shown.items() if found == f"{name}_bucket" and le
        ]
        assert buckets == histogram["counts"], name
        assert shown[f"{name}_sum", ""] == histogram["sum"]
    for rank in stats["ranks"]:
        (busy,) = re.findall(
            rf'^bireme:rank_busy_seconds_total{{.*rank="{rank["rank"]}".*}} (\S+)$', text, re.M
        )
        assert float(busy) == rank["busy_s"]
    shares = re.findall(r'^bireme:ledger_share{.*rank="(.)",row="(\w+)".*} (\S+)$', text, re.M)
    assert {(rank, row): float(share) for rank, row, share in shares} == {
        (str(index), row): share
        for index, rank in enumerate(moment["ledger"]["ranks"])
        for row, share in rank["shares"].items()
    }


def test_more_viewers_than_a_few_are_told_to_come_later(piped: Served) -> None:
    def status(connection: http.client.HTTPConnection) -> int:
        connection.request("GET", "/debug/live")
        return connection.getresponse().status

    with ExitStack() as viewers:
        for _ in range(MOST_VIEWERS):
            connection = http.client.HTTPConnection(piped.host, piped.port, timeout=DEADLINE_S)
            viewers.enter_context(closing(connection))
            assert status(connection) == 200
        refused = piped.ask("GET", "/debug/live")
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"]

    def has_place() -> bool:
        with closing(http.client.HTTPConnection(piped.host, piped.port)) as connection:
            return status(connection) == 200

    until(has_place)


def test_the_end_of_a_server_ends_its_streams_in_order() -> None:
    with serving("--dtype", "float32") as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=DEADLINE_S)
        with closing(connection):
            connection.request("GET", "/debug/live")
            response = connection.getresponse()
            assert response.readline() == b"event: moment\n"
            server.process.send_signal(signal.SIGTERM)
            response.read()  # IncompleteRead where it is cut, as uvicorn does after 5 s
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.told)
