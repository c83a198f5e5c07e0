"""One HTTP request and its answer: what the log, the metrics and the trace say of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope


@dataclass
class Exchange:
    """Filled in while the request is served; seconds of the monotonic clock."""

    request_id: str
    method: str
    path: str
    client: str
    trace_headers: dict[str, str] = field(default_factory=dict)
    start_s: float = field(default_factory=time.monotonic)
    status: int | None = None
    model: str | None = None
    is_stream: bool = False
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    ttft_s: float | None = None
    num_images: int | None = None
    queue_s: float | None = None  # of images, until the first of them was in a micro-batch
    finish_reasons: list[str] = field(default_factory=list)
    prompts: list[str] | None = None
    error: str | None = None
    is_left: bool = False  # by its client, before the end

    @staticmethod
    def of(scope: Scope) -> Exchange:
        """That of a request which passed the middleware."""
        exchange: Exchange = scope["state"]["exchange"]
        return exchange

    def as_log(self) -> dict[str, Any]:
        """What there is to say, in the order of interest."""
        milliseconds = (time.monotonic() - self.start_s) * 1000
        said: dict[str, Any] = {
            "request_id": self.request_id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "ms": round(milliseconds, 1),
        }
        if self.model is not None:
            said |= {
                "model": self.model,
                "stream": self.is_stream,
                "prompt_tokens": self.num_prompt_tokens,
                "cached_tokens": self.num_cached_tokens,
                "completion_tokens": self.num_tokens,
                "ttft_ms": None if self.ttft_s is None else round(self.ttft_s * 1000, 1),
                "finish_reasons": self.finish_reasons,
            }
        if self.num_images is not None:
            queue_ms = None if self.queue_s is None else round(self.queue_s * 1000, 1)
            said |= {"images": self.num_images, "queue_ms": queue_ms}
        if self.is_left:
            said["left"] = True
        if self.error is not None:
            said["error"] = self.error
        if self.prompts is not None:
            said["prompts"] = self.prompts
        return said
