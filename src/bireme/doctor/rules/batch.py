"""What batch, and what chunk: are they where throughput stops growing?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bireme.doctor.evidence import Evidence, Measured
from bireme.doctor.finding import Finding
from bireme.observe.sweep import best_size

_GROWTH = 1.25  # of throughput: what brings less is not worth a change
_LATENCY = 1.5
_FULL = 0.9  # of what a step may hold: where none held more, the limit held nothing up
_NEAR = 0.1  # of half of that


def small_batch(found: Evidence) -> Iterator[Finding]:
    own, best = _own_and_best(found.batch, found.batches)
    if own is None or best is None or 2 * own.size > best.size:
        return
    gain = best.tokens_per_s / own.tokens_per_s
    if gain > _GROWTH:
        is_open = " or more" if best is found.batches[-1] else ""
        yield Finding(
            rule="small-batch",
            title=f"batches of {own.size} leave throughput unused",
            figure=f"{own.tokens_per_s:.0f} tokens/s of output; batches of {best.size}{is_open} give "
            f"{best.tokens_per_s:.0f}, {gain - 1:.0%} more, at {_ms(best)} a token instead of {_ms(own)}",
            remedy=f"send {best.size} requests at once",
            share=1 - 1 / gain,
        )


def large_batch(found: Evidence) -> Iterator[Finding]:
    own, best = _own_and_best(found.batch, found.batches)
    if own is None or best is None or own.size < 2 * best.size:
        return
    if own.e2e_s > _LATENCY * best.e2e_s:
        yield Finding(
            rule="large-batch",
            title=f"batches of {own.size} make answers slow for nothing",
            figure=f"{own.tokens_per_s:.0f} tokens/s of output, {own.e2e_s:.2f} s to the last token; batches of "
            f"{best.size} give {best.tokens_per_s:.0f} and take {best.e2e_s:.2f} s",
            remedy=f"send, or allow by --max-num-seqs, {best.size} requests at once",
            share=0.0,
        )


def small_chunks(found: Evidence) -> Iterator[Finding]:
    """Larger chunks than the run's own have no room, so that it is told by how throughput grew from half of it on,
    where steps were as large as they may be."""
    own = next((it for it in found.chunks if it.size == found.chunk), None)
    if own is None or (found.largest_step or 0) < _FULL * own.size:
        return
    near = [it for it in found.chunks if abs(it.size / own.size - 0.5) <= _NEAR]
    if not near:
        return
    before = min(near, key=lambda it: abs(it.size / own.size - 0.5))
    gain = own.tokens_per_s / before.tokens_per_s
    if gain > _GROWTH:
        yield Finding(
            rule="small-chunks",
            title=f"steps of at most {own.size} tokens leave throughput unused",
            figure=f"{own.tokens_per_s:.0f} tokens/s in all, {gain - 1:.0%} more than with {before.size} tokens a "
            "step: it still grows",
            remedy=f"give --max-num-batched-tokens {2 * own.size} or more",
            share=1 - 1 / gain,
        )


def _own_and_best(
    size: int | None, batches: Sequence[Measured]
) -> tuple[Measured | None, Measured | None]:
    """Of the run's own size, and of the one at which throughput stops growing."""
    own = next((it for it in batches if it.size == size), None)
    at = best_size({it.size: it.tokens_per_s for it in batches})
    return own, next((it for it in batches if it.size == at), None)


def _ms(it: Measured) -> str:
    return f"{1000 * it.itl_s:.1f} ms"
