"""What a route makes of what the engine says, event by event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from bireme.checkpoint.hub import resolve_model
from bireme.engine.callers import Callers
from bireme.engine.engine import TokenEvent
from bireme.engine.input_processor import InputProcessor, ServedModel
from bireme.errors import RequestError
from bireme.outputs import Delta, Logprob
from bireme.request import PromptLogprobs, TokenLogprobs
from bireme.sampling_params import SamplingParams
from bireme.server.completions import CompletionReply
from bireme.server.errors import ApiError, FieldNames
from bireme.server.exchange import Exchange
from bireme.server.finished import FinishedRequest
from bireme.server.generation import Generation, joined
from bireme.server.logprobs import chat_logprobs
from bireme.server.metrics import ServerMetrics
from bireme.server.protocol.common import Usage
from bireme.server.protocol.completions import CompletionRequest
from bireme.server.protocol.responses import ResponsesRequest
from bireme.server.response_input import as_chat
from bireme.server.responses import ResponsesReply
from bireme.server.tools.choice import tool_use
from bireme.server.tracing import Tracer
from bireme.server.usage import UsageOf

DEMO = resolve_model("demo")
INPUTS = InputProcessor(ServedModel("demo", DEMO, 2048, 1024, frozenset({2})))
LIKELY = TokenLogprobs(-1.0, 1, [], [])


class Engine:
    """Stands behind the callers of one server, and says what a test lets it."""

    def __init__(self, prompt: str | Sequence[int], **params: Any) -> None:
        self.callers, self.asked = Callers(), []  # type: ignore[var-annotated]
        self.callers.begin(INPUTS, self.asked.append, 100, 10_000)
        self.opened = INPUTS.open(0, prompt, SamplingParams(**params))
        self.ids = [request.request_id for request, _ in self.opened.requests]
        self.exchange = Exchange("id", "POST", "/v1/completions", "client")
        self.serving: Any = SimpleNamespace(
            client=SimpleNamespace(callers=self.callers),
            inputs=INPUTS,
            metrics=ServerMetrics("demo"),
            tracer=Tracer(),
        )

    def generation(self) -> Generation:
        return Generation(self.serving, self.exchange, [self.opened])

    def say(
        self,
        choice: int,
        token_ids: Sequence[int],
        reason: str | None = None,
        why: str | None = None,
        prompt: PromptLogprobs | None = None,
    ) -> None:
        likely = [LIKELY for _ in token_ids]
        event = TokenEvent(
            self.ids[choice], list(token_ids), reason, why, 1.0, likely, prompt
        )  # fmt: skip
        self.callers.deliver([event])


def on_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "last"])
def test_an_error_comes_behind_what_came_with_it(bad: int) -> None:
    async def work() -> None:
        engine = Engine("x", n=3, max_tokens=9)
        generation = engine.generation()
        for choice in (bad, *({0, 1, 2} - {bad})):
            if choice == bad:
                engine.say(choice, [], "error", "too many states")
            else:
                engine.say(choice, [300, 301], "stop")
        deltas = await generation.take()
        assert [(it.choice, it.finish_reason) for it in deltas] == [
            (choice, "stop") for choice in range(3) if choice != bad
        ]
        assert generation.outputs[0].finished
        assert not generation.is_finished
        with pytest.raises(RequestError, match="too many states"):
            await generation.take()

    on_loop(work)


def test_an_error_that_comes_alone_is_raised_at_once() -> None:
    async def work() -> None:
        engine = Engine("x", max_tokens=9)
        generation = engine.generation()
        engine.say(0, [], "error", "too many states")
        with pytest.raises(RequestError, match="too many states"):
            await generation.take()

    on_loop(work)


class Spans(Tracer):
    """Keeps what it is told of requests."""

    def __init__(self) -> None:
        self.requests: list[FinishedRequest] = []

    def note(self, _id: str, _params: Any, request: FinishedRequest, _headers: Any) -> None:
        self.requests.append(request)


@pytest.mark.parametrize("num", [1, 2])
def test_a_request_that_failed_has_ended_with_its_error(num: int) -> None:
    async def work() -> None:
        engine = Engine("x", n=num, max_tokens=9)
        engine.serving.tracer = spans = Spans()
        generation = engine.generation()
        engine.say(0, [300])
        await generation.take()
        engine.say(0, [], "error", "too many states")
        with pytest.raises(RequestError) as caught:
            await generation.take()
        generation.note_error(caught.value)
        generation.close()
        ((reason, error),) = [(it.finished_reason, it.error) for it in spans.requests]
        assert (reason, error) == ("error", "too many states")

    on_loop(work)


def test_a_request_of_which_one_choice_failed_has_failed() -> None:
    async def work() -> None:
        engine = Engine("x", n=2, max_tokens=9)
        engine.serving.tracer = spans = Spans()
        generation = engine.generation()
        engine.say(0, [300], "stop")
        engine.say(1, [300], "error", "too many states")
        await generation.take()
        assert [(it.finished_reason, it.error) for it in spans.requests] == [
            ("error", "too many states")
        ]

    on_loop(work)


# --- completions -------------------------------------------------------------------------------


def reply_to(engine: Engine, generation: Generation, **wanted: Any) -> CompletionReply:
    asked = CompletionRequest(prompt="x", stream=True, **wanted)
    reply = CompletionReply(
        engine.serving,
        engine.exchange,
        asked,
        UsageOf(True, True),
        FieldNames("prompt", "response_format"),
    )
    assert reply.begin(generation.answers) == b""
    return reply


def choices(events: bytes) -> list[dict[str, Any]]:
    told = [json.loads(it[6:]) for it in events.decode().split("\n\n") if it.startswith("data: {")]
    return [choice for one in told for choice in one.get("choices", ())]


def usages(events: bytes) -> list[dict[str, Any]]:
    told = [json.loads(it[6:]) for it in events.decode().split("\n\n") if it.startswith("data: {")]
    return [one["usage"] for one in told if one.get("usage")]


USAGE = Usage.of(1, 2, 0)


def test_an_error_of_a_grammar_names_the_field_that_asked_for_it() -> None:
    async def work() -> None:
        engine = Engine("x", max_tokens=9)
        reply = reply_to(engine, engine.generation())
        why = RequestError("the grammar cannot be followed any further: too complex")
        told = json.loads(reply.failed(ApiError.of(why)).split(b"\n\n")[0][6:])
        assert told["error"]["param"] == "response_format"

    on_loop(work)


@pytest.mark.parametrize("is_failed", [False, True])
def test_an_echo_loses_nothing_though_its_prompt_is_never_scored(is_failed: bool) -> None:
    async def work() -> None:
        engine = Engine("x = 1", n=2, max_tokens=9, logprobs=0, prompt_logprobs=0)
        generation = engine.generation()
        reply = reply_to(engine, generation, n=2, echo=True, logprobs=0)
        engine.say(1, [300, 301], "stop")
        engine.say(0, [], "abort")
        deltas = await generation.take()
        early = b"".join(reply.add(delta, lambda: USAGE) for delta in deltas)
        late = reply.failed(ApiError(400, "no")) if is_failed else reply.end(USAGE)
        assert early == b""
        found = choices(late)
        assert [(it["index"], it["finish_reason"]) for it in found] == [(1, "stop"), (0, "abort")]
        assert found[0]["text"] == "x = 1" + INPUTS.tokenizer.decode([300, 301])
        assert late.endswith(b"data: [DONE]\n\n")

    on_loop(work)


def test_an_echo_of_no_new_token_bills_none() -> None:
    async def work() -> None:
        engine = Engine("x", max_tokens=1)
        generation = engine.generation()
        reply = reply_to(engine, generation, echo=True, max_tokens=0)
        engine.say(0, [300], "length")
        (delta,) = await generation.take()
        events = reply.add(delta, generation.usage) + reply.end(generation.usage())
        assert [it["completion_tokens"] for it in usages(events)] == [0, 0]
        whole = json.loads(reply.whole(generation.outputs, generation.usage()))
        assert (whole["usage"]["completion_tokens"], whole["usage"]["total_tokens"]) == (0, 2)

    on_loop(work)


SPLIT = "é = '日本 🚣'  # naïve"


def logprobs_of(
    prompt: str | list[int], pieces: Sequence[Sequence[int]], **more: Any
) -> dict[str, Any]:
    """Of one answer that comes in `pieces`, its chunks joined."""
    found: dict[str, Any] = {"text": "", "text_offset": [], "tokens": [], "top_logprobs": []}

    async def work() -> None:
        engine = Engine(prompt, max_tokens=900, logprobs=0, prompt_logprobs=0, **more)
        generation = engine.generation()
        reply = reply_to(engine, generation, echo=True, logprobs=0)
        scores = PromptLogprobs(0, 1, [LIKELY] * (engine.opened.stream.num_prompt_tokens - 1))
        for index, ids in enumerate(pieces):
            is_last = index == len(pieces) - 1
            engine.say(0, ids, "length" if is_last else None, None, None if index else scores)
            for delta in await generation.take():
                for choice in choices(reply.add(delta, lambda: USAGE)):
                    found["text"] += choice["text"]
                    for name in ("text_offset", "tokens", "top_logprobs"):
                        found[name] += choice["logprobs"][name]
        whole = json.loads(reply_to(engine, generation, echo=True, logprobs=0).whole(
            generation.outputs, USAGE
        ))["choices"][0]  # fmt: skip
        assert found["text"] == whole["text"]
        assert {name: found[name] for name in ("text_offset", "tokens", "top_logprobs")} == {
            name: whole["logprobs"][name] for name in ("text_offset", "tokens", "top_logprobs")
        }

    on_loop(work)
    return found


@pytest.mark.parametrize("is_text", [True, False])
def test_a_character_of_several_tokens_leaves_offsets_in_place(is_text: bool) -> None:
    ids = INPUTS.tokenizer.encode(SPLIT, add_special_tokens=False)
    assert len(ids) > len(SPLIT), "every character is several tokens, or there is nothing to test"
    found = logprobs_of(SPLIT if is_text else ids, [[id_] for id_ in ids])
    assert found["text"] == SPLIT * 2
    assert found["text_offset"] == sorted(found["text_offset"])
    named = list(zip(found["tokens"], found["text_offset"], strict=True))
    spelled = [(it, at) for it, at in named if "\ufffd" not in it and not it.startswith("<|")]
    assert len(spelled) > len(SPLIT)
    assert all(found["text"].startswith(token, at) for token, at in spelled)
    assert [at for token, at in named if token == "é"] == [0, len(SPLIT)]
    chosen = [next(iter(top)) for top in found["top_logprobs"] if top]
    assert chosen == found["tokens"][-len(chosen) :]


def test_offsets_behind_a_special_token_that_is_typed_are_in_place() -> None:
    found = logprobs_of("a<|end|>b = 1", [[300]])
    assert found["text"].startswith("a<|end|>b = 1")
    at = found["text_offset"][found["tokens"].index("<|end|>")]
    assert (at, found["text_offset"][-1]) == (1, len("a<|end|>b = 1"))
    assert found["text_offset"][found["tokens"].index("<|end|>") + 1] == 1 + len("<|end|>")


def test_a_stop_string_moves_no_offset() -> None:
    ids = INPUTS.tokenizer.encode("one two", add_special_tokens=False)
    found = logprobs_of("x", [[id_] for id_ in ids], stop=["e two"])
    named = list(zip(found["tokens"], found["text_offset"], strict=True))
    assert found["text"] == "xon"
    assert all("xone two".startswith(token, at) for token, at in named[1:])


# --- chats -------------------------------------------------------------------------------------


def test_bytes_of_tokens_are_those_of_the_text_where_a_character_is_several() -> None:
    ids = INPUTS.tokenizer.encode(SPLIT, add_special_tokens=False)
    tokens = [{id_: Logprob(-1.0, 1, INPUTS.tokenizer.name_of(id_))} for id_ in ids]
    found = chat_logprobs(tokens, 1, INPUTS.tokenizer).content
    assert b"".join(bytes(it.bytes or ()) for it in found) == SPLIT.encode()
    assert all(it.top_logprobs[0].bytes == it.bytes for it in found)
    assert any("\ufffd" in it.token for it in found)


# --- responses ---------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call>'
F = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def items_of(
    text: str, num_together: int | None, choice: Any = "auto", **params: Any
) -> list[dict[str, Any]]:
    """The items of an answer with log-probabilities, streamed so many tokens at a time, or whole."""
    body = {"input": "x", "tools": [F], "tool_choice": choice, "top_logprobs": 1, "stream": True}
    wanted = ResponsesRequest.model_validate(body)
    ids = INPUTS.tokenizer.encode(text, add_special_tokens=False)
    found: list[dict[str, Any]] = []

    async def work() -> None:
        engine = Engine("x", max_tokens=900, logprobs=1, **params)
        generation = engine.generation()
        chat = as_chat(wanted)
        tools, names = tool_use(chat, "hermes"), FieldNames("input", "text")
        reply = ResponsesReply(engine.exchange, wanted, chat, tools, names, INPUTS.tokenizer)
        events = reply.begin(generation.answers)
        step = num_together or len(ids) or 1
        pieces = [ids[at : at + step] for at in range(0, len(ids), step)]
        for piece in [*pieces, [2]]:
            if generation.is_finished:
                break
            engine.say(0, piece, "stop" if piece == [2] else None)
            for delta in await generation.take():
                if num_together:
                    events += reply.add(delta, lambda: USAGE)
        events += reply.end(USAGE)
        told = [it.split(b"data: ")[1] for it in events.split(b"\n\n")[:-1]]
        response = json.loads(told[-1])["response"]
        if num_together is None:
            response = json.loads(reply.whole(generation.outputs, USAGE))
        found.extend(response["output"])

    on_loop(work)
    return found


def told_of(items: Sequence[dict[str, Any]]) -> list[Any]:
    """Texts with their tokens, and calls."""
    return [
        (item["name"], item["arguments"])
        if item["type"] == "function_call"
        else (item["content"][0]["text"], [it["token"] for it in item["content"][0]["logprobs"]])
        for item in items
    ]


@pytest.mark.parametrize(
    "text",
    [
        "plain é 日本",
        CALL,
        f"Let me see.\n{CALL}",
        f"é {CALL} and {CALL}{CALL} é",
        "<tool_call>é",
        "",
    ],
)
def test_items_are_the_same_however_an_answer_comes(text: str) -> None:
    whole = told_of(items_of(text, None))
    assert all(told_of(items_of(text, step)) == whole for step in (1, 2, 5))
    assert [it for it in whole if it[0] == "f"] == [("f", '{"a": "é"}')] * text.count(CALL)


def test_tokens_of_calls_are_in_no_message() -> None:
    before, call, after = told_of(items_of(f"one two {CALL} three", 1))
    assert "".join(before[1]).rstrip() == before[0] == "one two"
    assert call == ("f", '{"a": "é"}')
    assert after[0] == " three"
    assert not any("name" in token for token in after[1])


def test_a_call_that_must_be_made_is_the_only_item() -> None:
    text = '[{"name": "f", "parameters": {"a": 1}}]'
    for step in (1, 3, None):
        assert told_of(items_of(text, step, "required")) == [("f", '{"a": 1}')]


def test_a_stop_string_leaves_the_tokens_with_their_text() -> None:
    whole = told_of(items_of("one two three", None, stop=["two"]))
    assert whole[0][0] == "one "
    assert told_of(items_of("one two three", 1, stop=["two"])) == whole


def test_deltas_of_a_continuation_that_follow_one_another_become_one() -> None:
    first, second = Delta(0, "a", [1], None), Delta(0, "b", [2], None, finish_reason="stop")
    other = Delta(0, "c", [3], None, choice=1)
    assert joined([first, second, other]) == [
        Delta(0, "ab", [1, 2], None, finish_reason="stop"),
        other,
    ]
