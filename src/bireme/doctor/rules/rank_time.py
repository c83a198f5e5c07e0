"""Where does time go: which rank waits for what, and is what works at work?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from bireme.doctor.evidence import Evidence, Measured, RankFacts, busy_share
from bireme.doctor.finding import Finding
from bireme.observe.causes import Row
from bireme.observe.told import ToldRank

_WORK = (Row.COMPUTE, Row.COLLECTIVE_MOVE, Row.COLLECTIVE_WAIT)
_COST = 0.1  # of the time: what costs less is not worth a change
_SLOW_HOST = 0.4
_LAUNCH_BOUND = 0.25  # of the ceilings
_KERNELS_RUN = 0.5  # of the time outside of collectives
_GROWTH = 2.0  # of a step's time, over a batch many times as large
_UNEVEN_WORK = 0.25  # of a step's time, which would be saved if all stages had as much to do


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
    """Too little is in flight for the stages; not where more was tried, and cost more than the bubble."""
    share = found.share(Row.TOKEN_DEPENDENCY, Row.FILL_DRAIN)
    if found.is_slower_with_more:
        return
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


def launch_bound(found: Evidence) -> Iterator[Finding]:
    """GPUs whose steps take a multiple of what their work needs, since the host cannot launch it sooner."""
    share = found.share(Row.COMPUTE)
    used, running = _used(found.ranks), _running(found.ranks)
    if found.ranks and not any(rank.is_cpu for rank in found.ranks) and share > 0.5:
        is_slow = used is not None and max(used) < _LAUNCH_BOUND
        idles = running is not None and running < _KERNELS_RUN
        is_launched = idles if running is not None else is_slow and not _grows(found.batches)
        if is_launched and (used is None or is_slow):
            done = (
                []
                if used is None
                else [f"{used[0]:.0%} of its flop/s, {used[1]:.0%} of its bytes/s"]
            )
            ran = (
                []
                if running is None
                else [f"kernels ran {running:.0%} of the time under torch.profiler"]
            )
            wasted = 1 - max(used or (running or 0.0,))
            yield Finding(
                rule="launch-bound",
                title="GPUs wait for their kernels to be launched one by one",
                figure=f"steps take {share:.0%} of the time; while decoding a GPU does {'; '.join([*done, *ran])}"
                + _lengths(found.batches),
                remedy="leave --enforce-eager out; send larger batches, which cost the same launches; use more "
                "pipeline and less tensor parallelism (half the layers are half the launches); give each "
                "rank's process a core of its own",
                share=share * wasted,
            )


def late_rank(found: Evidence) -> Iterator[Finding]:
    """One rank of a tensor group that the others wait for, and that waits for none; not where it only began its
    steps later, since its process was woken later."""
    if found.ledger is None:
        return
    ranks = found.ledger.ranks
    name, waited, waits = _latest(ranks)
    if waited - waits - _began_later(ranks, name) > _COST and waited > 2 * waits:
        yield Finding(
            rule="late-rank",
            title=f"{name} comes late to its group's collectives",
            figure=f"others wait {waited:.0%} of the time for it, it waits {waits:.0%} of the time for them",
            remedy="see what else runs on its device and cores, and whether its clock is throttled",
            share=waited,
        )


def _used(ranks: Sequence[RankFacts]) -> tuple[float, float] | None:
    """Of the probed flop/s and bytes/s, while decoding: the mean of the ranks; None where not all are known."""
    found = [rank.decode_used for rank in ranks]
    known = [it for it in found if it is not None]
    if not known or len(known) < len(found):
        return None
    return mean(flop for flop, _ in known), mean(moved for _, moved in known)


def _running(ranks: Sequence[RankFacts]) -> float | None:
    known = [rank.kernel_share for rank in ranks if rank.kernel_share is not None]
    return mean(known) if known else None


def _grows(batches: Sequence[Measured]) -> bool:
    """Whether larger batches make steps longer, as work does, and launches do not."""
    times = [it.itl_s for it in batches if it.itl_s]
    return len(times) > 1 and times[-1] > _GROWTH * times[0]


def _lengths(batches: Sequence[Measured]) -> str:
    timed = [it for it in batches if it.itl_s]
    if len(timed) < 2:
        return ""
    first, last = timed[0], timed[-1]
    return (
        f"; a token takes {1000 * first.itl_s:.1f} ms in a batch of {first.size}, "
        f"{1000 * last.itl_s:.1f} ms in one of {last.size}"
    )


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


def _began_later(ranks: list[ToldRank], name: str) -> float:
    """Than the others of its stage on the mean, for its host's sake: a share of the time."""
    stage = next((rank.stage for rank in ranks if rank.name == name), None)
    own = [busy_share(rank, Row.HOST) for rank in ranks if rank.name == name]
    others = [
        busy_share(rank, Row.HOST) for rank in ranks if rank.stage == stage and rank.name != name
    ]
    return max(0.0, mean(own) - mean(others)) if own and others else 0.0


def _by_stage(ranks: list[ToldRank]) -> dict[int, list[ToldRank]]:
    found: dict[int, list[ToldRank]] = {}
    for rank in ranks:
        found.setdefault(rank.stage, []).append(rank)
    return found
