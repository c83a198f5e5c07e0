"""When a load generator sends, and what: drawn from a seed, or read from a trace."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bireme.bench.arrivals import KINDS, Arrivals
from bireme.bench.azure_trace import TracedRequest, read_trace
from bireme.bench.queries import MadeUp, RandomQueries, TraceQueries, read_queries
from bireme.errors import RequestError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
RATES = st.floats(0.01, 10_000)
SHAPES = st.floats(0.1, 50)


def first(arrivals: Arrivals, count: int) -> list[float]:
    return list(itertools.islice(arrivals.offsets(), count))


def trace(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "".join(f"{line}\n" for line in lines))
    return path


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), RATES, SHAPES, st.integers(-(2**40), 2**40))
def test_arrivals_begin_at_once_never_go_back_and_are_those_of_their_seed(
    kind: str, rate: float, shape: float, seed: int
) -> None:
    arrivals = Arrivals(
        kind=kind, rate=rate, burstiness=shape if kind == "gamma" else 1.0, seed=seed
    )
    offsets = first(arrivals, 50)
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets == first(arrivals, 50)


@pytest.mark.parametrize(
    ("kind", "burstiness"), [("poisson", 1), ("gamma", 0.3), ("gamma", 9), ("constant", 1)]
)
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_shape(
    kind: str, burstiness: float
) -> None:
    offsets = first(Arrivals(kind=kind, rate=4.0, burstiness=burstiness, seed=3), 20_000)
    gaps = [later - sooner for sooner, later in itertools.pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 4, rel=0.06)
    expected = 0 if kind == "constant" else mean / math.sqrt(burstiness)
    assert deviation == pytest.approx(expected, rel=0.06, abs=1e-9)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert first(Arrivals(), 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rate": 0}, "request_rate=0 must be above 0"),
        ({"rate": math.nan}, "request_rate=nan must be above 0"),
        ({"kind": "gamma", "burstiness": 0}, "burstiness=0 must be above 0"),
        ({"kind": "constant", "burstiness": 2}, "shapes gamma arrivals, not constant ones"),
        ({"kind": "uniform"}, "must be one of poisson, gamma, constant"),
    ],
)
def test_impossible_arrivals_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        Arrivals(**settings)  # type: ignore[arg-type]


def test_a_trace_is_replayed_from_its_first_request_and_sped_up(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:05.9799600,3180,8",
        "2023-11-16 18:17:07.9799600,0,0",
    )
    found = read_trace(path)
    assert [request.offset_s for request in found.requests] == [0, 2, 4]
    assert found.requests[2][1:] == (1, 1)
    assert list(found.offsets(4)) == [0, 0.5, 1]
    assert len(read_trace(path, 2).requests) == 2


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(2, 20_000))
def test_a_request_that_is_cut_fits_and_keeps_a_token_of_each(
    input_len: int, output_len: int, limit: int
) -> None:
    cut = TracedRequest(0.0, input_len, output_len).within(limit)
    assert 1 <= cut.input_len <= input_len
    assert 1 <= cut.output_len <= output_len
    assert (
        cut.input_len + cut.output_len == min(input_len + output_len, limit) or cut.output_len == 1
    )


def test_a_trace_says_how_many_requests_were_cut(tmp_path: Path) -> None:
    path = trace(tmp_path, "2023-11-16 18:17:03,900,10", "2023-11-16 18:17:04,100,10")
    found = read_trace(path, max_model_len=512)
    assert [request.input_len for request in found.requests] == [502, 100]
    assert found.num_cut == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", "has no column TIMESTAMP"),
        (HEADER, "holds 0 requests, 1 are asked for"),
        (HEADER + "2023-11-16 18:17:03,many,1\n", r"trace.csv:2 holds .* no time and two numbers"),
        (HEADER + "2023-11-16 18:17:03\n", r"trace.csv:2 holds"),
        (HEADER + "2023-11-16 10:00:03,1,1\n2023-11-16 10:00:01,1,1\n", "came 2 s before the line"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(RequestError, match=complaint):
        read_trace(path)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 200), st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 50), st.booleans()
)
def test_made_up_prompts_are_as_long_as_said_begin_alike_and_are_those_of_their_index(
    input_len: int, output_len: int, ratio: float, prefix_len: int, as_text: bool
) -> None:
    queries = RandomQueries(
        made_up=MadeUp(vocab_size=300, as_text=as_text),
        num_prompts=4,
        input_len=input_len,
        output_len=output_len,
        range_ratio=ratio,
        prefix_len=prefix_len,
    )
    made = [queries.query(index) for index in range(4)]
    assert made == [queries.query(index) for index in range(4)]
    spread = int(input_len * ratio)
    for query in made:
        prompt = query.prompt.split() if isinstance(query.prompt, str) else query.prompt
        assert len(prompt) == query.input_len
        assert input_len - spread <= query.input_len - prefix_len <= input_len + spread
        assert query.output_len >= 1
        first_prompt = made[0].prompt
        begins = first_prompt.split() if isinstance(first_prompt, str) else first_prompt
        assert prompt[:prefix_len] == begins[:prefix_len]
        assert as_text or all(0 <= id_ < 300 for id_ in query.prompt)  # type: ignore[operator]


def test_a_trace_gives_prompts_their_lengths() -> None:
    queries = TraceQueries(MadeUp(), [TracedRequest(0, 7, 3), TracedRequest(1, 2, 9)])
    assert [len(queries.query(index).prompt) for index in range(2)] == [7, 2]
    assert queries.query(2)[1:] == (7, 3)
    assert queries.query(2).prompt != queries.query(0).prompt


def test_a_file_gives_texts_or_ids_each_with_its_length(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a b"}\n\n{"prompt": [1, 2], "output_len": 3}\n{"prompt": "c", "output_tokens": 4}\n'
    )
    queries = read_queries(path, 9)
    assert [queries.query(index) for index in range(3)] == [
        ("a b", 0, 9),
        ([1, 2], 2, 3),
        ("c", 0, 4),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "x.jsonl:1 is no JSON"),
        ('{"text": "a"}', "x.jsonl:1 has no `prompt`"),
        ('{"prompt": [1, "a"]}', "x.jsonl:1 has no `prompt`"),
        ('{"prompt": ""}', "x.jsonl:1 has no `prompt`"),
        ('{"prompt": "a", "output_len": 0}', "output_len=0; it must be at least 1"),
        ("", "holds 0 prompts, 1 are asked for"),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line)
    with pytest.raises(RequestError, match=complaint):
        read_queries(path, 1)
