"""Calls in a model's text: the same in whatever pieces it comes, and no text is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bireme.server.tools.parsers import (
    BareCalls,
    FirstCall,
    MarkedCalls,
    NamedCall,
    ToolParser,
    joined,
    parser_of,
    style_of,
)

Call = tuple[str | None, str]
NAMES = ("f", "g")
STYLES: dict[str, Callable[[], ToolParser]] = {
    "hermes": lambda: MarkedCalls(NAMES),
    "llama3_json": lambda: BareCalls(NAMES),
    "list": lambda: BareCalls(NAMES, is_list=True),
    "named": lambda: NamedCall("f"),
    "the first of hermes": lambda: FirstCall(MarkedCalls(NAMES)),
    "the first of llama3_json": lambda: FirstCall(BareCalls(NAMES)),
}


def parts(parser: ToolParser, pieces: Sequence[str]) -> list[str | int]:
    """Content, and the indices of calls, in their order."""
    found: list[str | int] = []
    for parsed in [*map(parser.add, pieces), parser.finish()]:
        for part in parsed.parts:
            if not isinstance(part, str):
                found += [part.index] if part.index not in found else []
            elif found and isinstance(found[-1], str):
                found[-1] += part
            else:
                found.append(part)
    return found


def read(parser: ToolParser, pieces: Sequence[str]) -> tuple[str, list[Call]]:
    """Content, and calls by name and arguments; checks that names and ids come once, in order."""
    parsed = [*map(parser.add, pieces), parser.finish()]
    found = [piece for part in parsed for piece in part.calls]
    begun = [piece.index for piece in found if piece.id is not None]
    assert begun == list(range(len(begun)))
    assert len({piece.id for piece in found if piece.id is not None}) == len(begun)
    assert all((piece.id is None) == (piece.name is None) for piece in found)
    assert [piece.index for piece in found] == sorted(piece.index for piece in found)
    return (
        "".join(part.content for part in parsed),
        [(call.name, call.arguments) for call in joined(found)],
    )


WORDS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<tool_", "call>", "<", "</", "<|python_tag|>", "<|pyt", "{", "}",
        "[", "]", '"', "\\", '\\"', ":", ",", ";", " ", "\n", '"name"', '"arguments"', '"parameters"',
        '"f"', '{"name": "f", "arguments": {', '{"a": [1, {"b": "}"}]}', '"}"', "null", "1.5", "é", "😀", "text",
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        '{"name": "g", "parameters": {"y": "\\"}{"}}',
    ]
)  # fmt: skip
TEXTS = st.lists(WORDS, max_size=14).map("".join)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, data=st.data())
@example('<tool_call>{"name": "f", "arguments": "a text"}</tool_call>', None)
@example('<tool_call>{"name": "f", "arguments": {}} ', None)
@example('{"name": "f", "parameters": {}} and more', None)
def test_any_pieces_of_a_text_give_what_it_gives_at_once(
    style: str, text: str, data: st.DataObject | None
) -> None:
    whole = read(STYLES[style](), [text])
    assert read(STYLES[style](), list(text) or [""]) == whole
    if data is not None and text:
        cuts = sorted(data.draw(st.sets(st.integers(1, len(text)))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(STYLES[style](), pieces) == whole
        assert parts(STYLES[style](), pieces) == parts(STYLES[style](), [text])


@pytest.mark.parametrize("style", ["hermes", "llama3_json"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}')
@example(2 * '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
def test_the_first_call_is_told_as_it_is_beside_others(style: str, text: str) -> None:
    content, calls = read(STYLES[style](), [text])
    assert read(STYLES[f"the first of {style}"](), [text]) == (content, calls[:1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=5), JSON, max_size=3)
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(CALLS, st.booleans(), st.sampled_from(["", "Let me see."]), st.sampled_from([None, 2]))
def test_calls_as_hermes_writes_them_are_read_back(
    calls: list[tuple[str, dict[str, object]]], is_ascii: bool, before: str, indent: int | None
) -> None:
    written = [
        json.dumps({"name": name, "arguments": given}, ensure_ascii=is_ascii, indent=indent)
        for name, given in calls
    ]
    text = before + "".join(f"\n<tool_call>\n{one}\n</tool_call>" for one in written)
    content, found = read(MarkedCalls({name for name, _ in calls}), list(text))
    assert content == before
    assert [(name, json.loads(given)) for name, given in found] == calls


@settings(max_examples=150, deadline=None)
@given(CALLS, st.sampled_from(["", "<|python_tag|>"]), st.sampled_from(["; ", ";", ", ", "\n"]))
def test_calls_as_llama_writes_them_are_read_back(
    calls: list[tuple[str, dict[str, object]]], prefix: str, between: str
) -> None:
    written = [json.dumps({"name": name, "parameters": given}) for name, given in calls]
    names = {name for name, _ in calls}
    content, found = read(BareCalls(names), list(prefix + between.join(written)))
    assert content == ""
    assert [(name, json.loads(given)) for name, given in found] == calls
    assert read(BareCalls(names, is_list=True), ["[" + ", ".join(written) + "]"]) == ("", found)


@pytest.mark.parametrize("style", ["hermes", "llama3_json"])
@pytest.mark.parametrize(
    "text",
    [
        "Hello there.",
        "a < b and {c}",
        "<tool_call>",
        "<tool_call> no object </tool_call>",
        '<tool_call>{"other": 1}</tool_call>',
        "<tool_",
        "",
        "say \n\n",
        "[1, 2]",
    ],
)
def test_a_text_without_calls_is_content(style: str, text: str) -> None:
    content, calls = read(parser_of(style, NAMES), list(text))
    assert (content, calls) == (text, [])


@pytest.mark.parametrize("style", ["hermes", "llama3_json"])
def test_an_object_that_names_no_function_is_content(style: str) -> None:
    text = '{"city": "Paris"}'
    assert read(parser_of(style, NAMES), list(text)) == (text, [])


@pytest.mark.parametrize("style", ["hermes", "llama3_json"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(' <|python_tag|> {"name": "f", "parameters": {}} ')
@example('say <tool_call> {"name": "f", "arguments": {}} </tool_call>')
@example('<tool_call>{"name": "f"</tool_')
def test_no_text_is_lost_where_nothing_calls_a_tool(style: str, text: str) -> None:
    assert read(parser_of(style, ()), list(text)) == (text, [])


def test_an_object_with_a_name_is_no_call_without_arguments_or_of_no_tool() -> None:
    for text in ('{"name": "f", "age": 3}', '{"name": "Bob", "parameters": {}}', '{"name": "f"}'):
        assert read(BareCalls(NAMES), list(text)) == (text, [])
        called = '{"name": "g", "parameters": {}}'
        assert read(BareCalls(NAMES), list(f"{called}\n{text}")) == (f"\n{text}", [("g", "{}")])
    text = '<tool_call>{"name": "Bob", "arguments": {}}</tool_call>'
    assert read(MarkedCalls(NAMES), list(text)) == (text, [])


def test_content_and_calls_come_in_their_order() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"before {call} between {call} after"
    expected = ["before", 0, " between", 1, " after"]
    assert parts(MarkedCalls(NAMES), [text]) == parts(MarkedCalls(NAMES), list(text)) == expected


@pytest.mark.parametrize(
    "written", ['{"name": "f"}', '{"name": "f", "arguments": null}', '{"name": "f", "arguments": ""}']
)  # fmt: skip
def test_a_call_without_arguments_has_none_of_them(written: str) -> None:
    text = f"<tool_call>{written}</tool_call>"
    assert read(MarkedCalls(NAMES), list(text)) == ("", [("f", "{}")])


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1}\n', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": "</tool_call>"', '{"a": "</tool_call>"'),
        ('{"name": "f", "arguments": {"a": 1 </tool_', '{"a": 1 </tool_'),
        ('{"name": "f"', "{}"),
    ],
)
def test_the_closing_mark_ends_a_call_that_is_not_closed(written: str, arguments: str) -> None:
    text = f"<tool_call>{written}</tool_call> after"
    assert read(MarkedCalls(NAMES), list(text)) == (" after", [("f", arguments)])


def test_text_around_calls_is_content() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    content, calls = read(MarkedCalls(NAMES), [f"before {call} between {call} after"])
    assert content.split() == ["before", "between", "after"]
    assert calls == [("f", "{}")] * 2
    assert read(BareCalls(NAMES), [f"{call[11:-12]} and more"]) == (" and more", [("f", "{}")])


def test_an_unfinished_call_is_told_as_far_as_it_came() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": "unfin'
    assert read(MarkedCalls(NAMES), list(text)) == ("", [("f", '{"x": "unfin')])
    assert read(BareCalls(NAMES), list(text[11:])) == ("", [("f", '{"x": "unfin')])


def test_arguments_written_as_a_text_are_what_it_holds() -> None:
    inner = json.dumps({"x": '"}'})
    text = json.dumps({"name": "f", "arguments": inner})
    assert read(MarkedCalls(NAMES), [f"<tool_call>{text}</tool_call>"])[1] == [("f", inner)]
    assert read(BareCalls(NAMES), list(text))[1] == [("f", inner)]


def test_arguments_may_come_before_the_name() -> None:
    text = '{"parameters": {"x": [1, {"y": 2}]}, "name": "f"}'
    assert read(BareCalls(NAMES), list(text))[1] == [("f", '{"x": [1, {"y": 2}]}')]


def test_of_two_names_or_arguments_the_first_counts() -> None:
    text = '{"name": "f", "arguments": {"x": 1}, "name": "g", "parameters": {"y": 22222}}'
    for pieces in ([text], list(text)):
        assert read(BareCalls(NAMES), pieces)[1] == [("f", '{"x": 1}')]


@pytest.mark.parametrize(
    ("template", "wanted", "style"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "auto", "hermes"),
        ("{% if tools %}<|python_tag|>{% endif %}", "auto", "llama3_json"),
        ("{{ messages }}", "auto", None),
        (None, "auto", None),
        (None, "hermes", "hermes"),
        ("{% if tools %}<tool_call>{% endif %}", "none", None),
    ],
)
def test_the_style_is_the_chat_templates_unless_it_is_given(
    template: str | None, wanted: str, style: str | None
) -> None:
    assert style_of(template, wanted) == style
