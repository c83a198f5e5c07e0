"""Options of `bireme bench serve`, as `vllm bench serve` has them where it does, and what they become."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bireme.cli import options
from bireme.errors import RequestError

if TYPE_CHECKING:
    from bireme.bench.azure_trace import AzureTrace
    from bireme.bench.client import Target
    from bireme.bench.queries import Queries
    from bireme.bench.serving_metrics import Wanted

_ENDPOINTS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
_DATASETS = ("random", "custom")
_DEFAULT_NUM_PROMPTS = 64


def _flag(name: str, help: str, metavar: str | None = "N", *more: str, **settings: Any) -> Any:
    return typer.Option(name, *more, metavar=metavar, help=help, **settings)


@dataclass(frozen=True)
class Where:
    """The server, and what every request says to it."""

    base_url: Annotated[
        str | None,
        _flag("--base-url", "Of the server. [default: http://HOST:PORT]", "URL"),
    ] = None
    host: Annotated[str, _flag("--host", "Where there is no --base-url.", "NAME")] = "127.0.0.1"
    port: Annotated[int, _flag("--port", "Where there is no --base-url.")] = 8000
    backend: Annotated[str, _flag("--backend", "openai (completions) or openai-chat.", "NAME")] = (
        "openai"
    )
    endpoint: Annotated[
        str | None,
        _flag(
            "--endpoint",
            "/v1/completions or /v1/chat/completions. [default: the backend's]",
            "PATH",
        ),
    ] = None
    model: Annotated[
        str | None,
        _flag("--model", "As the server names it. [default: the first of /v1/models]", "NAME"),
    ] = None
    api_key: Annotated[
        str | None,
        _flag("--api-key", "Sent as a bearer token.", "KEY", envvar="OPENAI_API_KEY"),
    ] = None
    header: Annotated[
        list[str] | None, _flag("--header", "Of every request; may be repeated.", "KEY=VALUE")
    ] = None
    temperature: Annotated[float | None, _flag("--temperature", "[default: the server's]", "T")] = (
        None
    )
    top_p: Annotated[float | None, _flag("--top-p", "[default: the server's]", "P")] = None
    top_k: Annotated[int | None, _flag("--top-k", "[default: the server's]")] = None
    extra_body: Annotated[
        str | None, _flag("--extra-body", "More keys of every request.", "JSON")
    ] = None
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for answers exactly as long as said, by a key that not all servers know. "
            "[default: on, off with --dataset-file]",
        ),
    ] = None
    request_timeout: Annotated[
        float, _flag("--request-timeout", "Seconds until a request has failed.", "S")
    ] = 3600.0
    ready_check_timeout_sec: Annotated[
        float, _flag("--ready-check-timeout-sec", "Seconds to wait for the server to come.", "S")
    ] = 0.0

    def target(self, *, ignores_eos: bool) -> Target:
        from bireme.bench.client import Target

        return Target(
            base_url=self.base_url or f"http://{self.host}:{self.port}",
            endpoint=self._endpoint(),
            model=self.model,
            headers=self._headers(),
            extra_body=self._body(ignores_eos if self.ignore_eos is None else self.ignore_eos),
            request_timeout_s=self.request_timeout,
        )

    def _endpoint(self) -> str:
        if self.backend not in _ENDPOINTS:
            raise RequestError(f"backend={self.backend!r} must be one of {', '.join(_ENDPOINTS)}")
        endpoint = self.endpoint or _ENDPOINTS[self.backend]
        if self.backend == "openai-chat" and not endpoint.endswith("/chat/completions"):
            raise RequestError(
                f"endpoint={endpoint!r} is none of openai-chat; name /v1/chat/completions"
            )
        return endpoint

    def _headers(self) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        for text in self.header or ():
            key, found, value = text.partition("=")
            if not found:
                raise RequestError(f"header={text!r} has no =; write KEY=VALUE")
            headers[key.strip()] = value.strip()
        return headers

    def _body(self, ignore_eos: bool) -> dict[str, Any]:
        said = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        body: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
        if ignore_eos:
            body["ignore_eos"] = True
        return body | _json_object("extra_body", self.extra_body or "{}")


@dataclass(frozen=True)
class What:
    """The prompts."""

    num_prompts: Annotated[
        int | None,
        _flag(
            "--num-prompts", f"Requests in all. [default: {_DEFAULT_NUM_PROMPTS}, or all of a file]"
        ),
    ] = None
    dataset_name: Annotated[
        str | None,
        _flag("--dataset-name", "random, or custom with --dataset-file; may be left out.", "NAME"),
    ] = None
    dataset_file: Annotated[
        Path | None,
        _flag(
            "--dataset-file",
            'A line a prompt: {"prompt": ..., "output_len": n}; the length may be left out.',
            "X.jsonl",
            "--dataset-path",
        ),
    ] = None
    trace_file: Annotated[
        Path | None,
        _flag(
            "--trace-file", "Azure's columns TIMESTAMP, ContextTokens, GeneratedTokens.", "X.csv"
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        _flag("--max-model-len", "Cut requests of the trace that are longer, prompts first."),
    ] = None
    input_len: Annotated[
        int, _flag("--random-input-len", "Tokens of each prompt.", "N", "--input-len")
    ] = 128
    output_len: Annotated[
        int, _flag("--random-output-len", "Tokens of each answer.", "N", "--output-len")
    ] = 32
    range_ratio: Annotated[
        float, _flag("--random-range-ratio", "Lengths vary by this share either way.", "R")
    ] = 0.0
    prefix_len: Annotated[
        int, _flag("--random-prefix-len", "Tokens that all prompts begin with, in addition.")
    ] = 0
    vocab_size: Annotated[
        int, _flag("--vocab-size", "Made-up prompts are of token ids below this.")
    ] = 256
    text_prompts: Annotated[
        bool,
        typer.Option(
            "--text-prompts", help="Make prompts up of words, not of ids; chats always do."
        ),
    ] = False
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and arrivals.")] = 0

    def __post_init__(self) -> None:
        if self.num_prompts is not None:
            options.check_at_least("num_prompts", self.num_prompts, 1)
        if self.dataset_name not in (None, *_DATASETS):
            raise RequestError(
                f"dataset_name={self.dataset_name!r} must be one of {', '.join(_DATASETS)}"
            )
        if (self.dataset_name or "custom") != "custom" and self.dataset_file:
            raise RequestError("dataset_name=random takes no --dataset-file; leave one out")
        if self.dataset_name == "custom" and not self.dataset_file:
            raise RequestError("dataset_name=custom needs the prompts: name --dataset-file")
        if self.dataset_file and self.trace_file:
            raise RequestError(
                "--dataset-file and --trace-file both say what to send; leave one out"
            )
        if self.max_model_len is not None and not self.trace_file:
            raise RequestError("--max-model-len cuts requests of a --trace-file alone; name one")

    def read_trace(self) -> AzureTrace | None:
        from bireme.bench.azure_trace import read_trace

        if self.trace_file is None:
            return None
        return read_trace(self.trace_file, self.num_prompts, self.max_model_len)

    def queries(self, trace: AzureTrace | None, *, is_chat: bool) -> Queries:
        from bireme.bench.queries import MadeUp, RandomQueries, TraceQueries, read_queries

        if self.dataset_file:
            return read_queries(
                self.dataset_file, self.output_len, self.num_prompts, needs_text=is_chat
            )
        made_up = MadeUp(
            vocab_size=self.vocab_size, as_text=self.text_prompts or is_chat, seed=self.seed
        )
        if trace is not None:
            return TraceQueries(made_up, trace.requests)
        return RandomQueries(
            made_up=made_up,
            num_prompts=self.num_prompts or _DEFAULT_NUM_PROMPTS,
            input_len=self.input_len,
            output_len=self.output_len,
            range_ratio=self.range_ratio,
            prefix_len=self.prefix_len,
        )


@dataclass(frozen=True)
class When:
    """The times at which requests are sent: an open loop, or a closed one."""

    request_rate: Annotated[
        float | None,
        _flag(
            "--request-rate",
            "Requests a second, whether answers come or not. [default: inf, all at once, or with "
            "--max-concurrency as answers come; the times of a trace]",
            "R",
        ),
    ] = None
    arrival: Annotated[
        str | None,
        _flag(
            "--arrival",
            "poisson, gamma or constant. [default: poisson; gamma with --burstiness]",
            "KIND",
        ),
    ] = None
    burstiness: Annotated[
        float,
        _flag("--burstiness", "Shape of gamma arrivals: below 1 in bursts, above 1 evenly.", "B"),
    ] = 1.0
    trace_speed: Annotated[
        float, _flag("--trace-speed", "Replay the trace so many times as fast.", "X")
    ] = 1.0
    max_concurrency: Annotated[
        int | None,
        _flag(
            "--max-concurrency",
            "Requests on their way at most; without a rate, always so many (a closed loop).",
        ),
    ] = None
    num_warmups: Annotated[
        int, _flag("--num-warmups", "Requests before the first that counts.")
    ] = 0

    def __post_init__(self) -> None:
        options.check_at_least("num_warmups", self.num_warmups, 0)
        if self.max_concurrency is not None:
            options.check_at_least("max_concurrency", self.max_concurrency, 1)
        if not 0 < self.trace_speed < float("inf"):
            raise RequestError(f"trace_speed={self.trace_speed} must be above 0 and finite")

    def kind(self, trace: AzureTrace | None) -> str:
        """`trace`, `closed`, or how arrivals are drawn."""
        if self.request_rate is None and trace is not None:
            return "trace"
        if self.max_concurrency is not None and self.request_rate in (None, float("inf")):
            return "closed"
        return self.arrival or ("poisson" if self.burstiness == 1 else "gamma")

    def offsets(self, trace: AzureTrace | None, seed: int) -> Iterator[float] | None:
        """Seconds after the start; None for a closed loop."""
        from bireme.bench.arrivals import Arrivals

        if self.request_rate is None and self.arrival is not None:
            raise RequestError(f"--arrival {self.arrival} needs a rate: give --request-rate")
        kind = self.kind(trace)
        if trace is not None and kind == "trace":
            return trace.offsets(self.trace_speed)
        if kind == "closed":
            return None
        return Arrivals(
            kind=kind,
            rate=float("inf") if self.request_rate is None else self.request_rate,
            burstiness=self.burstiness,
            seed=seed,
        ).offsets()


@dataclass(frozen=True)
class Told:
    """Which numbers are told, and where."""

    goodput: Annotated[
        list[str] | None,
        _flag(
            "--goodput",
            "Objectives in milliseconds, like ttft:500 tpot:50; of ttft, tpot, e2el. Requests that meet "
            "all count as goodput.",
            "METRIC:MS",
        ),
    ] = None
    more_goodput: Annotated[
        list[str] | None, typer.Argument(metavar="METRIC:MS", help="More of --goodput.")
    ] = None
    percentile_metrics: Annotated[
        str,
        _flag("--percentile-metrics", "Of ttft, tpot, itl, e2el, client_queue_time.", "A,B"),
    ] = "ttft,tpot,itl,e2el"
    metric_percentiles: Annotated[str, _flag("--metric-percentiles", "In percent.", "P,P")] = (
        "90,99"
    )
    price_per_device_hour: Annotated[
        float | None,
        _flag(
            "--price-per-device-hour", "Tells what queries and tokens cost, in its currency.", "X"
        ),
    ] = None
    num_devices: Annotated[int, _flag("--num-devices", "How many devices the server has.")] = 1
    as_json: options.JsonOutput = False
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Write the JSON to a file, too.")
    ] = False
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="Add lists with an entry a request to the JSON.")
    ] = False
    result_dir: Annotated[
        Path | None, _flag("--result-dir", "A folder for the file. [default: here]", "FOLDER")
    ] = None
    result_filename: Annotated[
        str | None,
        _flag("--result-filename", "Its name. [default: from what was measured]", "NAME"),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", "--disable-tqdm", help="No progress.")] = (
        False
    )

    def wanted(self) -> Wanted:
        from bireme.bench.serving_metrics import Wanted

        if self.more_goodput and not self.goodput:
            raise RequestError(
                f"{self.more_goodput[0]!r} stands alone; objectives follow --goodput"
            )
        return Wanted(
            metrics=self.percentile_metrics.split(","),
            percentiles=[
                _number("metric_percentiles", text) for text in self.metric_percentiles.split(",")
            ],
            objectives=dict(map(_objective, [*(self.goodput or ()), *(self.more_goodput or ())])),
            price_per_device_hour=self.price_per_device_hour,
            num_devices=self.num_devices,
        )

    def path(self, default_name: str) -> Path | None:
        """Of the result, checked to be writable; None where it is not to be kept."""
        if not (self.save_result or self.result_filename):
            return None
        path = (self.result_dir or Path()) / (self.result_filename or default_name)
        options.check_writable(path, "result of ours", {"duration", "completed"}.issubset)
        return path


def _objective(text: str) -> tuple[str, float]:
    name, found, limit = text.partition(":")
    if not found:
        raise RequestError(f"goodput={text!r} has no limit; write METRIC:MS, like ttft:500")
    return name, _number("goodput", limit)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{name}: {text!r} is no number") from None


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{name}={text!r:.40} is no JSON object")
    return value
