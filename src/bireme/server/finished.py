"""What a request was, once it has ended: what metrics and traces say of it."""

from __future__ import annotations

from dataclasses import dataclass

from bireme.outputs import CompletionOutput, RequestOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """Of a prompt with all its choices. Seconds from its arrival: `queue_s` to its first step, `ttft_s`
    to its first token (None: there was none), `e2e_s` to its last."""

    finished_reason: str
    num_prompt_tokens: int
    num_generation_tokens: int
    num_cached_tokens: int
    queue_s: float
    ttft_s: float | None
    e2e_s: float
    error: str | None = None  # why it failed

    @classmethod
    def of(
        cls, output: RequestOutput, finished_reason: str | None = None, error: str | None = None
    ) -> FinishedRequest:
        """`finished_reason` and `error` of a request that was cut short; else they are those of a
        choice that failed, or of the first."""
        metrics, failed = output.metrics, _failed(output)
        assert metrics is not None, "an engine's output has them"
        if failed is not None:
            finished_reason, error = "error", str(failed.stop_reason)
        return cls(
            finished_reason=finished_reason or output.outputs[0].finish_reason or "abort",
            error=error,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_generation_tokens=metrics.num_tokens,
            num_cached_tokens=output.num_cached_tokens,
            queue_s=metrics.queue_s,
            ttft_s=metrics.ttft_s if metrics.num_tokens else None,
            e2e_s=metrics.e2e_s,
        )


def _failed(output: RequestOutput) -> CompletionOutput | None:
    return next((it for it in output.outputs if it.finish_reason == "error"), None)
