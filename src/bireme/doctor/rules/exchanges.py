"""Is it the collectives, or what stages hand over?"""

from __future__ import annotations

from collections.abc import Iterator

from bireme.config import format_bytes
from bireme.doctor.evidence import Evidence, busy_share
from bireme.doctor.finding import Finding
from bireme.doctor.instead import Instead, halved
from bireme.observe.causes import Row
from bireme.observe.profile_records import CollectiveSize

_COST = 0.1  # of the time: what costs less is not worth a change
_SLOW_LINK = 0.5
_EXPOSED = 0.25
_OVERLAPPED = 0.5  # of the collectives' time
_NEAR = 0.5  # of a ceiling
_NUM_SIZES = 3


def slow_link(found: Evidence) -> Iterator[Finding]:
    share = _exchanged(found)
    if share > _SLOW_LINK:
        yield Finding(
            rule="slow-link",
            title="collectives take more than they save",
            figure=f"{share:.0%} of the time goes into sums and gathers: their bytes, and waits for one another",
            remedy=_less_width(found),
            share=share,
        )


def exposed_collectives(found: Evidence) -> Iterator[Finding]:
    """What is worth a look without being most of the time, where it is known what sums take alone."""
    share, sizes = _exchanged(found), sorted(found.collectives, key=lambda it: -it.time_s)
    probed = next((it for it in sizes if it.ceiling_bytes_per_s is not None), None)
    time_s = sum(it.time_s for it in sizes)
    beside = sum(it.overlapped_s for it in sizes) / time_s if time_s else 0.0
    if _EXPOSED < share <= _SLOW_LINK and probed is not None and beside < _OVERLAPPED:
        instead = halved(found)
        told = f"; {_calculated(found, instead)}" if instead and instead.gain > 1 + _COST else ""
        yield Finding(
            rule="exposed-collectives",
            title="ranks do nothing else while they sum",
            figure=f"{share:.0%} of the time, {beside:.0%} of it beside other work: "
            + ", ".join(_told(it, time_s) for it in sizes[:_NUM_SIZES]),
            remedy=_quicker(probed) + told,
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


def _exchanged(found: Evidence) -> float:
    """Of the time: moving bytes of collectives, and what no late rank explains of the waits in them."""
    if found.ledger is None or not found.ledger.ranks or max(found.widths, default=1) == 1:
        return 0.0
    mutual = min(busy_share(rank, Row.COLLECTIVE_WAIT) for rank in found.ledger.ranks)
    return found.share(Row.COLLECTIVE_MOVE) + mutual


def _less_width(found: Evidence) -> str:
    widths, instead = found.widths, halved(found)
    if instead is not None and instead.gain <= 1:
        return f"use a faster link, or fewer ranks; {_calculated(found, instead)}"
    is_even = len(set(widths)) == 1 and widths[0] % 2 == 0 and found.is_layout_known
    layout = f"-tp {widths[0] // 2} -pp {2 * len(widths)}" if is_even else "less tensor parallelism"
    told = "" if instead is None else f"; {_calculated(found, instead)}"
    return f"use {layout}: stages hand over once where layers sum twice each{told}"


def _calculated(found: Evidence, instead: Instead) -> str:
    assert found.pace is not None
    return (
        f"calculated for {instead.layout} and twice as many requests at once: "
        f"{instead.output_tokens_per_s:.0f} tokens/s of output instead of {found.pace.output_tokens_per_s:.0f}, "
        f"{1000 * instead.token_s:.1f} ms a token instead of {1000 * found.pace.itl_s:.1f}"
    )


def _told(size: CollectiveSize, time_s: float) -> str:
    name = size.kind.replace("_", "-")
    return (
        f"{name} of {format_bytes(size.num_bytes)} {size.time_s / time_s:.0%}, "
        f"{1e6 * size.median_move_s:.0f} us each"
    )


def _quicker(size: CollectiveSize) -> str:
    """What would help the collective that takes most, held against what was probed."""
    done, alone, most = size.bytes_per_s, size.ceiling_bytes_per_s, size.ceiling_most_bytes_per_s
    if done is None or alone is None or most is None:
        return "see what else uses the link"
    alone_us = f"{1e6 * size.num_bytes / alone:.0f} us"
    if done < _NEAR * alone:
        return (
            f"the sum that takes most takes {alone_us} alone (bireme probe): see what else uses the link, the "
            "cores and the GPUs"
        )
    if alone < _NEAR * most:
        return (
            f"sums of that size take {alone_us} alone at {_rate(alone)}, large ones reach "
            f"{_rate(most)}: send larger batches, which sum more at once, or choose an algorithm for small "
            "sums (NCCL_PROTO=LL, NCCL_ALGO=Tree)"
        )
    return f"they are as quick as the link ({_rate(most)}): use a faster one, or less tensor parallelism"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"
