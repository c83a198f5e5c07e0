"""The choice of ids in kernels beside that in torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from bireme.engine.sampling.choosing import RowGroup, _lowest_key, _Tempered, choose
from bireme.engine.sampling.choosing_on_gpu import _lowest_keys, choose_on_gpu
from bireme.engine.sampling.shard import Shard, sortable
from bireme.kernels.draws import Draws
from bireme.parallel.mesh import Alone, TensorGroup
from bireme.request import SamplingSetup
from engine.sampling_steps import decodes, run_steps
from thread_group import ThreadGroup, run_group

HAS_GPU = torch.cuda.is_available()
ROWS = 12
IN_16_BITS = torch.bfloat16 if HAS_GPU else torch.float16  # NumPy has no bfloat16
VOCABULARIES = [150, 5000, *([128256] if HAS_GPU else [])]


def rows_of(vocab: int, device: torch.device) -> torch.Tensor:
    logits = 3 * torch.randn(ROWS, vocab, device=device)
    logits[1] = logits[1].round()  # many equals
    logits[2, ::2] = -math.inf
    logits[3] = -math.inf
    logits[3, vocab - 1] = -2.0
    logits[4] = logits[4].sort().values
    logits[5] = 0.0
    return logits


def asked_of(device: torch.device) -> Draws:
    def some(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor((values * ROWS)[:ROWS], dtype=dtype, device=device)

    return Draws(
        temperature=some([1.0, 0.7, 0.0, 2.0, 0.5]), top_k=some([0, 40, 3, 1], torch.int64),
        top_p=some([0.9, 1.0, 0.3]), min_p=some([0.0, 0.0, 0.1, 0.0, 0.0, 0.02, 0.5]),
        seeds=torch.arange(ROWS, device=device) * 2**40 + 2**62,
        choices=torch.arange(ROWS, device=device) % 3,
        positions=torch.arange(ROWS, device=device) * 1000 + 7,
        has_top_k=True, has_top_p=True, has_min_p=True,
    )  # fmt: skip


def without(asked: Draws, filters: set[str]) -> Draws:
    off = {
        "top_k": torch.zeros_like(asked.top_k), "top_p": torch.ones_like(asked.top_p),
        "min_p": torch.zeros_like(asked.min_p),
    }  # fmt: skip
    for name in filters:
        asked = replace(asked, **{name: off[name], f"has_{name}": False})  # type: ignore[arg-type]
    return asked


def expected(logits: torch.Tensor, asked: Draws) -> list[int]:
    """Row by row in torch; -1 where its threshold is so near a change that rounding decides."""
    found = []
    for row in range(len(logits)):
        own = Draws(
            *(
                getattr(asked, name)[row : row + 1]
                for name in (
                    "temperature", "top_k", "top_p", "min_p", "seeds", "choices", "positions"
                )
            ),
            asked.has_top_k, asked.has_top_p, asked.has_min_p,
        )  # fmt: skip
        shard = Shard.of(logits.shape[1], 1, 0, Alone())
        shares = (own.top_p * scale for scale in (1 - 1e-6, 1.0, 1 + 1e-6))
        ids = {
            int(choose(logits[row : row + 1].float(), shard, [group], 1 << 28))
            for group in (
                RowGroup(slice(None), replace(own, top_p=share) if own.temperature > 0 else None)
                for share in shares
            )
        }
        found.append(ids.pop() if len(ids) == 1 else -1)
    return found


def check(found: torch.Tensor, wanted: list[int]) -> None:
    assert found.dtype == torch.int64
    assert sum(id_ < 0 for id_ in wanted) <= 1
    for id_, other in zip(found.tolist(), wanted, strict=True):
        assert id_ == other or other < 0


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(
    "filters", [set(), {"top_k"}, {"top_p"}, {"min_p"}, {"top_k", "top_p", "min_p"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, IN_16_BITS])
def test_draws(vocab: int, filters: set[str], dtype: torch.dtype, device: torch.device) -> None:
    logits, asked = rows_of(vocab, device).to(dtype), asked_of(device)
    asked = without(asked, {"top_k", "top_p", "min_p"} - filters)
    shard = Shard.of(vocab, 1, 0, Alone())
    check(choose_on_gpu(logits, shard, asked), expected(logits, asked))


def test_what_is_kept(device: torch.device) -> None:
    logits, asked = rows_of(5000, device), asked_of(device)
    top_k = torch.tensor([0, 40, 300, 7] * 3, device=device)
    asked = replace(asked, temperature=1 + asked.temperature, top_k=top_k, min_p=asked.min_p / 99)
    scaled = logits / asked.temperature.unsqueeze(1)
    in_torch = _lowest_key(_Tempered(logits, slice(None), asked.temperature, 5000), asked, Alone())
    wanted = sortable(scaled) >= in_torch.unsqueeze(1)
    found = sortable(scaled).long() + 2**31 >= _lowest_keys(logits, asked, Alone()).unsqueeze(1)
    assert torch.equal(found, wanted)
    assert len(set(wanted.sum(1).tolist())) > 7


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_likeliest(vocab: int, device: torch.device) -> None:
    logits, shard = rows_of(vocab, device), Shard.of(vocab, 1, 0, Alone())
    wanted = choose(logits, shard, [RowGroup(slice(None), None)], 1 << 28)
    assert torch.equal(choose_on_gpu(logits, shard, None), wanted)
    wide = logits.new_full((ROWS, vocab + 40), math.inf)  # rows that lie apart
    wide[:, :vocab] = logits
    assert torch.equal(choose_on_gpu(wide[:, :vocab], shard, None), wanted)


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")
@pytest.mark.parametrize("vocab", [150, 1000, 4096, 5000])
def test_rows_without_a_number_get_an_id_that_there_is(vocab: int, device: torch.device) -> None:
    """The columns behind a vocabulary have numbers."""
    shard = Shard.of(vocab, 1, 0, Alone())
    logits = torch.full((ROWS, shard.width), -math.inf, device=device)
    logits[:, :vocab] = math.nan
    for asked in (None, asked_of(device)):
        found = choose_on_gpu(logits, shard, asked)
        assert ((found >= 0) & (found < vocab)).all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_at_least_one_is_kept(device: torch.device) -> None:
    logits, shard = torch.randn(ROWS, 5000, device=device), Shard.of(5000, 1, 0, Alone())
    asked = replace(asked_of(device), top_p=torch.zeros(ROWS, device=device))
    logits[0, 77] = logits[6, 4000] = math.inf
    assert choose_on_gpu(logits, shard, asked).tolist() == logits.argmax(1).tolist()


@pytest.mark.skipif(HAS_GPU, reason="hidden states of these steps lie on the CPU")
def test_a_sampler_chooses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that draw, a greedy one, one with a bias, one that tells log-probabilities."""
    asked: list[dict[str, Any]] = [
        {"temperature": 1.0}, {}, {"temperature": 2.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 0.5, "min_p": 0.4, "logit_bias": [(3, 2.0)]}, {"repetition_penalty": 2.0},
        {"temperature": 1.0, "num_logprobs": 2},
    ]  # fmt: skip
    setups = [
        SamplingSetup(seed=2**40 + 3, **more, token_ids=[1, 2], num_prompt=2) for more in asked
    ]
    table = torch.randn(len(setups), 20, 150)
    batches = decodes(setups, 2, 12, 20)
    in_torch = run_steps(table, batches, 1)
    monkeypatch.setattr("bireme.engine.sampling.sampler.has_kernels", lambda _: True)
    assert run_steps(table, batches, 1) == in_torch


class TakingTurns(TensorGroup):
    """Triton's interpreter runs one kernel at a time: others do while this one waits for them."""

    def __init__(self, group: ThreadGroup, turn: threading.Lock) -> None:
        self._group, self._turn = group, turn

    @contextmanager
    def _without(self) -> Iterator[None]:
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        with self._without():
            return self._group.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        with self._without():
            return self._group.all_gather(x)


@pytest.mark.parametrize("kind", ["greedy", "random", "filtered"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_vocabulary_that_is_cut(kind: str, size: int, device: torch.device) -> None:
    logits, turn = rows_of(5000, device), threading.Lock()
    asked = asked_of(device)
    if kind == "greedy":
        asked = replace(asked, temperature=0 * asked.temperature)
    if kind != "filtered":
        asked = without(asked, {"top_k", "top_p", "min_p"})

    def work(rank: int, group: ThreadGroup) -> torch.Tensor:
        with turn:
            shard = Shard.of(5000, size, rank, TakingTurns(group, turn))
            own = logits.new_full((ROWS, shard.width), -math.inf)
            own[:, : shard.num_real] = logits[:, shard.first_id : shard.first_id + shard.num_real]
            return choose_on_gpu(own, shard, None if kind == "greedy" else asked)

    for found in run_group(size, work):
        check(found, expected(logits, asked))
