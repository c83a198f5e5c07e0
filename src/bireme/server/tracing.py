"""A span a request for OpenTelemetry, under the client's own: the extra `otel`.

Nothing of it is imported unless an endpoint is given. A span is made when its request has ended, from
what is known then, so that nothing is held while tokens come. Its attributes are vLLM's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bireme.errors import ConfigError
from bireme.sampling_params import SamplingParams
from bireme.server.finished import FinishedRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

SPAN_NAME = "llm_request"
_FAILURES = ("timeout", "error")  # a client that leaves is none of the server's


class Tracer:
    """Is told of every request that has ended; this one traces nothing."""

    @staticmethod
    def of(endpoint: str | None, model_name: str) -> Tracer:
        """To an OTLP endpoint over HTTP, such as http://localhost:4318/v1/traces, if there is one;
        ConfigError where the extra is missing."""
        if endpoint is None:
            return Tracer()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"traces need {error.name or 'opentelemetry'}, which is not there; "
                "pip install 'bireme[otel]'"
            ) from error
        return OtelTracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), model_name)

    def note(
        self,
        request_id: str,
        params: SamplingParams,
        request: FinishedRequest,
        headers: Mapping[str, str],
    ) -> None:
        """`headers` of the client's HTTP request, by names in lower case: `traceparent` is kept."""

    def close(self) -> None:
        """Sends what was not sent yet; waits for it, for some seconds at most."""


class OtelTracer(Tracer):
    """Through a span processor, with a provider of its own."""

    def __init__(self, processor: SpanProcessor, model_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = os.environ.get("OTEL_SERVICE_NAME", "bireme")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("bireme.server")
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def note(
        self,
        request_id: str,
        params: SamplingParams,
        request: FinishedRequest,
        headers: Mapping[str, str],
    ) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end_ns = time.time_ns()
        span = self._tracer.start_span(
            SPAN_NAME,
            self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(request_id, self._model_name, params, request),
            start_time=end_ns - round(request.e2e_s * 1e9),
        )
        if request.finished_reason in _FAILURES:
            span.set_attribute("error.type", request.finished_reason)
            span.set_status(Status(StatusCode.ERROR, request.error))
        span.end(end_ns)

    def close(self) -> None:
        self._provider.shutdown()


def _attributes(
    request_id: str, model_name: str, params: SamplingParams, request: FinishedRequest
) -> dict[str, str | int | float | list[str]]:
    """Seconds, and numbers of tokens."""
    found: dict[str, str | int | float | list[str]] = {
        "gen_ai.request.id": request_id,
        "gen_ai.request.n": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.response.model": model_name,
        "gen_ai.response.finish_reasons": [request.finished_reason],
        "gen_ai.usage.prompt_tokens": request.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": request.num_generation_tokens,
        "gen_ai.usage.cached_tokens": request.num_cached_tokens,
        "gen_ai.latency.time_in_queue": request.queue_s,
        "gen_ai.latency.e2e": request.e2e_s,
    }
    if request.ttft_s is not None:
        found["gen_ai.latency.time_to_first_token"] = request.ttft_s
        found["gen_ai.latency.time_in_model_prefill"] = request.ttft_s - request.queue_s
        found["gen_ai.latency.time_in_model_decode"] = request.e2e_s - request.ttft_s
        found["gen_ai.latency.time_in_model_inference"] = request.e2e_s - request.queue_s
    return found
