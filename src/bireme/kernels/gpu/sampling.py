"""The choice of the next ids: the likeliest of a row, or its best draw among those at or above a key.

What `engine.sampling.choosing` does in torch, of all rows in one launch, whatever each of them asks for: a row of
temperature 0 takes its likeliest id. Scores are float64 and masses integers, so that neither depends on how the
vocabulary is cut. What is compiled for one number of rows serves all.
Shapes: S rows, V local vocabulary, N parts of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bireme.kernels.draws import RADIX, Draws

_PART = 2048  # columns of one program
_NUM_BINS = 1 << max(bits for _, bits in RADIX)
_LARGEST_ID = tl.constexpr(0x7FFFFFFF)
_LOWEST_UNIT, _WHOLE_MASS = tl.constexpr(2.0**-32), tl.constexpr(2.0**31)


@triton.jit
def _key(x):
    """uint32, in the order of float32 `x`."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _mixed(x):
    """`kernels.noise.mix_` of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(seed, choice, position, ids):
    """`kernels.noise.gumbel_noise` of one row."""
    low = seed.to(tl.uint32) ^ _mixed(position.to(tl.uint32))
    high = (seed >> 32).to(tl.uint32) ^ _mixed(choice.to(tl.uint32) + 0x9E3779B9)
    word = _mixed(_mixed(ids.to(tl.uint32) ^ _mixed(low)) + _mixed(high))
    return -tl.log(-tl.log((word.to(tl.float64) + 0.5) * _LOWEST_UNIT))


@triton.jit(
    do_not_specialize=["S", "first_id"],
    do_not_specialize_on_alignment=[
        "temperatures",
        "seeds",
        "choices",
        "positions",
        "lowest",
        "best",
    ],
)
def _best_of_part_kernel(
    logits, stride, V, first_id, temperatures, seeds, choices, positions, lowest, best, S,
    IS_DRAWN: tl.constexpr, IS_FILTERED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row.to(tl.int64) * stride + at, at < V, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))  # NaN would be less than what is behind a row
    ids = first_id + at
    score = x.to(tl.float64)
    if IS_DRAWN:
        temperature = tl.load(temperatures + row)
        if temperature > 0:
            x = tl.div_rn(x, temperature)
            if IS_FILTERED:
                x = tl.where(_key(x).to(tl.int64) >= tl.load(lowest + row), x, float("-inf"))
            score = x.to(tl.float64)
            if tl.max(x, 0) > float("-inf"):
                score += _noise(
                    tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row), ids
                )
    highest = tl.max(score, 0)
    first = tl.min(tl.where(score == highest, ids, _LARGEST_ID), 0)
    tl.store(best + (part * 2) * S + row, highest)
    tl.store(best + (part * 2 + 1) * S + row, first.to(tl.float64))


@triton.jit(do_not_specialize=["N", "S"], do_not_specialize_on_alignment=["best", "ids"])
def _first_of_best_kernel(best, ids, N, S, SIZE: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, SIZE)
    score = tl.load(best + part * 2 * S + row, part < N, other=float("-inf"))
    id_ = tl.load(best + (part * 2 + 1) * S + row, part < N, other=_LARGEST_ID)
    first = tl.min(tl.where(score == tl.max(score, 0), id_, _LARGEST_ID), 0)
    tl.store(ids + row, first.to(tl.int64))


@triton.jit(
    do_not_specialize=["G", "S"],
    do_not_specialize_on_alignment=[
        "highest",
        "temperatures",
        "min_p",
        "tops",
        "lowest",
        "prefixes",
    ],
)
def _begin_kernel(highest, temperatures, min_p, tops, lowest, prefixes, G, S):
    row = tl.program_id(0)
    top = tl.load(highest + row).to(tl.float32)
    for rank in range(1, G):
        top = tl.maximum(top, tl.load(highest + rank * S + row).to(tl.float32))
    temperature, share = tl.load(temperatures + row), tl.load(min_p + row)
    least = tl.zeros([], tl.int64)
    if temperature > 0:
        top = tl.div_rn(top, temperature)
        if share > 0:
            least = _key(top + tl.log(share)).to(tl.int64)
    tl.store(tops + row, top)
    tl.store(lowest + row, least)
    tl.store(prefixes + row, tl.zeros([], tl.int64))


@triton.jit(
    do_not_specialize=["shift", "bits"],
    do_not_specialize_on_alignment=["temperatures", "tops", "limits", "lowest", "prefixes"],
)
def _weigh_kernel(
    logits, stride, V, temperatures, tops, limits, lowest, prefixes, histogram, shift, bits,
    BY_MASS: tl.constexpr, PART: tl.constexpr, NUM_BINS: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature, limit = tl.load(temperatures + row), tl.load(limits + row)
    asks = limit < 1 if BY_MASS else limit > 0
    if (temperature > 0) & asks:
        at = part * PART + tl.arange(0, PART)
        x = tl.load(logits + row * stride + at, at < V, other=float("-inf")).to(tl.float32)
        x = tl.div_rn(x, temperature)
        key = _key(x).to(tl.int64)
        counts = key >> (shift + bits) == tl.load(prefixes + row) >> (shift + bits)
        if BY_MASS:
            share = tl.exp(x - tl.load(tops + row)).to(tl.float64)
            weight = (share * _WHOLE_MASS).to(tl.int64)
            counts &= key >= tl.load(lowest + row)
        else:
            weight = (x > float("-inf")).to(tl.int64)
        place = row * NUM_BINS + ((key >> shift) & ((1 << bits) - 1))
        tl.atomic_add(histogram + place, weight, counts & (weight > 0), sem="relaxed")


@triton.jit(
    do_not_specialize=["shift", "bits"],
    do_not_specialize_on_alignment=["temperatures", "limits", "lowest", "prefixes", "targets"],
)
def _descend_kernel(
    histogram, temperatures, limits, lowest, prefixes, targets, shift, bits,
    BY_MASS: tl.constexpr, NUM_BINS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature, limit = tl.load(temperatures + row), tl.load(limits + row)
    asks = limit < 1 if BY_MASS else limit > 0
    if (temperature > 0) & asks:
        bins = tl.arange(0, NUM_BINS)
        weight = tl.load(histogram + row * NUM_BINS + bins)
        tl.store(histogram + row * NUM_BINS + bins, tl.zeros_like(weight))
        total = tl.sum(weight, 0)
        above = total - tl.cumsum(weight, 0)  # of all higher bins
        prefix, target = tl.load(prefixes + row), tl.load(targets + row)
        if shift + bits == 32:  # from the top: what is there is of another threshold
            prefix = prefix * 0
            if BY_MASS:
                wanted = tl.ceil(total.to(tl.float64) * limit.to(tl.float64)).to(tl.int64)
                target = tl.maximum(wanted, 1)
            else:
                target = limit.to(tl.int64)  # of fewer ids all are kept
        chosen = tl.maximum(tl.sum((above + weight >= target).to(tl.int32), 0) - 1, 0)
        prefix |= chosen.to(tl.int64) << shift
        tl.store(prefixes + row, prefix)
        tl.store(targets + row, target - tl.sum(tl.where(bins == chosen, above, 0), 0))
        if shift == 0:
            tl.store(lowest + row, tl.maximum(prefix, tl.load(lowest + row)))


class Thresholds:
    """The least keys that rows keep, `lowest` int64 [S], counted from 0; found by radix selection, as a group of ranks
    sums `histogram` int64 [S, bins] between `weigh` and `descend`. It begins with what min-p keeps of the highest
    logits [ranks, S] of all.
    """

    def __init__(self, logits: torch.Tensor, draws: Draws, highest: torch.Tensor) -> None:
        self._logits, self._draws = logits, draws
        num_ranks, num_rows = highest.shape
        self._tops = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        state = torch.empty(3, num_rows, dtype=torch.int64, device=logits.device)
        self.lowest, self._prefixes, self._targets = state.unbind(0)
        self.histogram = state.new_zeros(num_rows, _NUM_BINS)
        _begin_kernel[(num_rows,)](
            highest, draws.temperature, draws.min_p, self._tops, self.lowest, self._prefixes,
            num_ranks, num_rows, num_warps=1,
        )  # fmt: skip

    def weigh(self, shift: int, bits: int, *, by_mass: bool) -> None:
        """Adds this shard's numbers, or masses, of the keys that begin as was found before, by their next bits."""
        logits, draws = self._logits, self._draws
        _weigh_kernel[(_num_parts(logits), len(logits))](
            logits, logits.stride(0), logits.shape[1], draws.temperature, self._tops,
            self._limits(by_mass), self.lowest, self._prefixes, self.histogram, shift, bits,
            BY_MASS=by_mass, PART=_PART, NUM_BINS=_NUM_BINS, num_warps=8,
        )  # fmt: skip

    def descend(self, shift: int, bits: int, *, by_mass: bool) -> None:
        """Finds these bits of the threshold, from the histogram, which is empty then."""
        _descend_kernel[(len(self._logits),)](
            self.histogram, self._draws.temperature, self._limits(by_mass), self.lowest,
            self._prefixes, self._targets, shift, bits,
            BY_MASS=by_mass, NUM_BINS=_NUM_BINS, num_warps=8,
        )  # fmt: skip

    def _limits(self, by_mass: bool) -> torch.Tensor:
        return self._draws.top_p if by_mass else self._draws.top_k


def best_of_parts(
    logits: torch.Tensor, first_id: int, draws: Draws | None, lowest: torch.Tensor | None
) -> torch.Tensor:
    """float64 [N, 2, S]: the highest score of each part, and the first id that has it. `draws` None: of logits [S, V]
    alone; else over their temperature and with noise, -inf where a key is below `lowest`."""
    best = logits.new_empty(_num_parts(logits), 2, len(logits), dtype=torch.float64)
    asked: list[torch.Tensor | None] = [None] * 4
    if draws is not None:
        asked = [draws.temperature, draws.seeds, draws.choices, draws.positions]
    _best_of_part_kernel[(len(best), len(logits))](
        logits, logits.stride(0), logits.shape[1], first_id, *asked, lowest, best, len(logits),
        IS_DRAWN=draws is not None, IS_FILTERED=lowest is not None, PART=_PART, num_warps=8,
        sanitize_overflow=False,  # words of a hash wrap
    )  # fmt: skip
    return best


def first_of_best(best: torch.Tensor) -> torch.Tensor:
    """int64 [S], of parts [N, 2, S] of the whole vocabulary: the id of the highest score, the first of equals."""
    ids = torch.empty(best.shape[2], dtype=torch.int64, device=best.device)
    size = triton.next_power_of_2(len(best))
    _first_of_best_kernel[(len(ids),)](best, ids, len(best), len(ids), SIZE=size, num_warps=1)
    return ids


def _num_parts(logits: torch.Tensor) -> int:
    return int(triton.cdiv(logits.shape[1], _PART))
