"""A span a request, under its client's own; and nothing of OpenTelemetry where none was asked for."""

from __future__ import annotations

import builtins
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from exposed import finished
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from served import serving

from bireme import SamplingParams
from bireme.errors import ConfigError
from bireme.server.finished import FinishedRequest
from bireme.server.tracing import OtelTracer, Tracer

PARAMS = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=40, n=2)
PARENT = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}


def traced(request: FinishedRequest, headers: Mapping[str, str]) -> tuple[ReadableSpan, ...]:
    exporter = InMemorySpanExporter()
    tracer = OtelTracer(SimpleSpanProcessor(exporter), "demo")
    tracer.note("cmpl-1", PARAMS, request, headers)
    spans = exporter.get_finished_spans()
    tracer.close()
    return spans


def test_a_request_is_a_span_with_its_tokens_and_times() -> None:
    (span,) = traced(finished(), {})
    assert (span.name, span.kind, span.parent) == ("llm_request", SpanKind.SERVER, None)
    assert dict(span.attributes or {}) == {
        "gen_ai.request.id": "cmpl-1",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 0,
        "gen_ai.response.model": "demo",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.prompt_tokens": 7,
        "gen_ai.usage.completion_tokens": 4,
        "gen_ai.usage.cached_tokens": 0,
        "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.time_to_first_token": 1.0,
        "gen_ai.latency.time_in_model_prefill": 0.5,
        "gen_ai.latency.time_in_model_decode": 2.0,
        "gen_ai.latency.time_in_model_inference": 2.5,
        "gen_ai.latency.e2e": 3.0,
    }
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == 3 * 10**9


@pytest.mark.parametrize(
    ("request_", "status", "description", "kind"),
    [
        (finished(), StatusCode.UNSET, None, None),
        (finished("length"), StatusCode.UNSET, None, None),
        (finished("abort"), StatusCode.UNSET, None, None),
        (finished("timeout"), StatusCode.ERROR, None, "timeout"),
        (finished("error", error="a rank died"), StatusCode.ERROR, "a rank died", "error"),
    ],
    ids=lambda value: getattr(value, "finished_reason", None),
)
def test_a_request_that_failed_is_an_error_and_one_that_was_left_is_none(
    request_: FinishedRequest, status: StatusCode, description: str | None, kind: str | None
) -> None:
    (span,) = traced(request_, {})
    assert (span.status.status_code, span.status.description) == (status, description)
    assert (span.attributes or {}).get("error.type") == kind


def test_it_is_a_child_of_the_clients_span() -> None:
    (span,) = traced(finished(), PARENT)
    assert span.parent is not None
    assert span.parent.span_id == int("cd" * 8, 16)
    assert span.context is not None
    assert span.context.trace_id == int("ab" * 16, 16)


def test_a_client_that_does_not_record_is_heeded() -> None:
    assert not traced(finished(), {"traceparent": PARENT["traceparent"][:-2] + "00"})


@pytest.mark.parametrize("broken", ["", "00-xyz", "ff-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_broken_traceparent_begins_a_trace_of_its_own(broken: str) -> None:
    (span,) = traced(finished(), {"traceparent": broken})
    assert span.parent is None


def test_a_request_without_a_token_has_no_time_to_it() -> None:
    (span,) = traced(finished("abort", ttft_s=None), {})
    assert not [name for name in span.attributes or {} if "first_token" in name or "model_" in name]


def test_nothing_is_imported_without_an_endpoint() -> None:
    code = (
        "import sys; from bireme.server.tracing import Tracer; Tracer.of(None, 'demo').close();"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert type(Tracer.of(None, "demo")) is Tracer


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"bireme\[otel\]") as caught:
        Tracer.of("http://localhost:4318/v1/traces", "demo")
    assert "\n" not in str(caught.value)


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An endpoint for traces, and what comes to it."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
        finally:
            server.shutdown()
            thread.join()


def test_spans_reach_an_endpoint_by_the_time_it_is_closed() -> None:
    with collector() as (url, bodies):
        tracer = Tracer.of(url, "demo")
        tracer.note("cmpl-1", PARAMS, finished(), PARENT)
        tracer.close()
    assert b"llm_request" in b"".join(bodies)


def test_a_server_that_ends_has_told_of_its_requests_under_the_clients_traces() -> None:
    with collector() as (url, bodies), serving("--otlp-traces-endpoint", url) as server:
        body = {"prompt": "import ", "max_tokens": 2}
        assert server.ask("POST", "/v1/completions", body, PARENT).status == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
    told = b"".join(bodies)
    assert b"llm_request" in told
    assert bytes.fromhex("ab" * 16) in told
    assert bytes.fromhex("cd" * 8) in told
