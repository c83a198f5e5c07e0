"""What ranks exchange, by size: sums and gathers of a tensor group, and messages from stage to stage.

Collectives are matched over the ranks of a group by their step and their order in it; a collective
that some rank's ring no longer holds is left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from bireme.chrome_trace import Recorded
from bireme.observe.ceilings import Ceilings
from bireme.observe.profile_records import CollectiveSize, MessageSize
from bireme.observe.timeline import Key, RankStep, key_of, rank_steps, sender_index
from bireme.trace import RankSpans, Span, SpanKind


@dataclass(frozen=True, slots=True)
class _Collective:
    """One, as each rank of its group saw it."""

    spans: Mapping[str, Span]

    @property
    def first_ns(self) -> int:
        return min(span.start_ns for span in self.spans.values())

    @property
    def last(self) -> tuple[int, str]:
        """When the last rank had come, and which: of several the last by name, as in the ledger."""
        return max((span.start_ns, name) for name, span in self.spans.items())

    @property
    def skew_ns(self) -> int:
        return self.last[0] - self.first_ns

    @property
    def moves_ns(self) -> list[int]:
        """Of each rank, from when the last had come."""
        come_ns = self.last[0]
        return [max(0, span.end_ns - come_ns) for span in self.spans.values()]


_Size = tuple[int, str, int]  # stage, kind, bytes


def collective_sizes(recorded: Recorded, ceilings: Ceilings | None) -> list[CollectiveSize]:
    """By stage, kind and size."""
    steps = {rank.name: rank_steps(rank.spans) for rank in recorded.ranks}
    numbers = {rank.name: number for number, rank in enumerate(recorded.ranks)}
    overlaps = {rank.name: _Work(steps[rank.name]) for rank in recorded.ranks}
    is_sampled = any(step.collectives for its in steps.values() for step in its) and not all(
        step.collectives for its in steps.values() for step in its
    )
    found = []
    for size, them in sorted(_by_size(recorded.ranks, steps).items()):
        ranks = [numbers[name] for name in them[0].spans]
        found.append(_told(size, them, overlaps, ranks, ceilings, is_sampled=is_sampled))
    return found


def _by_size(
    ranks: Sequence[RankSpans], steps: Mapping[str, Sequence[RankStep]]
) -> dict[_Size, list[_Collective]]:
    widths = Counter(rank.stage for rank in ranks)
    seen: dict[tuple[int, Key, int], dict[str, Span]] = {}
    for rank in ranks:
        for step in steps[rank.name]:
            for ordinal, span in enumerate(step.collectives):
                seen.setdefault((rank.stage, step.key, ordinal), {})[rank.name] = span
    found: dict[_Size, list[_Collective]] = {}
    for (stage, _, _), spans in seen.items():
        if len(spans) == widths[stage]:
            any_span = next(iter(spans.values()))
            size = stage, any_span.kind.name.lower(), any_span.num_bytes
            found.setdefault(size, []).append(_Collective(spans))
    return found


def _told(
    size: _Size,
    them: Sequence[_Collective],
    work: Mapping[str, _Work],
    ranks: Sequence[int],
    ceilings: Ceilings | None,
    *,
    is_sampled: bool,
) -> CollectiveSize:
    stage, kind, num_bytes = size
    durations = [span.end_ns - span.start_ns for one in them for span in one.spans.values()]
    overlapped = sum(work[name].beside_ns(span) for one in them for name, span in one.spans.items())
    late: Counter[str] = Counter()
    for one in them:
        come_ns, name = one.last
        late[name] += sum(come_ns - span.start_ns for span in one.spans.values())
    worst = max(them, key=lambda one: one.skew_ns)
    moved_s = median(max(one.moves_ns) for one in them) / 1e9
    ceiling = most = None
    if ceilings is not None and kind == "all_reduce":
        ceiling = ceilings.all_reduce_bytes_per_s(ranks, num_bytes)
        most = ceilings.most_all_reduce_bytes_per_s(ranks)
    return CollectiveSize(
        kind=kind,
        stage=stage,
        num_ranks=len(ranks),
        num_bytes=num_bytes,
        count=len(them),
        is_sampled=is_sampled,
        time_s=sum(durations) / len(ranks) / 1e9,
        move_s=sum(sum(one.moves_ns) for one in them) / len(ranks) / 1e9,
        median_s=median(durations) / 1e9,
        median_move_s=moved_s,
        overlapped_s=overlapped / len(ranks) / 1e9,
        mean_skew_s=fmean(one.skew_ns for one in them) / 1e9,
        median_skew_s=median(one.skew_ns for one in them) / 1e9,
        max_skew_s=worst.skew_ns / 1e9,
        max_skew_by=worst.last[1],
        late_s={name: ns / 1e9 for name, ns in sorted(late.items()) if ns},
        bytes_per_s=num_bytes / moved_s if moved_s else None,
        ceiling_bytes_per_s=ceiling,
        ceiling_most_bytes_per_s=most,
    )


class _Work:
    """When a rank was at work in its steps, to tell what went on beside it."""

    def __init__(self, steps: Iterable[RankStep]) -> None:
        spans = (span for step in steps for span in step.work)
        self._spans = sorted((span.start_ns, span.end_ns) for span in spans)
        self._ends = [end for _, end in self._spans]

    def beside_ns(self, span: Span) -> int:
        """How much of a collective lies in work other than that which does it, and so waits for it."""
        found = 0
        for start, end in self._spans[bisect_right(self._ends, span.start_ns) :]:
            if start >= span.end_ns:
                break
            if not start <= span.start_ns < end:
                found += min(end, span.end_ns) - start
        return found


def message_sizes(recorded: Recorded, ceilings: Ceilings | None) -> list[MessageSize]:
    """By stages and size: hidden states to the next stage, ids from the last to the first."""
    ranks = recorded.ranks
    found: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for number, rank in enumerate(ranks):
        sender = sender_index(rank, ranks)
        sent = _sent(ranks[sender])
        for span in rank.spans:
            if span.kind is SpanKind.RECV and key_of(span) in sent:
                begun_ns = min(max(span.start_ns, sent[key_of(span)]), span.end_ns)
                at = ranks[sender].stage, rank.stage, span.num_bytes
                found.setdefault(at, []).append((span.end_ns - begun_ns, sender, number))
    return [_message(size, them, ceilings) for size, them in sorted(found.items())]


def _sent(sender: RankSpans) -> dict[Key, int]:
    """When each step's message was sent: its first, if there are several."""
    found: dict[Key, int] = {}
    for span in sender.spans:
        if span.kind is SpanKind.SEND:
            found[key_of(span)] = min(span.start_ns, found.get(key_of(span), span.start_ns))
    return found


def _message(
    size: tuple[int, int, int], them: Sequence[tuple[int, int, int]], ceilings: Ceilings | None
) -> MessageSize:
    src, dst, num_bytes = size
    median_s = median(ns for ns, _, _ in them) / 1e9
    _, sender, receiver = them[0]
    ceiling = None
    if ceilings is not None:
        ceiling = ceilings.send_bytes_per_s(sender, receiver, num_bytes)
    return MessageSize(
        src_stage=src,
        dst_stage=dst,
        num_bytes=num_bytes,
        count=len(them),
        time_s=sum(ns for ns, _, _ in them) / 1e9,
        median_s=median_s,
        bytes_per_s=num_bytes / median_s if median_s else None,
        ceiling_bytes_per_s=ceiling,
    )
