"""What `bireme profile` found, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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
    SizePass,
    Spread,
    Throughput,
)
from bireme.observe.run_folder import RunFolder
from bireme.observe.run_records import RequestWorkload, RunAbout
from bireme.observe.sweep import best_size
from bireme.observe.told import NUM_COLUMNS, told_of_trace

_MOST_RANKS = 8  # that are shown each; of more, one a stage
_MOST_OPERATORS = 8


def print_profile(run: RunFolder) -> None:
    """In short; the folder has it all."""
    to, about, found = console(highlight=False), run.about, run.profile
    for line in _summary(about, found):
        to.print(line)
    to.print()
    width = min(NUM_COLUMNS, max(20, to.width - ledger.LABEL_WIDTH))
    ledger.show(told_of_trace(run.trace, width), to)
    shown = _shown_ranks(about)
    for table in (
        _collectives(found.collectives),
        _layers([one for one in found.layers if one.rank in shown]),
        _memory([one for one in found.memory if one.rank in shown]),
        _rates([one for one in found.rates if one.rank in shown]),
        _operators(found),
        _sizes("other batches; tokens/s of output, p50 ms", found.batches, is_output=True),
        _sizes("other chunks; tokens/s in all, p50 ms", found.chunks, is_output=False),
    ):
        if table.row_count:
            to.print()
            to.print(table)
    to.print()
    if len(shown) < len(about.layout.ranks):
        to.print("of each stage its first rank is shown")
    for note in found.notes:
        to.print(note)
    to.print(f"{run.path}: written")


def _summary(about: RunAbout, found: Profile) -> Iterator[str]:
    work, speed, latency = about.workload, found.throughput, found.latency
    assert isinstance(work, RequestWorkload)
    assert isinstance(speed, Throughput)
    assert latency is not None
    yield (
        f"{about.model.name}: {ParallelConfig(widths=about.layout.widths)}, {about.model.dtype}; "
        f"{work.batch} requests of {work.input_len} tokens, continued by {work.output_len}"
    )
    yield (
        f"{speed.elapsed_s:.2f} s: {speed.output_tokens_per_s:.0f} tokens/s of output, "
        f"{speed.total_tokens_per_s:.0f} tokens/s in all; {found.num_steps} steps, "
        f"{speed.num_preemptions} preemptions"
    )
    for name, times in (
        ("to the first token", latency.ttft_s),
        ("from token to token", latency.itl_s),
        ("to the last token", latency.e2e_s),
    ):
        if times:  # of one token each there is no time between
            yield f"{name}: {_told(times)}"


def _told(times: Spread) -> str:
    return ", ".join(f"{name} {1000 * value:.1f}" for name, value in times.items()) + " ms"


def _shown_ranks(about: RunAbout) -> set[int]:
    ranks = about.layout.ranks
    if len(ranks) <= _MOST_RANKS:
        return {rank.rank for rank in ranks}
    return {rank.rank for rank in ranks if rank.tp_rank == 0}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def _giga(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:.2f}"


def _share(rate: float | None, most: float | None) -> str:
    return "-" if rate is None or most is None else f"{100 * rate / most:.0f}"


def _collectives(found: Iterable[CollectiveSize]) -> Table:
    table = _table(
        "collectives by size; us",
        "stage", "", "size", "count", "median", "once all\nhad come", "GB/s", "% of\nceiling",
        "late,\nmedian", "most", "by",
    )  # fmt: skip
    for one in found:
        table.add_row(
            str(one.stage), one.kind.replace("_", " "), format_bytes(one.num_bytes), str(one.count),
            _us(one.median_s), _us(one.median_move_s), _giga(one.bytes_per_s),
            _share(one.bytes_per_s, one.ceiling_bytes_per_s),
            _us(one.median_skew_s), _us(one.max_skew_s), one.max_skew_by.partition(" (")[0],
        )  # fmt: skip
    return table


def _layers(found: Sequence[LayerTime]) -> Table:
    table = _table(
        "time by layer, collectives included; median us",
        "rank", "", "steps", "embedding", "layers", "fastest", "slowest", "head",
    )  # fmt: skip
    for rank, phase in dict.fromkeys((one.rank, one.phase) for one in found):
        its = {one.layer: one for one in found if (one.rank, one.phase) == (rank, phase)}
        ends = [its.pop(name, None) for name in ("embedding", "head")]
        embedding, head = (_us(end.median_s) if end else "" for end in ends)
        in_order = sorted(its.values(), key=lambda one: one.median_s)
        fastest, slowest = (
            f"{_us(one.median_s)} (layer {one.layer})" for one in (in_order[0], in_order[-1])
        )
        table.add_row(
            str(rank), phase, str(in_order[0].count), embedding, str(len(its)), fastest, slowest, head
        )  # fmt: skip
    return table


def _memory(found: Iterable[RankMemory]) -> Table:
    table = _table(
        "memory",
        "rank", "weights\nin memory", "cache\nin memory", "activations,\nmeasured", "communication", "other",
        "held\nin all", "cache\nreserved",
    )  # fmt: skip
    for one in found:
        sizes = (
            one.weight_resident_bytes, one.cache_resident_bytes, one.activation_bytes,
            one.communication_bytes, one.other_bytes, one.total_bytes, one.cache_bytes,
        )  # fmt: skip
        told = ["not told" if size is None else format_bytes(size) for size in sizes]
        table.add_row(str(one.rank), *told)
    return table


def _rates(found: Iterable[RankRate]) -> Table:
    table = _table(
        "achieved while computing",
        "rank", "", "steps", "tokens", "s", "Gflop/s", "% of\nceiling", "GB/s", "% of\nceiling",
    )  # fmt: skip
    for one in found:
        table.add_row(
            str(one.rank), one.phase, str(one.num_steps), str(one.num_tokens),
            f"{one.compute_s:.3f}",
            _giga(one.flop_per_s), _share(one.flop_per_s, one.ceiling_flop_per_s),
            _giga(one.bytes_per_s), _share(one.bytes_per_s, one.ceiling_bytes_per_s),
        )  # fmt: skip
    return table


def _operators(found: Profile) -> Table:
    """Of the rank that took most."""
    table = _table(
        "operators, on GPUs kernels, of the slowest rank; ms", "", "calls", "own", "in all"
    )
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


def _sizes(title: str, found: Sequence[SizePass], *, is_output: bool) -> Table:
    """With a mark where throughput stops growing."""
    table = _table(
        title, "size", "tokens/s", "first\ntoken", "from token\nto token", "last\ntoken", ""
    )
    rates = {
        one.size: one.output_tokens_per_s if is_output else one.total_tokens_per_s for one in found
    }
    best = best_size(rates)
    for one in found:
        times = (1000 * it.get("p50", 0.0) for it in (one.ttft_s, one.itl_s, one.e2e_s))
        mark = "throughput stops growing" if one.size == best != found[-1].size else ""
        table.add_row(
            str(one.size), f"{rates[one.size]:.0f}", *(f"{time:.1f}" for time in times), mark
        )
    return table
