"""Put load on any OpenAI-compatible server and measure its answers, as `vllm bench serve` does.

With --request-rate, or a trace's own times, requests are sent on time whether answers come or not; with
--max-concurrency alone, one whenever one has ended. Ctrl-C ends it with what was measured.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bireme.cli.grouped import flattened
from bireme.cli.load_options import Told, What, When, Where
from bireme.cli.progress import load_bar
from bireme.errors import EngineError

if TYPE_CHECKING:
    from bireme.bench.client import Client, Target
    from bireme.bench.load import LoadResult, Progress
    from bireme.bench.queries import Queries

NAME = "serve"
SHORT = "Put load on an OpenAI-compatible server."

_SHOW_S = 0.25
_BUSY_SHARE = 0.8  # of a core; beyond it the generator's own work shows in what it measures


@dataclass(frozen=True)
class _Run:
    """One run, as it was asked for."""

    target: Target
    queries: Queries
    offsets: Iterator[float] | None
    when: When
    ready_timeout_s: float
    keeps_text: bool
    quiet: bool


@flattened
def run(where: Where, what: What, when: When, told: Told) -> int:
    from bireme.bench.serving_metrics import per_request, summarise
    from bireme.cli.serving_report import print_block

    wanted, trace = told.wanted(), what.read_trace()
    target = where.target(ignores_eos=what.dataset_file is None)
    queries = what.queries(trace, is_chat=target.is_chat)
    date = datetime.now().strftime("%Y%m%d-%H%M%S")
    path = told.path(_file_name(where, when, date))
    model, result = _drive(
        _Run(
            target, queries, when.offsets(trace, what.seed), when, where.ready_check_timeout_sec,
            told.save_detailed, told.quiet,
        )
    )  # fmt: skip
    summary = summarise(result, wanted)
    about = {
        "date": date, "endpoint_type": where.backend, "backend": where.backend, "label": None,
        "model_id": model, "tokenizer_id": None, "num_prompts": len(queries),
        "arrival": when.kind(trace), "request_rate": _rate(when), "burstiness": when.burstiness,
        "max_concurrency": when.max_concurrency,
        "num_cut": trace.num_cut if trace else 0,
    }  # fmt: skip
    details = per_request(result) if told.save_detailed else {}
    _print({**about, **summary, **details}, path, told.as_json)
    if not told.as_json:
        print_block(summary, wanted, when.max_concurrency, when.request_rate)
    return _status(result, path)


def _drive(asked: _Run) -> tuple[str, LoadResult]:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(asked))


async def _measure(asked: _Run) -> tuple[str, LoadResult]:
    """The model's name as the server says it, and the run."""
    from bireme.bench.client import Client
    from bireme.bench.load import Load, Progress
    from bireme.bench.sender import Sender

    progress, num_requests = Progress(), len(asked.queries)
    async with Client(asked.target) as client:
        model = await client.find_model(asked.ready_timeout_s)
        await _warm_up(client, asked)
        sender = Sender(client, asked.queries, progress, asked.keeps_text)
        load = Load(sender.prepare, num_requests, progress)
        with _stopped_by_interrupt() as stop, load_bar(num_requests, quiet=asked.quiet) as show:
            showing = asyncio.ensure_future(_keep_showing(show, progress))
            try:
                return model, await load.run(asked.offsets, asked.when.max_concurrency, stop)
            finally:
                showing.cancel()
                show(progress)


async def _warm_up(client: Client, asked: _Run) -> None:
    """EngineError where every request fails: there is nothing to measure then."""
    from bireme.bench.load import Load, Progress
    from bireme.bench.sender import Sender

    count = asked.when.num_warmups
    if not count:
        return
    sender = Sender(client, asked.queries, Progress())
    load = Load(lambda index: sender.prepare(len(asked.queries) + index), count, Progress())
    result = await load.run(None, asked.when.max_concurrency or count, asyncio.Event())
    errors = [one.answer.error for one in result.sent if one.answer.error]
    if len(errors) == count:
        raise EngineError(f"all {count} warm-up requests failed; the first: {errors[0]}")


@contextmanager
def _stopped_by_interrupt() -> Iterator[asyncio.Event]:
    """The first Ctrl-C sets the event; the second interrupts as ever."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _keep_showing(show: Callable[[Progress], None], progress: Progress) -> None:
    while True:
        show(progress)
        await asyncio.sleep(_SHOW_S)


def _rate(when: When) -> float | str:
    """As vLLM writes it: infinity is no JSON."""
    rate = when.request_rate
    return "inf" if rate is None or rate == float("inf") else rate


def _file_name(where: Where, when: When, date: str) -> str:
    """As vLLM names it."""
    concurrency = f"-concurrency{when.max_concurrency}" if when.max_concurrency else ""
    model = f"-{where.model.split('/')[-1]}" if where.model else ""
    return f"{where.backend}-{_rate(when)}qps{concurrency}{model}-{date}.json"


def _print(result: dict[str, Any], path: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
    if path is not None:
        path.write_text(json.dumps(result), encoding="utf-8")


def _status(result: LoadResult, path: Path | None) -> int:
    """1 if no request came through, 130 for Ctrl-C; what one should know goes to standard error."""
    errors = [one.answer.error for one in result.sent if one.answer.error]
    notes = []
    if errors:
        notes.append(f"{len(errors)} of {len(result.sent)} requests failed; the first: {errors[0]}")
    if result.cpu_share > _BUSY_SHARE:
        notes.append(
            f"the generator used {result.cpu_share:.0%} of a core: its own work shows in these times; "
            "lower the rate, or run several"
        )
    if result.was_stopped:
        notes.append(f"interrupted; {result.num_unfinished} requests were still on their way")
    if path is not None:
        notes.append(f"wrote {path}")
    for note in notes:
        print(f"bireme: {note}", file=sys.stderr)
    if result.was_stopped:
        return 130
    return 1 if errors and len(errors) == len(result.sent) else 0
