"""In the order in which an expert looks: the files, where time goes, collectives, memory, the batch, the
machine. Each says what it found and what to do; `docs/doctor.md` has a section on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean

from bireme.config import format_bytes
from bireme.doctor.evidence import Evidence, busy_share
from bireme.doctor.finding import Finding
from bireme.observe.causes import Row
from bireme.observe.told import ToldRank

Rule = Callable[[Evidence], Iterator[Finding]]

_WORK = (Row.COMPUTE, Row.COLLECTIVE_MOVE, Row.COLLECTIVE_WAIT)
_COST = 0.1  # of the time: what costs less is not worth a change
_SLOW_HOST = 0.4
_SLOW_LINK = 0.5
_UNEVEN_WORK = 0.25  # of a step's time, which would be saved if all stages had as much to do
_UNEVEN = 1.5  # bytes of the fullest rank, over the mean
_MANY_FAULTS = 100  # pages read from disk while steps ran
_SHORT = 0.05  # of the time


def damaged_files(found: Evidence) -> Iterator[Finding]:
    if found.damage:
        yield Finding(
            rule="damaged-files",
            title="the files are not the model's",
            figure=found.damage[0] + _more(len(found.damage) - 1),
            remedy="shard the source again, or copy the artifact anew",
            share=1.0,
        )


def wrong_model(found: Evidence) -> Iterator[Finding]:
    if found.departures:
        yield Finding(
            rule="wrong-model",
            title="the cut model computes something else than the whole one",
            figure=found.departures[0] + _more(len(found.departures) - 1),
            remedy="shard the source again, then bireme verify",
            share=1.0,
        )


def uneven_memory(found: Evidence) -> Iterator[Finding]:
    if len(set(found.widths)) > 1:
        return  # a narrow stage holds more of each layer
    weights = [rank.memory.get("weights", 0) for rank in found.ranks]
    most, even = max(weights, default=0), mean(weights or [0])
    if most > _UNEVEN * even:
        fullest = found.ranks[weights.index(most)].name
        yield Finding(
            rule="uneven-memory",
            title=f"{fullest} holds more weights than others",
            figure=f"{format_bytes(most)}, where the mean is {format_bytes(int(even))}",
            remedy=f"choose {found.cut_option} so that the fullest rank holds less: it bounds the cache of all",
            share=0.0,
        )


def slow_stage(found: Evidence) -> Iterator[Finding]:
    """A stage that works while the others wait for it."""
    if found.ledger is None or found.num_stages == 1:
        return
    works = {
        stage: mean(busy_share(rank, *_WORK) for rank in ranks)
        for stage, ranks in _by_stage(found.ledger.ranks).items()
    }
    slowest = max(works, key=works.__getitem__)
    rest = mean(works[stage] for stage in works if stage != slowest)
    others = [rank for rank in found.ledger.ranks if rank.stage != slowest]
    waits = mean(busy_share(rank, Row.IMBALANCE) for rank in others)
    gain = 1 - mean(works.values()) / works[slowest] if works[slowest] else 0.0
    if gain > _UNEVEN_WORK and waits > _COST:
        yield Finding(
            rule="slow-stage",
            title=f"stage {slowest} holds up the others",
            figure=f"it works {works[slowest]:.0%} of the time, the others {rest:.0%} of the time, and wait for it "
            f"{waits:.0%} of the time",
            remedy=f"give it fewer layers with {found.cut_option}; where it has no more than others, see what "
            "else runs on its device",
            share=gain,
        )


def few_requests(found: Evidence) -> Iterator[Finding]:
    """Too little is in flight for the stages."""
    share = found.share(Row.TOKEN_DEPENDENCY, Row.FILL_DRAIN)
    is_enough = found.num_running is not None and found.num_running > found.num_stages
    if found.num_stages > 1 and share > 2 * _COST and not is_enough:
        running = "" if found.num_running is None else f"{found.num_running:.1f} in flight; "
        yield Finding(
            rule="few-requests",
            title=f"too few requests for {found.num_stages} stages",
            figure=f"{running}ranks idle {share:.0%} of the time for want of a step that could be worked on",
            remedy=f"send at least {found.num_stages + 1} requests (or micro-batches) at once, or use fewer stages",
            share=share,
        )


def slow_host(found: Evidence) -> Iterator[Finding]:
    share = found.share(Row.HOST)
    if share > _SLOW_HOST:
        yield Finding(
            rule="slow-host",
            title="ranks wait for the host",
            figure=f"{share:.0%} of the time: for the engine, for what takes its tokens, or for their own processes",
            remedy="send larger batches; see what else uses the cores of the engine's process",
            share=share,
        )


def late_rank(found: Evidence) -> Iterator[Finding]:
    """One rank of a tensor group that the others wait for, and that waits for none."""
    if found.ledger is None:
        return
    name, waited, waits = _latest(found.ledger.ranks)
    if waited - waits > _COST and waited > 2 * waits:
        yield Finding(
            rule="late-rank",
            title=f"{name} comes late to its group's collectives",
            figure=f"others wait {waited:.0%} of the time for it, it waits {waits:.0%} of the time for them",
            remedy="see what else runs on its device and cores, and whether its clock is throttled",
            share=waited,
        )


def slow_link(found: Evidence) -> Iterator[Finding]:
    widths, mutual = found.widths, 0.0
    if found.ledger is not None and found.ledger.ranks:
        mutual = min(busy_share(rank, Row.COLLECTIVE_WAIT) for rank in found.ledger.ranks)
    share = found.share(Row.COLLECTIVE_MOVE) + mutual
    if max(widths, default=1) > 1 and share > _SLOW_LINK:
        is_even = len(set(widths)) == 1 and widths[0] % 2 == 0 and found.is_layout_known
        instead = (
            f"-tp {widths[0] // 2} -pp {2 * len(widths)}" if is_even else "less tensor parallelism"
        )
        yield Finding(
            rule="slow-link",
            title="collectives take more than they save",
            figure=f"{share:.0%} of the time goes into sums and gathers: their bytes, and waits for one another",
            remedy=f"use {instead}: stages hand over once where layers sum twice each",
            share=share,
        )


def slow_hand_over(found: Evidence) -> Iterator[Finding]:
    share = found.share(Row.TRANSFER)
    if share > 2 * _COST:
        yield Finding(
            rule="slow-hand-over",
            title="handing over between stages takes long",
            figure=f"{share:.0%} of the time ranks wait for bytes that are on their way",
            remedy="use fewer stages, or put neighbouring ones on one host",
            share=share,
        )


def paging(found: Evidence) -> Iterator[Finding]:
    for rank in found.ranks:
        if rank.major_faults is not None and rank.major_faults > _MANY_FAULTS:
            yield Finding(
                rule="paging",
                title=f"{rank.name} reads its memory from disk",
                figure=f"{rank.major_faults} pages while steps ran",
                remedy="its host has too little memory: use more ranks, a smaller --memory-limit, or end what "
                "else runs there",
                share=1.0,
            )


def small_cache(found: Evidence) -> Iterator[Finding]:
    cache = found.cache
    if cache is None:
        return
    if cache.num_preemptions or cache.short_share > _SHORT:
        holds = (
            ""
            if cache.num_requests is None
            else f"; it holds {cache.num_requests:.1f} requests of the longest length"
        )
        yield Finding(
            rule="small-cache",
            title="the KV cache is too small",
            figure=f"{cache.num_preemptions} preemptions, {cache.most_used:.0%} in use, "
            f"{cache.most_waiting} waiting{holds}",
            remedy="give ranks more memory (--memory-limit), use more of them, or a lower --max-model-len",
            share=max(cache.short_share, 0.3),
        )


def too_many_threads(found: Evidence) -> Iterator[Finding]:
    threads = [rank.num_threads for rank in found.ranks if rank.is_cpu and rank.num_threads]
    if found.num_cores is not None and sum(threads) > found.num_cores:
        yield Finding(
            rule="too-many-threads",
            title="more threads than cores",
            figure=f"{len(threads)} ranks have {sum(threads)} threads in all, their host {found.num_cores} cores",
            remedy=f"use at most {found.num_cores} ranks there",
            share=1.0,
        )


def nccl_settings(found: Evidence) -> Iterator[Finding]:
    """What takes NCCL's fast ways away."""
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        value = found.environment.get(name, "0")
        if value not in ("", "0") and not all(rank.is_cpu for rank in found.ranks):
            yield Finding(
                rule="nccl-settings",
                title=f"{name} takes a fast way away",
                figure=f"{name}={value}",
                remedy="unset it, unless the hardware needs it",
                share=0.2,
            )


RULES: dict[str, Rule] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        damaged_files, wrong_model, uneven_memory, slow_stage, few_requests, slow_host, late_rank, slow_link,
        slow_hand_over, paging, small_cache, too_many_threads, nccl_settings,
    )
}  # fmt: skip


def examine(found: Evidence) -> list[Finding]:
    """The one that costs most first; of equals, in the order of `RULES`."""
    findings = [finding for rule in RULES.values() for finding in rule(found)]
    return sorted(findings, key=lambda finding: -finding.share)


def _latest(ranks: list[ToldRank]) -> tuple[str, float, float]:
    """The rank that others wait for most beyond what it waits for them: its name, and both shares of the time in
    which there was work."""
    waited: dict[str, float] = {rank.name: 0.0 for rank in ranks}
    waits = dict(waited)
    for rank in ranks:
        busy = max(1e-9, 1.0 - rank.shares[Row.STARVED])
        waits[rank.name] = sum(rank.late.values()) / busy
        for name, share in rank.late.items():
            waited[name] = max(waited.get(name, 0.0), share / busy)
    name = max(waited, key=lambda it: waited[it] - waits.get(it, 0.0), default="")
    return name, waited.get(name, 0.0), waits.get(name, 0.0)


def _by_stage(ranks: list[ToldRank]) -> dict[int, list[ToldRank]]:
    found: dict[int, list[ToldRank]] = {}
    for rank in ranks:
        found.setdefault(rank.stage, []).append(rank)
    return found


def _more(num: int) -> str:
    return f" (and {num} more)" if num > 0 else ""
