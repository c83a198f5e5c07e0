"""What the answers of a batch say of time, as a server counts it."""

from __future__ import annotations

from bireme.bench.latency import spread
from bireme.observe.profile_records import Latency, RequestTimes
from bireme.outputs import Delta, RequestOutput, TokenGaps


class Latencies:
    """Takes what comes, and tells."""

    def __init__(self) -> None:
        self._gaps = TokenGaps()
        self.gaps_s: list[float] = []
        self.outputs: list[RequestOutput] = []

    def note(self, delta: Delta) -> None:
        if (gap_s := self._gaps.note(delta)) is not None:
            self.gaps_s.append(gap_s)
        if delta.output is not None:
            self.outputs.append(delta.output)

    def told(self) -> Latency:
        requests = [_request_times(output) for output in self.outputs]
        return Latency(
            ttft_s=spread([one.ttft_s for one in requests]),
            itl_s=spread(self.gaps_s),
            e2e_s=spread([one.e2e_s for one in requests]),
            queue_s=spread([one.queue_s for one in requests]),
            requests=requests,
        )


def _request_times(output: RequestOutput) -> RequestTimes:
    metrics = output.metrics
    assert metrics is not None, "an engine's output has them"
    return RequestTimes(
        num_input_tokens=len(output.prompt_token_ids),
        num_output_tokens=metrics.num_tokens,
        queue_s=metrics.queue_s,
        ttft_s=metrics.ttft_s,
        e2e_s=metrics.e2e_s,
    )
