"""What a request may ask for, end to end on rank processes: the same answer at every layout, whatever
else runs, and nothing that is not allowed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch

from bireme import LLM, CompletionOutput, SamplingParams, StructuredOutputsParams
from bireme.engine.pool import WorkerPool
from bireme.engine.scheduler import Scheduler
from bireme.errors import RequestError

Widths = int | tuple[int, ...]
FEW: list[tuple[Widths, int | None]] = [(1, 1), (2, 1), (1, 2), (2, 2)]
PROMPT = "The with statement is"
SHARED = "Return a new object replacing specified fields with new values. " * 6
PROMPTS = [SHARED + tail for tail in ("If the", "Return", "class", "A list of", "Note", "def f")]
SAMPLED = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)


def layout(tp: Widths, pp: int | None) -> dict[str, Any]:
    return {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "dtype": "float32"}


@contextmanager
def running(pool: WorkerPool, tp: Widths = 1, pp: int | None = 1, **settings: Any) -> Iterator[LLM]:
    with LLM("demo", pool=pool, **layout(tp, pp), **settings) as llm:
        yield llm


def memory_of_blocks(llm: LLM, num_blocks: int) -> int:
    """Bytes of a rank with which the cache has so many blocks, the null block among them."""
    budget = llm.plan.budget
    tokens = {None: num_blocks * budget.block_size}
    return max(rank.total(0) + rank.cache_bytes(tokens) for rank in budget.ranks)


def scheduler(llm: LLM) -> Scheduler:
    return llm.start().scheduler


def answers(llm: LLM, prompts: Any, params: Any) -> list[list[CompletionOutput]]:
    return [output.outputs for output in llm.generate(prompts, params)]


def ids(llm: LLM, prompts: Any, params: Any) -> list[list[int]]:
    return [answer[0].token_ids for answer in answers(llm, prompts, params)]


# --- the same draw --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(pool: WorkerPool) -> list[list[int]]:
    """Each prompt alone, with nothing to share."""
    with running(pool, enable_prefix_caching=False) as llm:
        return [ids(llm, prompt, SAMPLED)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2), ((3, 2), None)], ids=str)
def test_a_seed_draws_the_same_together_after_a_preemption_and_behind_a_shared_prefix(
    pool: WorkerPool, sampled: list[list[int]], tp: Widths, pp: int | None
) -> None:
    limits = {"max_model_len": 192, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    tight = memory_of_blocks(LLM("demo", **layout(tp, pp), **limits), 14)
    for memory, caches in ((None, True), (tight, True), (tight, False)):
        with running(
            pool, tp, pp, **limits, memory_limit_bytes=memory, enable_prefix_caching=caches
        ) as llm:
            assert ids(llm, PROMPTS, SAMPLED) == sampled
            assert (scheduler(llm).num_prefix_hits > 0) == caches
            assert (scheduler(llm).num_preemptions > 0) == (memory is not None)


@pytest.fixture(scope="module")
def several(pool: WorkerPool) -> list[str]:
    with running(pool) as llm:
        params = SamplingParams(n=4, temperature=1, seed=3, max_tokens=20, ignore_eos=True)
        return [answer.text for answer in answers(llm, PROMPT, params)[0]]


@pytest.mark.parametrize(("tp", "pp"), FEW, ids=str)
def test_several_answers_differ_and_do_not_depend_on_the_layout_or_on_what_else_runs(
    pool: WorkerPool, several: list[str], tp: Widths, pp: int | None
) -> None:
    params = SamplingParams(n=4, temperature=1, seed=3, max_tokens=20, ignore_eos=True)
    with running(pool, tp, pp) as llm:
        found = answers(llm, [*PROMPTS, PROMPT], [SAMPLED] * len(PROMPTS) + [params])[-1]
    assert [answer.text for answer in found] == several
    assert [answer.index for answer in found] == [0, 1, 2, 3]
    assert len(set(several)) == 4


# --- stop strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)], ids=str)
def test_a_stop_string_over_several_tokens_never_shows_and_ends_the_request(
    pool: WorkerPool, tp: int, pp: int
) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with running(pool, tp, pp) as llm:
        whole = answers(llm, PROMPT, params)[0][0]
        names = [llm.tokenizer.name_of(id_) for id_ in whole.token_ids]
        stop = names[9][-1] + names[10] + names[11][:2]  # begins and ends within tokens
        expected = whole.text[: whole.text.index(stop)]
        stopping = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True, stop=["@@", stop])
        shown, last = "", None
        for delta in llm.stream([PROMPT, PROMPTS[1]], [stopping, params]):
            if delta.index == 0:
                shown, last = shown + delta.text, delta
                assert expected.startswith(shown)
            elif last is not None and last.output is not None:
                assert scheduler(llm).num_running <= 1, "it ran on behind its stop string"
        assert shown == expected
        assert last is not None
        assert last.output is not None
        done = last.output.outputs[0]
        assert (done.finish_reason, done.stop_reason, done.text) == ("stop", stop, expected)
        assert len(done.token_ids) == 12
        kept = SamplingParams(
            temperature=0,
            max_tokens=60,
            ignore_eos=True,
            stop=stop,
            include_stop_str_in_output=True,
        )
        assert answers(llm, PROMPT, kept)[0][0].text == expected + stop


# --- log-probabilities ----------------------------------------------------------------------------


@cache
def whole_model() -> Any:
    from transformers import AutoModelForCausalLM

    from bireme.checkpoint.hub import resolve_model

    model = AutoModelForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32)
    return model.eval()


def expected_logprobs(token_ids: list[int]) -> torch.Tensor:
    """[T, V]; row t is of token t + 1."""
    with torch.inference_mode():
        logits: torch.Tensor = whole_model()(torch.tensor([token_ids])).logits[0]
    return logits.double().log_softmax(-1)


def check_logprobs(token_ids: list[int], first: int, found: list[Any], num_top: int) -> None:
    """`found[i]` is of token first + i."""
    expected = expected_logprobs(token_ids)
    for position, likely in enumerate(found, first):
        row, token_id = expected[position - 1], token_ids[position]
        assert next(iter(likely)) == token_id
        assert likely[token_id].rank == 1 + int((row > row[token_id]).sum())
        best = row.topk(num_top).indices.tolist()
        assert set(likely) == {token_id, *best}
        for id_, of in likely.items():
            assert of.logprob == pytest.approx(float(row[id_]), abs=2e-4)


@pytest.mark.parametrize(("tp", "pp"), FEW, ids=str)
def test_logprobs_are_those_of_the_whole_model(pool: WorkerPool, tp: int, pp: int) -> None:
    """Of the raw logits, whatever was done to them; beside requests that ask for none."""
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)
    bent = SamplingParams(
        temperature=0.7, top_k=9, seed=1, max_tokens=12, ignore_eos=True, logprobs=3,
        repetition_penalty=1.4, logit_bias={300: 9.0},
    )  # fmt: skip
    with running(pool, tp, pp) as llm:
        outputs = llm.generate([PROMPT, PROMPTS[0], PROMPT], [greedy, SAMPLED, bent])
    for output, num_top in ((outputs[0], 5), (outputs[2], 3)):
        prompt, answer = output.prompt_token_ids, output.outputs[0]
        assert answer.logprobs is not None
        assert len(answer.logprobs) == 12
        check_logprobs([*prompt, *answer.token_ids], len(prompt), answer.logprobs, num_top)
        chosen = zip(answer.token_ids, answer.logprobs, strict=True)
        total = sum(likely[id_].logprob for id_, likely in chosen)
        assert answer.cumulative_logprob == pytest.approx(total)
    assert outputs[1].outputs[0].logprobs is None


@pytest.mark.parametrize(("tp", "pp"), FEW, ids=str)
def test_prompt_logprobs_of_a_long_prompt_that_is_cached_and_comes_in_chunks(
    pool: WorkerPool, tp: int, pp: int
) -> None:
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    with running(pool, tp, pp, max_num_batched_tokens=32) as llm:
        ids(llm, PROMPTS, SAMPLED)
        output = llm.generate(PROMPTS[3], asked)[0]
        cached = llm.generate(PROMPTS[3], SAMPLED)[0]
    assert cached.num_cached_tokens > 32
    assert len(output.prompt_token_ids) > 64
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    check_logprobs(output.prompt_token_ids, 1, output.prompt_logprobs[1:], 2)


@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_of_one_token_beside_prompt_logprobs_has_that_token(
    pool: WorkerPool, n: int
) -> None:
    plain = SamplingParams(temperature=0, max_tokens=1, n=n)
    asked = SamplingParams(temperature=0, max_tokens=1, n=n, prompt_logprobs=1)
    with running(pool, 1, 1) as llm:
        expected, found = (llm.generate(PROMPTS[3], params)[0] for params in (plain, asked))
    assert [one.token_ids for one in found.outputs] == [one.token_ids for one in expected.outputs]
    assert all(len(one.token_ids) == 1 for one in found.outputs)


# --- structured output ----------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "kind": {"enum": ["function", "class", "módulo"]},
        "args": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
ARITHMETIC = 'start: term (("+" | "-") term)~1..3\nterm: /[1-9][0-9]?/ | "(" start ")"\n'
STRUCTURES = [
    StructuredOutputsParams(json=SCHEMA),
    StructuredOutputsParams(json_object=True),
    StructuredOutputsParams(regex=r"[A-Z][a-z]{2,5} \d{1,3}"),
    StructuredOutputsParams(choice=["yes", "yes, but", "no"]),
    StructuredOutputsParams(grammar=ARITHMETIC),
]


def check_structure(wanted: StructuredOutputsParams, answer: CompletionOutput) -> None:
    """Of a whole answer; one that ran out of tokens must have begun well."""
    text, is_whole = answer.text, answer.finish_reason == "stop"
    if wanted.json is not None:
        jsonschema.validate(json.loads(text), SCHEMA)
    elif wanted.json_object:
        assert text.startswith("{")
        if is_whole:
            assert isinstance(json.loads(text), dict)
    elif wanted.regex is not None:
        assert re.fullmatch(wanted.regex, text)
    elif wanted.choice is not None:
        assert text in wanted.choice
    elif is_whole:
        assert re.fullmatch(r"[-+()0-9]+", text)
        assert isinstance(eval_sum(text), int)


def eval_sum(text: str) -> int:
    """Adds up; ValueError for what is no sum."""
    while "(" in text:
        text, count = re.subn(r"\(([-+0-9]+)\)", lambda inner: str(abs(eval_sum(inner[1]))), text)
        if not count:
            raise ValueError(text)
    if not re.fullmatch(r"\d+([-+]\d+)*", text):
        raise ValueError(text)
    return sum(int(part) for part in re.findall(r"[-+]?\d+", text))


@pytest.mark.parametrize(("tp", "pp"), FEW, ids=str)
def test_structured_answers_parse_beside_free_ones(pool: WorkerPool, tp: int, pp: int) -> None:
    wanted = [
        SamplingParams(
            temperature=temperature, seed=seed, max_tokens=150, structured_outputs=structure
        )
        for structure in STRUCTURES
        for temperature, seed in ((0.0, None), (1.0, 1), (1.0, 2))
    ]
    prompts = ["A record:"] * len(wanted)
    with running(pool, tp, pp) as llm:
        free = ids(llm, PROMPTS, SAMPLED)
        found = answers(llm, [*prompts, *PROMPTS], [*wanted, *[SAMPLED] * len(PROMPTS)])
        alone = answers(llm, prompts[1], wanted[1])[0][0]
    for params, answer in zip(wanted, found, strict=False):
        assert params.structured_outputs is not None
        check_structure(params.structured_outputs, answer[0])
    assert [answer[0].token_ids for answer in found[len(wanted) :]] == free
    assert found[1][0].token_ids == alone.token_ids
    assert sum(answer[0].finish_reason == "stop" for answer in found) >= 12


def test_structured_answers_survive_a_preemption(pool: WorkerPool) -> None:
    limits = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    array = {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 20, "maxItems": 20}
    params = SamplingParams(
        temperature=1,
        seed=5,
        max_tokens=100,
        structured_outputs=StructuredOutputsParams(json=array),
    )
    prompts = [[5, index] for index in range(4)]
    with running(pool, 1, 2, **limits) as llm:
        alone = [ids(llm, [prompt], params)[0] for prompt in prompts]
        tight = memory_of_blocks(llm, 10)
    with running(pool, 1, 2, **limits, memory_limit_bytes=tight) as llm:
        found = answers(llm, prompts, params)
        assert scheduler(llm).num_preemptions > 0
    assert [answer[0].token_ids for answer in found] == alone
    for answer in found:
        assert len(json.loads(answer[0].text)) == 20


# --- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "pp"), FEW, ids=str)
def test_penalties_biases_and_lengths_do_what_they_say(pool: WorkerPool, tp: int, pp: int) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    eos = 1
    with running(pool, tp, pp) as llm:
        plain, frequent, present, repeated, biased, banned, long, ended, on = ids(
            llm,
            [PROMPT] * 9,
            [
                SamplingParams(**greedy, ignore_eos=True),
                SamplingParams(**greedy, ignore_eos=True, frequency_penalty=2),
                SamplingParams(**greedy, ignore_eos=True, presence_penalty=2),
                SamplingParams(**greedy, ignore_eos=True, repetition_penalty=50.0),
                SamplingParams(**greedy, ignore_eos=True, logit_bias={777: 100}),
                SamplingParams(**greedy, ignore_eos=True, logit_bias={550: -100}),
                SamplingParams(**greedy, logit_bias={eos: 100}, min_tokens=9),
                SamplingParams(**greedy, logit_bias={eos: 100}),
                SamplingParams(**greedy, logit_bias={eos: 100}, ignore_eos=True),
            ],
        )
        prompt = set(llm.tokenizer.encode(PROMPT))
    assert max(map(frequent.count, frequent)) < max(map(plain.count, plain))
    assert len(set(present)) > len(set(plain))
    assert len(set(repeated)) == 40
    assert not prompt & set(repeated), "of the prompt, too"
    assert biased == [777] * 40
    assert plain[0] == 550
    assert 550 not in banned
    assert len(long) == 10
    assert long[-1] == eos
    assert eos not in long[:-1]
    assert ended == [eos]
    assert on == [eos] * 40


class Untouched(WorkerPool):
    """A pool that starts nothing."""

    def take(self, num_ranks: int) -> Any:
        raise AssertionError("a process was to be started")


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("x", {"logit_bias": {2048: 1}}, "logit_bias names the token id 2048; ids go from 0 to 2047"),
    ("x", {"stop_token_ids": (2048,)}, "stop_token_ids names the token id 2048"),
    ("x", {"structured_outputs": StructuredOutputsParams(regex="(")}, "structured outputs: "),
    ("x", {"structured_outputs": StructuredOutputsParams(json="{")}, "structured outputs: "),
    ("x", {"max_tokens": 1024}, "the context holds 1024"),
    ([2048], {}, "ids go from 0 to 2047"),
]


@pytest.mark.parametrize(("prompt", "asked", "says"), BAD, ids=[bad[2][:30] for bad in BAD])
def test_what_cannot_be_served_reaches_no_rank(
    prompt: Any, asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        LLM("demo", pool=Untouched()).generate(prompt, SamplingParams(**asked))


@pytest.mark.parametrize(
    "asked",
    [
        {"n": 0}, {"n": 129}, {"temperature": math.nan}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0},
        {"min_p": 1.1}, {"repetition_penalty": 0}, {"frequency_penalty": 2.1}, {"presence_penalty": -3},
        {"logit_bias": {1: 101}}, {"logit_bias": {"1": 1}}, {"seed": -1}, {"max_tokens": 0}, {"stop": ""},
        {"min_tokens": 17}, {"stop": [3]}, {"stop_token_ids": "12"}, {"logprobs": 21}, {"logprobs": True},
        {"prompt_logprobs": -1}, {"structured_outputs": {"regex": "a"}}, {"ignore_eos": 1},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_out_of_range_are_refused_in_one_line(asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**asked)
    assert "\n" not in str(caught.value)
    assert next(iter(asked)) in str(caught.value)
