"""The official `openai` client against a running server: what OpenAI documents is what comes."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from served import Served

from bireme import LLM, SamplingParams
from bireme.checkpoint.hub import DEMO
from bireme.engine.pool import WorkerPool

QUESTION: list[Any] = [{"role": "user", "content": "What does math.sqrt do?"}]
ANSWER = "math.sqrt(x, /)\n\nReturn the square root of x."
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def completed(client: OpenAI, prompt: Any = "import ", **settings: Any) -> Any:
    return client.completions.create(
        **{"model": DEMO, "prompt": prompt, "max_tokens": 24, "temperature": 0, **settings}
    )


def chatted(client: OpenAI, messages: Any = QUESTION, **settings: Any) -> Any:
    given = {"model": DEMO, "messages": messages, "max_tokens": 48, "temperature": 0}
    return client.chat.completions.create(**{**given, **settings})


def check_finish_reasons(chunks: Sequence[Any], num: int) -> None:
    """Null until exactly one final value an index, behind which nothing more comes of it."""
    finished: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert choice.index not in finished
        if choice.finish_reason is not None:
            finished[choice.index] = choice.finish_reason
    assert sorted(finished) == list(range(num))


def texts(chunks: Sequence[Any]) -> dict[int, str]:
    found: dict[int, str] = defaultdict(str)
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        found[choice.index] += (
            choice.text if hasattr(choice, "text") else choice.delta.content or ""
        )
    return dict(found)


# --- models and whole answers ------------------------------------------------------------------


def test_the_model_is_listed_and_found_by_its_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEMO]
    assert client.models.retrieve(DEMO).id == DEMO
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'") as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        completed(client, model="other")


def test_a_chat_is_answered_with_its_usage(client: OpenAI) -> None:
    found = chatted(client)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert choice.message.tool_calls is None
    usage = found.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens
    assert (found.object, found.model) == ("chat.completion", DEMO)


def test_the_async_client_has_many_answers_at_once(server: Served) -> None:
    async def main() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = [
                client.chat.completions.create(model=DEMO, messages=QUESTION, temperature=0)
                for _ in range(8)
            ]
            return [
                found.choices[0].message.content or "" for found in await asyncio.gather(*asked)
            ]

    assert asyncio.run(main()) == [ANSWER] * 8


def test_answers_are_those_of_an_llm_in_process(client: OpenAI, pool: WorkerPool) -> None:
    prompts = ["import ", "def main(", "The quick brown"]
    params = SamplingParams(temperature=0, max_tokens=24)
    seeded = SamplingParams(temperature=1.2, seed=7, max_tokens=24, top_p=0.9)
    with LLM(DEMO, dtype="float32", pool=pool) as llm:
        greedy = [one.outputs[0].text for one in llm.generate(prompts, params)]
        drawn = llm.generate(["import "], seeded)[0].outputs[0].text
        said = llm.chat([QUESTION], SamplingParams(temperature=0, max_tokens=48))[0].outputs[0].text
    assert [choice.text for choice in completed(client, prompts).choices] == greedy
    assert completed(client, temperature=1.2, seed=7, top_p=0.9).choices[0].text == drawn
    assert chatted(client).choices[0].message.content == said


def test_lists_of_prompts_and_n_are_numbered_prompt_by_prompt(client: OpenAI) -> None:
    settings: dict[str, Any] = {"n": 2, "seed": 3, "temperature": 1.5}
    found = completed(client, ["import ", "def "], **settings)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    alone = [completed(client, prompt, **settings).choices for prompt in ("import ", "def ")]
    assert [choice.text for choice in found.choices] == [it.text for two in alone for it in two]
    assert alone[0][0].text != alone[0][1].text


def test_prompts_may_be_token_ids(client: OpenAI, server: Served) -> None:
    ids = server.ask("POST", "/tokenize", {"prompt": "import "}).json["tokens"]
    expected = completed(client).choices[0].text
    assert completed(client, ids).choices[0].text == expected
    assert [it.text for it in completed(client, [ids, ids]).choices] == [expected] * 2


def test_a_seed_gives_the_same_text_again_and_another_seed_another(client: OpenAI) -> None:
    def drawn(seed: int) -> str:
        text: str = completed(client, temperature=1.5, seed=seed).choices[0].text
        return text

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(-1) == drawn(-1)


def test_a_logit_bias_decides_the_token(client: OpenAI, server: Served) -> None:
    (x,) = server.ask("POST", "/tokenize", {"prompt": "x", "add_special_tokens": False}).json[
        "tokens"
    ]
    found = completed(client, max_tokens=3, logit_bias={str(x): 100})
    assert found.choices[0].text == "xxx"


def test_a_stop_string_ends_the_text_and_is_named(client: OpenAI) -> None:
    found = chatted(client, stop=["square", "nothing"]).choices[0]
    assert found.message.content == ANSWER.partition("square")[0]
    assert (found.finish_reason, found.stop_reason) == ("stop", "square")
    kept = chatted(client, stop="square", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == ANSWER.partition(" root")[0]


def test_max_tokens_ends_with_length(client: OpenAI) -> None:
    found = chatted(client, max_tokens=3)
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 3)
    found = chatted(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=2)
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 2)


# --- log-probabilities -------------------------------------------------------------------------


def test_echo_begins_with_the_prompt_whose_first_token_has_no_logprob(client: OpenAI) -> None:
    plain = completed(client, "x = 1", max_tokens=4).choices[0].text
    (found,) = completed(client, "x = 1", max_tokens=4, echo=True, logprobs=2).choices
    assert found.text == "x = 1" + plain
    logprobs = found.logprobs
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
    sizes = {len(getattr(logprobs, name)) for name in ("tokens", "text_offset", "token_logprobs")}
    assert len(sizes) == 1
    pieces = zip(logprobs.tokens[1:], logprobs.text_offset[1:], strict=True)
    assert all(found.text.startswith(token, offset) for token, offset in pieces)


def test_echo_of_no_new_token_scores_the_prompt_alone(client: OpenAI, server: Served) -> None:
    ids = server.ask("POST", "/tokenize", {"prompt": "x = 1"}).json["tokens"]
    (found,) = completed(client, "x = 1", max_tokens=0, echo=True, logprobs=1).choices
    assert found.text == "x = 1"
    assert len(found.logprobs.token_logprobs) == len(ids)
    longer = completed(client, "x = 1", max_tokens=4, echo=True, logprobs=1).choices[0].logprobs
    assert longer.token_logprobs[: len(ids)] == pytest.approx(
        found.logprobs.token_logprobs, abs=1e-4
    )


def test_chat_logprobs_name_the_likeliest_tokens_first(client: OpenAI) -> None:
    (choice,) = chatted(client, logprobs=True, top_logprobs=3).choices
    tokens = choice.logprobs.content
    assert "".join(one.token for one in tokens).startswith(ANSWER)
    for one in tokens:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token  # greedy
        assert bytes(one.bytes).decode() == one.token
        values = [top.logprob for top in one.top_logprobs]
        assert values == sorted(values, reverse=True)
    (bare,) = chatted(client, logprobs=True).choices
    assert all(one.top_logprobs == [] for one in bare.logprobs.content)


# --- streams -----------------------------------------------------------------------------------

STREAMED = [
    {},
    {"seed": 5, "temperature": 1.3},
    {"seed": 5, "temperature": 1.3, "n": 2},
    {"stop": ["quare", "oo", "(", "e"]},
    {"stop": "e", "n": 2, "seed": 1, "temperature": 2, "presence_penalty": 1},
    {"max_tokens": 1},
]


@pytest.mark.parametrize("settings", STREAMED, ids=str)
def test_a_chat_streams_the_text_that_it_gives_at_once(
    client: OpenAI, settings: dict[str, Any]
) -> None:
    whole = chatted(client, **settings)
    chunks = list(chatted(client, **settings, stream=True))
    num = settings.get("n", 1)
    check_finish_reasons(chunks, num)
    assert texts(chunks) == {it.index: it.message.content for it in whole.choices}
    for index in range(num):
        first = next(it for chunk in chunks for it in chunk.choices if it.index == index)
        assert (first.delta.role, first.delta.content) == ("assistant", "")
    last = {it.index: it for chunk in chunks for it in chunk.choices}
    for choice in whole.choices:
        ended = last[choice.index]
        assert (ended.finish_reason, ended.stop_reason) == (
            choice.finish_reason,
            choice.stop_reason,
        )
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("settings", [*STREAMED, {"echo": True, "logprobs": 1}], ids=str)
def test_a_completion_streams_the_text_that_it_gives_at_once(
    client: OpenAI, settings: dict[str, Any]
) -> None:
    prompts = ["import ", "def sqrt(x):"]
    whole = completed(client, prompts, **settings)
    chunks = list(completed(client, prompts, **settings, stream=True))
    check_finish_reasons(chunks, len(whole.choices))
    assert texts(chunks) == {choice.index: choice.text for choice in whole.choices}


def test_streamed_logprobs_are_those_of_the_whole_answer(client: OpenAI) -> None:
    settings: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    whole = chatted(client, **settings).choices[0].logprobs.content
    chunks = chatted(client, **settings, stream=True)
    found = [
        one
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
        for one in choice.logprobs.content
    ]
    assert [one.token for one in found] == [one.token for one in whole]
    assert [one.logprob for one in found] == pytest.approx([it.logprob for it in whole], abs=1e-4)


def test_usage_comes_last_in_a_chunk_without_choices_where_it_is_asked_for(client: OpenAI) -> None:
    whole = chatted(client).usage
    *others, last = chatted(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == whole.completion_tokens
    assert last.usage.prompt_tokens == whole.prompt_tokens
    assert all(chunk.choices and chunk.usage is None for chunk in others)


def test_continuous_usage_grows_with_every_chunk(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(completed(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 24
    assert chunks[-1].choices == []


def test_done_is_the_last_event_of_a_stream(server: Served) -> None:
    body = {"prompt": "import ", "max_tokens": 3, "stream": True}
    found = server.ask("POST", "/v1/completions", body)
    assert found.headers["content-type"].startswith("text/event-stream")
    events = found.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_stream_options_without_a_stream_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stream_options needs stream"):
        chatted(client, stream_options={"include_usage": True})


# --- structured outputs ------------------------------------------------------------------------

COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def test_a_json_schema_is_kept(client: OpenAI) -> None:
    schema = {"name": "colours", "schema": COLOURS, "strict": True}
    form: Any = {"type": "json_schema", "json_schema": schema}
    found = json.loads(chatted(client, response_format=form).choices[0].message.content)
    assert found["colour"] in ("red", "green")
    streamed = texts(list(chatted(client, response_format=form, stream=True)))
    assert json.loads(streamed[0]) == found


def test_a_json_object_is_one(client: OpenAI) -> None:
    found = chatted(client, response_format={"type": "json_object"}, max_tokens=200, seed=1)
    (choice,) = found.choices
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("structure", "possible"),
    [
        ({"regex": "(ab|cd){2}"}, ["abab", "abcd", "cdab", "cdcd"]),
        ({"choice": ["yes", "no"]}, ["yes", "no"]),
        ({"grammar": 'root ::= "one" | "two"'}, ["one", "two"]),
        ({"json": COLOURS}, ['{"colour": "red"}', '{"colour": "green"}']),
    ],
    ids=str,
)
def test_structured_outputs_are_of_their_form(
    client: OpenAI, structure: dict[str, Any], possible: list[str]
) -> None:
    more = {"structured_outputs": structure}
    assert chatted(client, extra_body=more).choices[0].message.content in possible
    assert completed(client, extra_body=more).choices[0].text in possible


# --- tools -------------------------------------------------------------------------------------


def called(found: Any) -> list[tuple[str, Any]]:
    calls = found.choices[0].message.tool_calls
    assert all(call.type == "function" and call.id.startswith("call_") for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def called_in_stream(chunks: Sequence[Any]) -> list[tuple[str, Any]]:
    names: dict[int, str] = {}
    arguments: dict[int, str] = defaultdict(str)
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert not choice.delta.content
        for piece in choice.delta.tool_calls or []:
            if piece.id is not None:
                assert piece.index not in names, "a call's name comes once"
                names[piece.index] = piece.function.name
            arguments[piece.index] += piece.function.arguments or ""
    return [(names[index], json.loads(arguments[index])) for index in sorted(names)]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_tool_that_must_be_called_is_called(client: OpenAI, choice: Any) -> None:
    settings = {
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 100,
    }
    found = chatted(client, **settings)
    ((name, given),) = called(found)
    assert name == "weather"
    assert given["city"] in ("Paris", "Rome")
    assert given["days"] in (1, 2)
    assert not found.choices[0].message.content
    expected = "tool_calls" if choice == "required" else "stop"
    assert found.choices[0].finish_reason == expected
    chunks = list(chatted(client, **settings, stream=True))
    check_finish_reasons(chunks, 1)
    assert called_in_stream(chunks) == [(name, given)]
    assert chunks[-1].choices[0].finish_reason == expected


def test_tools_without_a_known_style_are_refused_or_left_out(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        chatted(client, tools=[WEATHER])
    assert chatted(client, tools=[WEATHER], tool_choice="none").choices[0].message.content == ANSWER


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        (
            {
                "tools": [WEATHER, CLOCK],
                "tool_choice": {"type": "function", "function": {"name": "other"}},
            },
            "the tools are weather, clock",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": ""}}], "tool_choice": "required"},
            "tools.0.function.name",
        ),
    ],
    ids=str,
)
def test_tools_that_cannot_be_called_are_refused(
    client: OpenAI, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=complaint):
        chatted(client, **settings)


# --- errors ------------------------------------------------------------------------------------


def test_errors_are_exceptions_with_the_field_that_is_wrong(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        completed(client, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        completed(client, "word " * 3000)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_none_is_refused_before_anything_streams(
    client: OpenAI, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match="structured outputs"):
        chatted(client, stream=stream, extra_body={"structured_outputs": {"regex": "("}})


def test_prompt_logprobs_are_whole_and_not_streamed(client: OpenAI) -> None:
    body = {"prompt_logprobs": 1}
    (choice,) = completed(client, max_tokens=1, extra_body=body).choices
    told = choice.prompt_logprobs
    assert told[0] is None
    assert all(len(one) in (1, 2) for one in told[1:])
    assert choice.text == completed(client, max_tokens=1).choices[0].text
    with pytest.raises(openai.BadRequestError, match="not streamed"):
        completed(client, max_tokens=1, stream=True, extra_body=body)


def test_an_echo_with_logprobs_ends_with_the_only_token_of_its_answer(client: OpenAI) -> None:
    one, two = (
        completed(client, max_tokens=count, echo=True, logprobs=1).choices[0] for count in (1, 2)
    )
    assert one.logprobs.tokens == two.logprobs.tokens[:-1]
    assert two.text.startswith(one.text)
    assert len(one.text) > len("".join(one.logprobs.tokens[1:-1])) - 1
