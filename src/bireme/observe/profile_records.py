"""What was measured of a run (`profile.json`); fields, and how each is measured: docs/run-folder.md.

Rates are None where nothing was measured, ceilings where no cluster.toml was given or it says nothing
of what was used.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from bireme.observe.pipeline_records import ImageThroughput, PipelineTrial

Spread = dict[str, float]  # seconds: mean, p50, p90, p99; empty where there was nothing to measure
Phase = Literal["prefill", "decode"]  # steps with tokens of prompts, and steps without


class Throughput(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="tokens"):
    """As `bireme bench throughput`, of the measured pass."""

    elapsed_s: float
    num_requests: int
    num_input_tokens: int
    num_output_tokens: int
    requests_per_s: float
    total_tokens_per_s: float
    output_tokens_per_s: float
    num_preemptions: int


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True):
    """One request, in seconds from its arrival: to its first step, first token and last token."""

    num_input_tokens: int
    num_output_tokens: int
    queue_s: float
    ttft_s: float
    e2e_s: float


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """As `/metrics` counts them; `itl_s` is the time between tokens of a request that came one after the
    other."""

    ttft_s: Spread
    itl_s: Spread
    e2e_s: Spread
    queue_s: Spread
    requests: list[RequestTimes]


class CollectiveSize(msgspec.Struct, frozen=True, kw_only=True):
    """Collectives of one kind and size (bytes of a rank's tensor; of what a gather makes) in one tensor
    group. `count` as recorded: where `is_sampled`, in those steps that were marked.

    Seconds summed over the collectives, the mean of the ranks: in them, `time_s`, and of it from when
    the last rank had come, `move_s`. `median_s` of a rank in one, `median_move_s` of one from when the
    last rank had come to when the last had gone; `bytes_per_s` is the size by that. Skew is from the
    first rank's coming to the last one's; `late_s` by who was last.
    """

    kind: str
    stage: int
    num_ranks: int
    num_bytes: int
    count: int
    is_sampled: bool
    time_s: float
    move_s: float
    median_s: float
    median_move_s: float
    overlapped_s: float
    mean_skew_s: float
    median_skew_s: float
    max_skew_s: float
    max_skew_by: str
    late_s: dict[str, float]
    bytes_per_s: float | None = None
    ceiling_bytes_per_s: float | None = None
    ceiling_most_bytes_per_s: float | None = None

    @property
    def total_bytes(self) -> int:
        return self.count * self.num_bytes


class MessageSize(msgspec.Struct, frozen=True, kw_only=True):
    """Messages of one size from stage to stage, `time_s` (summed) and `median_s` from when each was sent,
    or waited for if that was later, until it was there."""

    src_stage: int
    dst_stage: int
    num_bytes: int
    count: int
    time_s: float
    median_s: float
    bytes_per_s: float | None = None
    ceiling_bytes_per_s: float | None = None


class LayerTime(msgspec.Struct, frozen=True, kw_only=True):
    """One layer (or 'embedding', 'head') on one rank in the steps of a phase, its collectives included,
    by the device's clock; of the pass after the measured one."""

    rank: int
    stage: int
    layer: str
    phase: Phase
    count: int
    time_s: float
    median_s: float


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one rank by kind; what of each is in memory adds up to `total_bytes`.

    `weight_bytes` and `cache_bytes` are what was allocated, as in /metrics, and `*_resident_bytes` what of
    it is in memory: a CPU's cache takes pages as it fills, and what was paged out is not there; a vision
    model has no cache.
    `activation_bytes` is what steps took at most beyond what is held between them (None: this host does not
    tell), `planned_step_bytes` what the largest may take by the plan. `other_bytes`: all else that the
    process holds. `how`: by kind, how it was measured.

    `num_major_faults` are pages that had to be read from disk in the measured pass; `num_alloc_retries`
    of CUDA's allocator, which had to give its cache back first.
    """

    rank: int
    weight_bytes: int
    cache_bytes: int | None
    activation_bytes: int | None
    communication_bytes: int
    other_bytes: int
    planned_step_bytes: int
    weight_resident_bytes: int
    cache_resident_bytes: int | None
    rss_bytes: int
    pss_bytes: int
    shared_bytes: int
    swapped_bytes: int
    num_major_faults: int
    reserved_bytes: int | None = None
    num_alloc_retries: int | None = None
    how: dict[str, str]

    @property
    def total_bytes(self) -> int:
        return (
            self.weight_resident_bytes
            + (self.cache_resident_bytes or 0)
            + (self.activation_bytes or 0)
            + self.communication_bytes
            + self.other_bytes
        )


class RankRate(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank computed and read in the steps of a phase, counted from layout and steps, by the time
    in its ledger's row `compute`."""

    rank: int
    phase: Phase
    num_steps: int
    num_tokens: int
    compute_s: float
    flop: int
    num_bytes: int
    flop_per_s: float | None = None
    bytes_per_s: float | None = None
    ceiling_flop_per_s: float | None = None
    ceiling_bytes_per_s: float | None = None


class StepSample(msgspec.Struct, frozen=True, kw_only=True):
    """A step as it was told to the ranks, at `time_s` of the trace's clock. `context_tokens`: places that
    its tokens look at, summed over them. `cache_usage` is that of /metrics."""

    step_id: int
    time_s: float
    phase: Phase
    num_seqs: int
    num_tokens: int
    num_sampled: int
    context_tokens: int
    num_running: int
    num_waiting: int
    cache_usage: float
    num_preemptions: int


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """An operator of torch's on one rank in the profiled steps, `self_s` without those inside it; on CUDA
    the device's time."""

    rank: int
    name: str
    count: int
    self_s: float
    time_s: float


class SizePass(msgspec.Struct, frozen=True, kw_only=True):
    """A pass with `size` requests at once, or at most `size` tokens a step; other prompts, all else alike."""

    size: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    num_preemptions: int
    ttft_s: Spread
    itl_s: Spread
    e2e_s: Spread


class RankClocks(msgspec.Struct, frozen=True, kw_only=True):
    """What nvidia-smi said of a GPU's clocks while the layers were timed: how often it was asked, the slowest
    and the fastest in MHz, and by reason the share of those times at which they were slowed down."""

    rank: int
    num_samples: int
    least_mhz: float
    most_mhz: float
    slowdowns: dict[str, float]


class ClusterUsed(msgspec.Struct, frozen=True, kw_only=True):
    """Where ceilings come from; `measured` None: described by hand."""

    path: str
    measured: datetime | None
    is_quick: bool


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """`profile.json`. `seconds` are what the trace holds, `num_steps` all steps of the measured pass; `is_whole`
    False where the ranks' rings had overwritten its beginning. `notes`: what is not as asked, and why.
    `latency` is of requests, `trials` are of a vision pipeline."""

    seconds: float
    num_steps: int
    is_whole: bool
    throughput: Throughput | ImageThroughput
    latency: Latency | None = None
    trials: list[PipelineTrial] = []
    collectives: list[CollectiveSize] = []
    messages: list[MessageSize]
    layers: list[LayerTime] = []
    memory: list[RankMemory]
    rates: list[RankRate] = []
    steps: list[StepSample] = []
    operators: list[Operator] = []
    batches: list[SizePass] = []
    chunks: list[SizePass] = []
    clocks: list[RankClocks] = []
    cluster: ClusterUsed | None = None
    notes: list[str] = []
