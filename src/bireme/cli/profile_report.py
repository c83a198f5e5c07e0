"""What `bireme profile` found, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.table import Table

from bireme.cli import ledger
from bireme.cli.tables import console
from bireme.config import ParallelConfig, format_bytes
from bireme.observe.profile_records import (
    CollectiveSize,
    LayerTime,
    Profile,
    RankMemory,
    RankRate,
    Spread,
)
from bireme.observe.run_folder import TRACE, RunFolder
from bireme.observe.run_records import RunAbout
from bireme.observe.told import NUM_COLUMNS, told_of_trace

_MOST_RANKS = 8  # that are shown each; of more, one a stage
_MOST_OPERATORS = 8


def print_profile(run: RunFolder) -> None:
    """In short; the folder has it all."""
    to, about, found = console(), run.about, run.profile
    for line in _summary(about, found):
        to.print(line, highlight=False)
    to.print()
    width = min(NUM_COLUMNS, max(20, to.width - ledger.LABEL_WIDTH))
    ledger.show(told_of_trace(run.path / TRACE, width), to)
    shown = _shown_ranks(about)
    for table in (
        _collectives(found.collectives),
        _layers([one for one in found.layers if one.rank in shown]),
        _memory([one for one in found.memory if one.rank in shown]),
        _rates([one for one in found.rates if one.rank in shown]),
        _operators(found),
    ):
        if table.row_count:
            to.print()
            to.print(table)
    if len(shown) < len(about.layout.ranks):
        to.print("of each stage its first rank is shown")
    for note in found.notes:
        to.print(note, highlight=False)
    to.print(f"{run.path}: written", highlight=False)


def _summary(about: RunAbout, found: Profile) -> Iterator[str]:
    work, speed, latency = about.workload, found.throughput, found.latency
    yield (
        f"{about.model.name}: {ParallelConfig(widths=about.layout.widths)}, {about.model.dtype}; "
        f"{work.batch} requests of {work.input_len} tokens, continued by {work.output_len}"
    )
    yield (
        f"{speed.elapsed_s:.2f} s: {speed.output_tokens_per_s:.0f} tokens/s of output, "
        f"{speed.total_tokens_per_s:.0f} tokens/s in all; {found.num_steps} steps, "
        f"{speed.num_preemptions} preemptions"
    )
    yield f"to the first token {_told(latency.ttft_s)}; from token to token {_told(latency.itl_s)}"


def _told(times: Spread) -> str:
    return ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in times.items()) or "-"


def _shown_ranks(about: RunAbout) -> set[int]:
    ranks = about.layout.ranks
    if len(ranks) <= _MOST_RANKS:
        return {rank.rank for rank in ranks}
    return {rank.rank for rank in ranks if rank.tp_rank == 0}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def _rate(num_bytes: float | None, most: float | None) -> str:
    """With its share of the ceiling."""
    if num_bytes is None:
        return "-"
    return f"{num_bytes / 1e9:.2f}" + _share(num_bytes, most)


def _share(value: float, most: float | None) -> str:
    return f" ({100 * value / most:.0f} %)" if most else ""


def _collectives(found: Iterable[CollectiveSize]) -> Table:
    table = _table(
        "collectives, by size; us", "stage", "kind", "size", "count", "median", "once all came",
        "GB/s (of ceiling)", "late, mean", "most", "by",
    )  # fmt: skip
    for one in found:
        table.add_row(
            str(one.stage), one.kind.replace("_", " "), format_bytes(one.num_bytes), str(one.count),
            _us(one.median_s), _us(one.median_move_s),
            _rate(one.bytes_per_s, one.ceiling_bytes_per_s),
            _us(one.mean_skew_s), _us(one.max_skew_s), one.max_skew_by.partition(" (")[0],
        )  # fmt: skip
    return table


def _layers(found: Sequence[LayerTime]) -> Table:
    table = _table(
        "time by layer, collectives included; median us", "rank", "phase", "steps", "embedding", "layers",
        "fastest", "slowest", "head",
    )  # fmt: skip
    for rank, phase in dict.fromkeys((one.rank, one.phase) for one in found):
        its = {one.layer: one for one in found if (one.rank, one.phase) == (rank, phase)}
        ends = [its.pop(name, None) for name in ("embedding", "head")]
        embedding, head = (_us(end.median_s) if end else "" for end in ends)
        in_order = sorted(its.values(), key=lambda one: one.median_s)
        fastest, slowest = (
            f"{_us(one.median_s)} ({one.layer})" for one in (in_order[0], in_order[-1])
        )
        table.add_row(
            str(rank),
            phase,
            str(in_order[0].count),
            embedding,
            str(len(its)),
            fastest,
            slowest,
            head,
        )
    return table


def _memory(found: Iterable[RankMemory]) -> Table:
    table = _table(
        "memory", "rank", "weights", "cache", "(in use)", "activations", "(planned)", "communication",
        "other", "in all",
    )  # fmt: skip
    for one in found:
        activations = one.activation_bytes
        sizes = (
            one.weight_bytes, one.cache_bytes, one.cache_resident_bytes,
            activations, one.planned_step_bytes, one.communication_bytes, one.other_bytes,
            one.total_bytes,
        )  # fmt: skip
        told = ["not told" if size is None else format_bytes(size) for size in sizes]
        table.add_row(str(one.rank), *told)
    return table


def _rates(found: Iterable[RankRate]) -> Table:
    table = _table(
        "achieved while computing", "rank", "phase", "steps", "tokens", "computed s",
        "Gflop/s (of ceiling)", "GB/s (of ceiling)",
    )  # fmt: skip
    for one in found:
        table.add_row(
            str(one.rank), one.phase, str(one.num_steps), str(one.num_tokens),
            f"{one.compute_s:.3f}",
            _rate(one.flop_per_s, one.ceiling_flop_per_s),
            _rate(one.bytes_per_s, one.ceiling_bytes_per_s),
        )  # fmt: skip
    return table


def _operators(found: Profile) -> Table:
    """Of the rank that took most."""
    table = _table("operators of the rank that took most; ms", "operator", "calls", "own", "in all")
    totals: dict[int, float] = {}
    for one in found.operators:
        totals[one.rank] = totals.get(one.rank, 0.0) + one.self_s
    if not totals:
        return table
    slowest = max(totals, key=lambda rank: totals[rank])
    table.columns[0].justify = "left"
    for one in [it for it in found.operators if it.rank == slowest][:_MOST_OPERATORS]:
        table.add_row(
            one.name, str(one.count), f"{1000 * one.self_s:.1f}", f"{1000 * one.time_s:.1f}"
        )
    return table
