"""How large the report of a long run is, and how long a browser takes to open it and to look closer.

    python benchmarks/report.py [--seconds 60] [--steps 4000]

A made-up run of 8 ranks, tp 2 x pp 4, whose steps each have two collectives, is written as a run folder and as a
report, and opened in headless Chromium (of PATH) from its file. Opened: all is drawn. Zoomed: from a key to the next
frame, the median of 12 times closer; and from the button to the frame that shows the last steps.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import command_line
import record
from playwright.sync_api import Page, sync_playwright

from bireme.chrome_trace import Recorded
from bireme.config import EngineConfig
from bireme.observe.ledger import make_ledger
from bireme.observe.profile_records import Latency, Profile, RankMemory, Throughput
from bireme.observe.run_folder import RunFolder, prepare_run_folder, write_run_folder
from bireme.observe.run_records import (
    RequestWorkload,
    RunAbout,
    RunHardware,
    RunLayout,
    RunLedger,
    RunModel,
    RunRank,
    RunSettings,
)
from bireme.report.document import report
from bireme.trace import RankSpans, Span, SpanKind

NUM_STAGES, WIDTH = 4, 2
NEXT_FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


def recorded_run(seconds: float, num_steps: int) -> Recorded:
    """Steps follow one another through the stages, each half of the time of a step at work."""
    every_ns = round(seconds * 1e9 / num_steps)
    driver = [
        Span(kind, step * every_ns + start, step * every_ns + end, 0, step, 0)
        for step in range(num_steps)
        for kind, start, end in (
            (SpanKind.WORK, 0, 20_000),
            (SpanKind.SUBMIT, 20_000, 40_000),
            (SpanKind.WAIT, 40_000, every_ns),
        )
    ]
    ranks = [
        RankSpans(
            f"rank {stage * WIDTH + tp_rank} (stage {stage}, tp {tp_rank})",
            stage,
            tp_rank,
            [it for step in range(num_steps) for it in rank_step(step, every_ns, stage, tp_rank)],
        )
        for stage in range(NUM_STAGES)
        for tp_rank in range(WIDTH)
    ]
    return Recorded(ranks, driver)


def rank_step(step: int, every_ns: int, stage: int, tp_rank: int) -> Iterator[Span]:
    start = step * every_ns + 40_000 + stage * every_ns // NUM_STAGES
    end = start + every_ns // 2 + (step % 7) * every_ns // 40
    sent = end + 10_000
    if stage:
        yield Span(SpanKind.RECV, start - 20_000, start, 4096, step, 0)
    yield Span(SpanKind.COMPUTE, start, end, 0, step, 0)
    for share in (3, 6):
        come = start + share * (end - start) // 8 + tp_rank * 30_000
        done = start + share * (end - start) // 8 + 60_000
        yield Span(SpanKind.ALL_REDUCE, come, done, 8192, step, 0)
    yield Span(SpanKind.SEND, end, sent, 4096, step, 0)
    yield Span(SpanKind.STEP, start - 20_000, sent, 0, step, 0)


def write_run(folder: Path, recorded: Recorded) -> RunFolder:
    ledger = RunLedger.of(make_ledger(recorded))
    prepare_run_folder(folder)
    return write_run_folder(folder, about(recorded), recorded, ledger, profile(ledger))


def about(recorded: Recorded) -> RunAbout:
    ranks = [
        RunRank(
            rank=index, name=rank.name, stage=rank.stage, tp_rank=rank.tp_rank, device="cpu",
            layers=(8 * rank.stage, 8 * rank.stage + 8),
        )
        for index, rank in enumerate(recorded.ranks)
    ]  # fmt: skip
    return RunAbout(
        command=["benchmarks/report.py"],
        date=datetime.now(UTC),
        elapsed_s=1.0,
        versions={},
        hardware=RunHardware(
            host="none", cpu="none", num_cores=8, memory_bytes=1 << 34, load_average=0.0, devices={}
        ),
        model=RunModel(name="made-up", folder=None, dtype="float32", num_parameters=1),
        layout=RunLayout(
            widths=(WIDTH,) * NUM_STAGES, layers_per_stage=(8,) * NUM_STAGES, ranks=ranks
        ),
        workload=RequestWorkload(batch=8, input_len=8, output_len=8),
        settings=RunSettings(
            num_threads=1, transport="none", environment={}, max_model_len=64,
            num_cache_tokens=128, engine=EngineConfig(),
        ),
    )  # fmt: skip


def profile(ledger: RunLedger) -> Profile:
    memory = [
        RankMemory(
            rank=rank, weight_bytes=1 << 28, cache_bytes=1 << 27, activation_bytes=1 << 24,
            communication_bytes=1 << 20, other_bytes=1 << 27, planned_step_bytes=1 << 25,
            weight_resident_bytes=1 << 28, cache_resident_bytes=1 << 26, rss_bytes=1 << 29,
            pss_bytes=1 << 29, shared_bytes=1 << 20, swapped_bytes=0, num_major_faults=0, how={},
        )
        for rank in range(NUM_STAGES * WIDTH)
    ]  # fmt: skip
    seconds = ledger.told.seconds
    return Profile(
        seconds=seconds, num_steps=1, is_whole=True, messages=[], memory=memory,
        throughput=Throughput(
            elapsed_s=seconds, num_requests=8, num_input_tokens=64, num_output_tokens=64,
            requests_per_s=8 / seconds, total_tokens_per_s=128 / seconds,
            output_tokens_per_s=64 / seconds, num_preemptions=0,
        ),
        latency=Latency(ttft_s={}, itl_s={}, e2e_s={}, queue_s={}, requests=[]),
    )  # fmt: skip


def looked_at(path: Path) -> dict[str, Any]:
    """Seconds in a browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        begun = time.monotonic()
        page.goto(path.as_uri())
        page.locator("svg.gantt rect, svg.gantt path").first.wait_for(state="attached")
        page.evaluate(NEXT_FRAME)
        opened_s = time.monotonic() - begun
        picture = page.locator("svg.gantt")
        picture.focus()
        zooms = [seconds_of(page, "+") for _ in range(12)]
        page.get_by_role("button", name="Show the last steps").focus()
        last_s = seconds_of(page, "Enter")
        num_last = picture.locator('rect[class^="step-"]').count()
        told = picture.get_attribute("aria-label")
        browser.close()
    return {
        "open_s": opened_s,
        "zoom_s": statistics.median(zooms),
        "last_steps_s": last_s,
        "bars_of_the_last_steps": num_last,
        "told": told,
    }


def seconds_of(page: Page, key: str) -> float:
    begun = time.monotonic()
    page.keyboard.press(key)
    page.evaluate(NEXT_FRAME)
    return time.monotonic() - begun


def main() -> None:
    parser = command_line.parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", recorded_run(arguments.seconds, arguments.steps))
        begun = time.monotonic()
        page = report([run])
        written_s = time.monotonic() - begun
        path = Path(folder) / "report.html"
        path.write_text(page, encoding="utf-8")
        found = {"bytes": path.stat().st_size, "write_s": written_s, **looked_at(path)}
    for name, value in found.items():
        print(f"{name:36} {value:.3f}" if isinstance(value, float) else f"{name:36} {value}")
    run_of = {"seconds": arguments.seconds, "num_steps": arguments.steps, "num_ranks": 8}
    record.write("report", ["bireme", "playwright"], {"run": run_of, **found})


if __name__ == "__main__":
    main()
