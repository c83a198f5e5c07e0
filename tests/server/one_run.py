"""One run of a real server, and what every place tells of it: see `test_figures_agree`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from exposed import Samples
from playwright.sync_api import Browser, Page, expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families
from served import Served, serving
from streaming import Streaming, watching

from bireme.chrome_trace import Recorded
from bireme.observe.told import ToldLedger
from bireme.trace import RankSpans, Span, SpanKind, SpanRing

NUM_REQUESTS, INPUT_LEN, OUTPUT_LEN = 24, 32, 64
OPTIONS = (
    "--dtype", "float32", "-tp", "2", "-pp", "2", "--no-log-requests", "--max-model-len", "128",
    "--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--memory-limit", "11MiB",
)  # fmt: skip
CHROMIUM = shutil.which("chromium")


@dataclass(frozen=True)
class Run:
    """Behind the benchmark's requests, of the server at rest: what each place told, and what was `recorded` in
    its rings. Then of its last steps before a rank was killed, up to `last_ns`."""

    bench: dict[str, Any]
    figures: dict[str, str]
    metrics: Samples
    moment: dict[str, Any]
    whole: ToldLedger
    recorded: Recorded
    last_moment: dict[str, Any]
    last_table: list[list[str]]
    last_told: ToldLedger
    last_recorded: Recorded
    last_ns: int


@contextmanager
def one_run() -> Iterator[Run]:
    with serving(*OPTIONS) as server, browsing() as browser:
        shown = opened(browser, server)
        bench = benchmark(server)
        figures = figures_of(shown)
        with watching(server) as following:
            moment = following()
            while any(rank["shares"]["starved"] < 1 for rank in moment["ledger"]["ranks"]):
                moment = following()
            metrics = samples(server)
        rings, ranks = rings_of(server), moment["server"]["ranks"]
        whole, recorded = ledger_of(server, 3600), recorded_of(rings, ranks)
        kill_amid_steps(server, rings[0])
        with watching(server) as following:
            last_moment = following()
        yield Run(
            bench, figures, metrics, moment, whole, recorded, last_moment,
            table_of(browser, server), ledger_of(server, last_moment["ledger"]["seconds"]),
            recorded_of(rings, ranks), end_of(rings),
        )  # fmt: skip


@contextmanager
def browsing() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, server: Served) -> Page:
    """Before there is a request, so that it sees all of them."""
    page = browser.new_page()
    page.goto(f"{server.url}/")
    expect(page.locator("#figures dd").nth(1)).to_have_text("0", timeout=20_000)
    return page


def benchmark(server: Served) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "bireme", "bench", "serve", "--base-url", server.url, "--json", "--save-detailed",
        "--num-prompts", str(NUM_REQUESTS), "--max-concurrency", "8", "--quiet",
        "--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN), "--random-range-ratio", "0.5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def figures_of(page: Page) -> dict[str, str]:
    """What it shows once all is over: latencies are of the last minute, in which all was."""
    tiles = page.locator("#figures dl")
    for name in ("tokens/s", "running"):
        expect(tiles.filter(has_text=name).locator("dd")).to_have_text("0", timeout=20_000)
    return {
        tile.locator("dt").inner_text(): tile.locator("dd").inner_text() for tile in tiles.all()
    }


def table_of(browser: Browser, server: Served) -> list[list[str]]:
    page = browser.new_page()
    page.goto(f"{server.url}/")
    page.locator("#ledger summary").click()
    rows = page.get_by_role("group", name="Ledger as a table").get_by_role("row")
    expect(rows).to_have_count(5)  # of names, and of four ranks
    return [row.locator("th, td").all_inner_texts() for row in rows.all()]


def samples(server: Served) -> Samples:
    """Less the labels that all have."""
    text = server.ask("GET", "/metrics").text
    return {
        (
            sample.name.removeprefix("bireme:"),
            frozenset(set(sample.labels.items()) - {("engine", "0"), ("model_name", "demo")}),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def ledger_of(server: Served, seconds: float) -> ToldLedger:
    body = server.ask("GET", f"/debug/ledger?seconds={seconds!r}").body
    return msgspec.json.decode(body, type=ToldLedger)


def rings_of(server: Served) -> list[SpanRing]:
    """The engine's, then the ranks', that a server keeps open; while nobody asks it for anything."""
    rings = []
    for place in sorted(
        Path(f"/proc/{server.pid}/fd").iterdir(), key=lambda place: int(place.name)
    ):
        with suppress(FileNotFoundError):  # of a connection that ended meanwhile
            if "bireme-spans" in os.readlink(place):
                rings.append(SpanRing(os.open(place, os.O_RDWR)))
    return rings


def recorded_of(rings: list[SpanRing], ranks: list[dict[str, Any]]) -> Recorded:
    engine, *found = (ring.read() for ring in rings)
    return Recorded(
        [
            RankSpans(rank["name"], rank["stage"], rank["tp_rank"], spans)
            for rank, spans in zip(ranks, found, strict=True)
        ],
        engine,
    )


def kill_amid_steps(server: Served, engine: SpanRing) -> None:
    """A rank, when all windows of the page hold steps of these requests alone."""
    before = num_submits(engine.read())
    streams = [Streaming(server, max_tokens=90) for _ in range(4)]
    while num_submits(engine.read()) < before + 60:
        pass
    os.kill(server.descendants()[-1], signal.SIGKILL)
    for stream in streams:
        stream.text()
    while server.ask("GET", "/health").status == 200:
        pass


def num_submits(engine: Sequence[Span]) -> int:
    return sum(span.kind is SpanKind.SUBMIT for span in engine)


def end_of(rings: list[SpanRing]) -> int:
    """Of what is known: ranks that ended in a step wrote nothing of it."""
    engine, *ranks = rings
    steps = [
        max(span.end_ns for span in ring.read() if span.kind is SpanKind.STEP)
        for ring in ranks
        if ring.now().kind is not None
    ]
    return min(steps, default=max(span.end_ns for span in engine.read()))
