"""When a stream tells how many tokens there were: `stream_options`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bireme.server.errors import ApiError
from bireme.server.protocol.common import SamplingFields, Usage


@dataclass(frozen=True)
class UsageOf:
    """`is_last`: behind everything else; `is_continuous`: with every piece."""

    is_last: bool = False
    is_continuous: bool = False

    def along(self, usage: Callable[[], Usage]) -> dict[str, Usage | None]:
        """The field of a piece; null announces that it comes at the end."""
        if self.is_continuous:
            return {"usage": usage()}
        return {"usage": None} if self.is_last else {}

    def at_end(self, usage: Usage) -> dict[str, Usage | None]:
        """The field of a piece of its own, if there is to be one."""
        return {"usage": usage} if self.is_last else {}


def usage_of(wanted: SamplingFields) -> UsageOf:
    """ApiError 400 for options of a stream that is none."""
    if wanted.stream and getattr(wanted, "prompt_logprobs", None) is not None:
        raise ApiError(
            400, "prompt_logprobs are not streamed; leave out stream", param="prompt_logprobs"
        )
    options = wanted.stream_options
    if options is None:
        return UsageOf()
    if not wanted.stream:
        raise ApiError(
            400, "stream_options needs stream to be true; set it, or leave them out",
            param="stream_options",
        )  # fmt: skip
    return UsageOf(bool(options.include_usage), bool(options.continuous_usage_stats))
