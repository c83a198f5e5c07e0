"""What a run was (`run.json`) and where its ranks' time went (`ledger.json`); fields: docs/run-folder.md."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from bireme.config import EngineConfig
from bireme.model_config import ModelConfig
from bireme.observe.causes import Row
from bireme.observe.ledger import Ledger
from bireme.observe.told import ToldLedger

FORMAT_VERSION = 2


class RunHardware(msgspec.Struct, frozen=True, kw_only=True):
    """The host; `num_cores` that the driver might use, `load_average` of the minute before the run, and
    `devices` by torch's names, with what they are. `without_peer_access`: pairs of GPUs that cannot reach each
    other's memory."""

    host: str
    cpu: str
    num_cores: int
    memory_bytes: int
    load_average: float
    devices: dict[str, str]
    without_peer_access: list[tuple[str, str]] = []


class RunModel(msgspec.Struct, frozen=True, kw_only=True):
    """`folder` None: made-up weights. `config` None: no language model."""

    name: str
    folder: str | None
    dtype: str
    num_parameters: int
    config: ModelConfig | None = None


class RunRank(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is that of its track in the trace; it holds layers (blocks of a
    vision model) [`layers[0]`, `layers[1]`)."""

    rank: int
    name: str
    stage: int
    tp_rank: int
    device: str
    layers: tuple[int, int]


class RunLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One width a stage, and the ranks in their order."""

    widths: tuple[int, ...]
    layers_per_stage: tuple[int, ...]
    ranks: list[RunRank]

    @property
    def names(self) -> list[str]:
        return [rank.name for rank in self.ranks]


class RequestWorkload(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="requests"):
    """Of a language model: `batch` requests that were there from the start, each of `input_len` tokens and continued by
    `output_len`; `num_warmup` such batches ran before, and are in no figure."""

    batch: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    seed: int = 0
    num_warmup: int = 0


class ImageWorkload(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="images"):
    """Of a vision pipeline: `batch` images of `image_size` pixels a side, in `num_micro_batches`; in a run
    `num_batches` such follow one another. `folder` None: made-up images. The run is the median of `num_runs`."""

    batch: int
    image_size: int
    num_micro_batches: int
    num_batches: int = 1
    num_runs: int = 1
    folder: str | None = None


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`transport`: what sums and messages went through, 'shared memory', 'gloo' or 'nccl'. `environment`:
    variables that torch, NCCL, gloo and OpenMP heed, as far as they were set. The length, the cache and
    `engine` are of language models; `is_captured` (on GPUs as CUDA graphs) and `memory_limit_bytes` of each
    device are of vision pipelines; None where there is none."""

    num_threads: int
    transport: str
    environment: dict[str, str]
    max_model_len: int | None = None
    num_cache_tokens: int | None = None
    engine: EngineConfig | None = None
    is_captured: bool | None = None
    memory_limit_bytes: int | None = None


class RunAbout(msgspec.Struct, frozen=True, kw_only=True):
    """`run.json`. `elapsed_s` of all passes together, the ranks being there."""

    format_version: int = FORMAT_VERSION
    command: list[str]
    date: datetime
    elapsed_s: float
    versions: dict[str, str]
    hardware: RunHardware
    model: RunModel
    layout: RunLayout
    workload: RequestWorkload | ImageWorkload
    settings: RunSettings


class LedgerRank(msgspec.Struct, frozen=True, kw_only=True):
    """Exact nanoseconds of one rank: by row, which add up to `wall_ns`; by whom it waited for in
    collectives; and of sends beside later steps' work."""

    name: str
    stage: int
    wall_ns: int
    ns: dict[Row, int]
    late_ns: Mapping[str, int]
    overlapped_ns: int
    is_sampled: bool


class RunLedger(msgspec.Struct, frozen=True, kw_only=True):
    """`ledger.json`: of `trace.json`, whole. `told` is what `bireme ledger trace.json --json` prints, but
    for the grids, which are as wide as a terminal there."""

    ranks: list[LedgerRank]
    told: ToldLedger

    @classmethod
    def of(cls, ledger: Ledger) -> RunLedger:
        ranks = [
            LedgerRank(
                name=rank.name,
                stage=rank.stage,
                wall_ns=rank.wall_ns,
                ns=dict(rank.ns),
                late_ns=dict(rank.late_ns),
                overlapped_ns=rank.overlapped_ns,
                is_sampled=rank.is_sampled,
            )
            for rank in ledger.ranks
        ]
        return cls(ranks=ranks, told=ToldLedger.of(ledger))
