"""Whatever a client sends: a clear 4xx or a closed connection, and the requests beside it go on unharmed."""

from __future__ import annotations

import json
import re
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from served import Answer, Served
from streaming import COMPLETIONS, LONG, Streaming, connect, post

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


# --- beside a stream ---------------------------------------------------------------------------


class Beside:
    """One stream after another, all the time; each gives what it gives alone."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._expected = Streaming(server).tokens()
        assert len(self._expected) == LONG["max_tokens"]
        self._is_over = threading.Event()
        self._failures: list[str] = []
        self._num_done = 0
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    def _go_on(self) -> None:
        while not self._is_over.is_set():
            try:
                is_same = Streaming(self._server).tokens() == self._expected
            except Exception as error:
                self._failures.append(repr(error))
            else:
                self._failures += [] if is_same else ["other tokens"]
            self._num_done += 1

    def check(self) -> None:
        assert not self._failures

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()
        assert self._num_done
        self.check()


@pytest.fixture(scope="module")
def beside(server: Served) -> Iterator[Beside]:
    found = Beside(server)
    yield found
    found.end()


@pytest.fixture(autouse=True)
def _unharmed(server: Served, beside: Beside) -> Iterator[None]:
    yield
    beside.check()
    assert server.ask("GET", "/health").status == 200


# --- raw sockets -------------------------------------------------------------------------------


def all_of(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    found = b""
    try:
        while data := sock.recv(1 << 16):
            found += data
    except ConnectionError:
        pass
    return found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def next_status(sock: socket.socket) -> int:
    """Of one whole answer on a connection that stays open."""
    response = HTTPResponse(sock)
    response.begin()
    response.read()
    return response.status


def error_of(answer: bytes) -> dict[str, Any]:
    return Answer(0, {}, answer.partition(b"\r\n\r\n")[2]).error


# --- bodies that are no JSON or of the wrong shape ---------------------------------------------

DEEP = 100_000
BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[1]",
    "a text": b'"x"',
    "null": b"null",
    "behind it": b'{"prompt": "x"} x',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "a huge float": b'{"prompt": "x", "temperature": 1e999}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a zero byte": b'{"prompt": "x"}\0',
    "deep lists": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"prompt": "x", "u": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "half a character in model": rb'{"model": "\ud800", "prompt": "x"}',
    "half a character in prompt": rb'{"prompt": "\ud800"}',
    "half a character in stop": rb'{"prompt": "x", "stop": ["\udfff"]}',
    "half a character in user": rb'{"prompt": "x", "user": "\ud83d"}',
    "half a character in metadata": rb'{"prompt": "x", "metadata": {"\ud83d": 1}}',
    "half a character in an unknown field": rb'{"prompt": "x", "\ud83d": 1}',
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_json_object_is_refused(server: Served, name: str) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        found = server.ask("POST", path, BODIES[name])
        assert found.status == 400, path
        assert found.error["type"] == "invalid_request_error"
        assert len(found.body) < 2000


def test_a_half_character_in_a_tool_or_a_message_is_refused_and_named(server: Served) -> None:
    tool = rb'"tools": [{"type": "function", "function": {"name": "\ud800"}}]'
    for more in (tool, rb'"tool_choice": "\ud800"'):
        body = b'{"messages": [{"role": "user", "content": "x"}], ' + more + b"}"
        assert server.ask("POST", CHAT, body).status == 400
    body = rb'{"messages": [{"role": "user", "content": "\ud800"}]}'
    assert "surrogate" in server.ask("POST", CHAT, body).error["message"]


def test_a_body_of_another_kind_is_told_what_is_needed(server: Served) -> None:
    for kind in (
        "application/x-www-form-urlencoded",
        "text/plain",
        "multipart/form-data; boundary=x",
    ):
        found = server.ask("POST", COMPLETIONS, b'{"prompt": "x"}', {"Content-Type": kind})
        assert found.status == 400
        assert "application/json" in found.error["message"]


# --- fields ------------------------------------------------------------------------------------

BIG = 10**30
FIELDS: list[tuple[str, Any]] = [
    ("n", 0), ("n", -1), ("n", 129), ("n", BIG), ("n", 1.5), ("n", "1"), ("n", True),
    ("max_tokens", -1), ("max_tokens", BIG), ("max_tokens", "5"), ("max_tokens", 5000),
    ("temperature", -0.1), ("temperature", 1e6), ("temperature", "hot"), ("temperature", BIG),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", BIG), ("min_p", 2),
    ("frequency_penalty", 3), ("presence_penalty", -3), ("repetition_penalty", 0),
    ("stop", ""), ("stop", [""]), ("stop", ["x"] * 65), ("stop", "x" * 2000), ("stop", [1]),
    ("stop_token_ids", [-1]), ("stop_token_ids", [BIG]), ("stop_token_ids", ["1"]),
    ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"99999999": 1}),
    ("logit_bias", {"1": 101}), ("logit_bias", {"1": "x"}), ("logit_bias", {str(BIG): 1}),
    ("logit_bias", {str(i): 1 for i in range(2000)}), ("logit_bias", [1]),
    ("min_tokens", -1), ("min_tokens", 100), ("priority", BIG), ("priority", 10**7),
    ("seed", 1.5), ("seed", "x"), ("stream", "yes"), ("stream", 1), ("user", 5), ("model", 5),
    ("stream_options", {"include_usage": True}), ("stream_options", 1),
    ("response_format", {"type": "json_schema"}), ("response_format", {"type": "xml"}),
    ("response_format", "json"), ("prompt_logprobs", 21), ("prompt_logprobs", -1),
    ("structured_outputs", {}), ("structured_outputs", {"regex": "a", "choice": ["b"]}),
    ("structured_outputs", {"choice": []}), ("structured_outputs", {"choice": [""]}),
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_field_out_of_its_range_is_refused(server: Served, path: str) -> None:
    base = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    for name, value in FIELDS:
        found = server.ask("POST", path, {"max_tokens": 4, **base, name: value})
        assert found.status == 400, (name, value, found.body)
        assert len(found.error["message"]) < 500


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"logprobs": 21}), (COMPLETIONS, {"logprobs": -1}), (COMPLETIONS, {"logprobs": True}),
        (CHAT, {"logprobs": True, "top_logprobs": 21}), (CHAT, {"logprobs": True, "top_logprobs": -1}),
        (CHAT, {"top_logprobs": 2}), (CHAT, {"logprobs": 1}), (CHAT, {"max_tokens": 0}),
        (CHAT, {"chat_template_kwargs": {"messages": []}}),
        (CHAT, {"chat_template_kwargs": {"tools": []}}),
        ("/tokenize", {"messages": HELLO, "chat_template_kwargs": {"add_generation_prompt": 1}}),
        (COMPLETIONS, {"prompt": ""}), (COMPLETIONS, {"prompt": []}), (COMPLETIONS, {"prompt": [[]]}),
        (COMPLETIONS, {"prompt": [""]}), (COMPLETIONS, {"prompt": None}), (COMPLETIONS, {"prompt": {}}),
        (COMPLETIONS, {"prompt": [-1]}), (COMPLETIONS, {"prompt": [10**9]}), (COMPLETIONS, {"prompt": [BIG]}),
        (COMPLETIONS, {"prompt": [1.5]}), (COMPLETIONS, {"prompt": [True]}), (COMPLETIONS, {"prompt": ["x", 1]}),
        (COMPLETIONS, {"prompt": ["x"] * 1025}), (COMPLETIONS, {"suffix": "x"}), (COMPLETIONS, {"best_of": 3}),
        (COMPLETIONS, {"prompt": "word " * 3000}), (COMPLETIONS, {"prompt": [5] * 1024}),
        (COMPLETIONS, {"prompt": "word " * 200_000}),
        (CHAT, {"messages": []}), (CHAT, {"messages": None}), (CHAT, {"messages": {}}), (CHAT, {"messages": "x"}),
        (CHAT, {"messages": [1]}), (CHAT, {"messages": [{"role": "robot", "content": "x"}]}),
        (CHAT, {"messages": [{"content": "x"}]}), (CHAT, {"messages": [{"role": "user", "content": 5}]}),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}),  # the template has no such role
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}),
        (CHAT, {"messages": HELLO, "tools": [{}]}), (CHAT, {"messages": HELLO, "tools": 5}),
        (CHAT, {"messages": HELLO, "tool_choice": "sometimes"}),
        ("/tokenize", {}), ("/tokenize", {"prompt": "x", "messages": HELLO}), ("/tokenize", {"prompt": 5}),
        ("/detokenize", {}), ("/detokenize", {"tokens": ["x"]}), ("/detokenize", {"tokens": [-1]}),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(server: Served, path: str, body: dict[str, Any]) -> None:
    base = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "x"}}.get(path, {})
    found = server.ask("POST", path, {**base, **body})
    assert found.status == 400, found.body
    assert len(found.error["message"]) < 500


TEXT_OR_PARTS = 'must be a text, or a list of parts like {"type": "text", "text": "..."}'
PROMPTS = "must be a text, token ids, or a list of texts or of token ids"


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (COMPLETIONS, {"prompt": 5}, "prompt", f"prompt=5 {PROMPTS}"),
        (COMPLETIONS, {"prompt": None}, "prompt", f"prompt=None {PROMPTS}"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt", f"prompt={{'a': 1}} {PROMPTS}"),
        (COMPLETIONS, {"prompt": ["x", 5]}, "prompt", f"prompt=['x', 5] {PROMPTS}"),
        (COMPLETIONS, {"prompt": [[5, "x"]]}, "prompt", f"prompt=[[5, 'x']] {PROMPTS}"),
        (COMPLETIONS, {}, "prompt", "prompt: Field required"),
        (COMPLETIONS, {"stop": 5}, "stop", "stop=5 must be a text, or a list of texts"),
        (
            COMPLETIONS,
            {"temperature": "x"},
            "temperature",
            "temperature: Input should be a valid number",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content",
            f"messages.0.content=5 {TEXT_OR_PARTS}",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages.0.content.0.type",
            "messages.0.content.0.type: Field required",
        ),
        (
            CHAT,
            {"messages": HELLO, "tool_choice": 5},
            "tool_choice",
            "tool_choice=5 must be none, auto, required, or ",
        ),
        (
            CHAT,
            {"messages": HELLO, "tool_choice": {"type": "function"}},
            "tool_choice.function",
            "tool_choice.function: Field required",
        ),
        (
            CHAT,
            {"messages": [{"role": "robot", "content": 5}]},
            "messages.0.role",
            "messages.0.role: Input should be ",
        ),
        (
            "/v1/responses",
            {"input": [{"role": 5}]},
            "input.0.role",
            "input.0.role: Input should be",
        ),
        ("/v1/responses", {"input": [5]}, "input", "input=[5] must be a text, or a list of items"),
        ("/v1/responses", {"input": 5}, "input", "input=5 must be a text, or a list of items"),
        (
            "/v1/responses",
            {"input": [{"content": 5}]},
            "input.0.content",
            f"input.0.content=5 {TEXT_OR_PARTS}",
        ),
    ],
)
def test_a_field_that_may_be_several_things_is_named_with_them(
    server: Served, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    base = {"prompt": "x"} if path == COMPLETIONS and body.keys() - {"prompt"} else {}
    error = server.ask("POST", path, {**base, **body}).error
    assert error["param"] == param
    assert message in error["message"]
    assert not re.search(r"\.str\b|list\[|literal", error["message"])


REGEX = {"structured_outputs": {"regex": "("}}
BAD = {"type": "no such type"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}
CALLED = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": BAD}}],
    "tool_choice": "required",
}
RESPONSES = "/v1/responses"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
        (COMPLETIONS, REGEX, "structured_outputs"),
        (COMPLETIONS, {"response_format": FORMAT}, "response_format"),
        (COMPLETIONS, {"structured_outputs": {}}, "structured_outputs"),
        (CHAT, {"response_format": FORMAT}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, REGEX, "structured_outputs"),
        (CHAT, CALLED, "tools"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": BAD}}}, "text"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_names_the_field_that_the_client_has_sent(
    server: Served, path: str, body: dict[str, Any], param: str
) -> None:
    base = {COMPLETIONS: {"prompt": "x"}, CHAT: {"messages": HELLO}, RESPONSES: {"input": "x"}}
    for stream in (False, True):
        found = server.ask("POST", path, {**base[path], **body, "stream": stream})
        assert (found.status, found.error["param"]) == (400, param), found.body
        if param.startswith("max"):
            assert f"{param}={body[param]} must be" in found.error["message"]


@pytest.mark.parametrize("text", ["word " * 3000, "word " * 200_000])
@pytest.mark.parametrize(
    ("path", "body_of", "param"),
    [
        (COMPLETIONS, lambda text: {"prompt": text}, "prompt"),
        (COMPLETIONS, lambda text: {"prompt": ["x", text]}, "prompt"),
        (CHAT, lambda text: {"messages": [{"role": "user", "content": text}]}, "messages"),
        (RESPONSES, lambda text: {"input": text}, "input"),
        ("/tokenize", lambda text: {"prompt": text}, "prompt"),
        ("/detokenize", lambda text: {"tokens": [5] * len(text)}, "tokens"),
        ("/tokenize", lambda text: {"messages": [{"role": "user", "content": text}]}, "messages"),
    ],
)
def test_what_is_too_long_for_the_context_is_named(
    server: Served, path: str, body_of: Callable[[str], dict[str, Any]], param: str, text: str
) -> None:
    found = server.ask("POST", path, body_of(text))
    if path == "/tokenize" and found.status == 200:
        return  # it counts more than the context holds
    assert (found.status, found.error["param"]) == (400, param)
    assert found.error["code"] == "context_length_exceeded"


def test_what_is_odd_but_allowed_is_served(server: Served) -> None:
    for more in (
        {"seed": BIG}, {"seed": -5}, {"stop": []}, {"user": "x" * 10_000}, {"metadata": {"a": BIG}},
        {"model": None, "n": None, "stop": None, "temperature": None}, {"top_k": -1},
        {"u" * 5000: 1}, {f"unknown {number}": 1 for number in range(200)}, {"logit_bias": {}},
    ):  # fmt: skip
        found = server.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1, **more})
        assert found.status == 200, (more, found.body)
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "again"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    assert server.ask("POST", CHAT, body).status == 200


# --- grammars ----------------------------------------------------------------------------------

NESTED: dict[str, Any] = {"type": "object"}
for _ in range(150):
    NESTED = {"type": "object", "properties": {"a": NESTED}, "required": ["a"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "structure",
    [
        {"json": {"type": "no such type"}},
        {"json": "{"},
        {"json": {"$ref": "#/nowhere"}},
        {"json": {"$ref": "http://elsewhere.example/schema"}},
        {"json": {"pattern": "(" * 50, "type": "string"}},
        {"regex": "("},
        {"regex": "x" * 100_000},
        {"grammar": "start: start start"},
        {"choice": ["x" * 100_000]},
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_grammar_that_cannot_compile_is_refused(
    server: Served, structure: dict[str, Any], stream: bool
) -> None:
    body = {"prompt": "x", "max_tokens": 4, "structured_outputs": structure, "stream": stream}
    found = server.ask("POST", COMPLETIONS, body)
    assert found.status == 400, found.body[:500]
    assert len(found.error["message"]) < 500


@pytest.mark.parametrize(
    "regex", ["(a{1,1000}){1,1000}", "((a{0,99}){0,99}){0,99}b", "(a*)*(a|aa)+$"]
)
def test_a_regex_bomb_does_not_go_off(server: Served, regex: str) -> None:
    body = {"prompt": "x", "max_tokens": 8, "structured_outputs": {"regex": regex}}
    found = server.ask("POST", COMPLETIONS, body)
    assert found.status in (200, 400), found.body


def test_tools_and_schemas_may_nest_and_too_deep_ones_are_refused(server: Served) -> None:
    def asked(parameters: Any) -> Answer:
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        more = {"tools": [tool], "tool_choice": "required", "max_tokens": 4}
        return server.ask("POST", CHAT, {"messages": HELLO, **more})

    assert asked({"type": "object"}).status == 200
    for depth in (100, 200, 300, 500, 900):
        text = '{"a":' * depth + "1" + "}" * depth
        found = asked({"type": "object", "default": json.loads(text)})
        assert found.status in (200, 400), (depth, found.body)
        text = '{"not":' * depth + "{}" + "}" * depth
        found = asked({"type": "object", **json.loads(text)})
        assert found.status in (200, 400), (depth, found.body)
    assert asked(NESTED).status in (200, 400)


# --- requests that are too long, too slow, or not HTTP -----------------------------------------


def test_a_declared_body_that_is_too_long_is_refused_before_it_comes(server: Served) -> None:
    with connect(server) as sock:
        sock.sendall(post(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 10000000"))
        answer = all_of(sock)
    assert status_of(answer) == 413
    assert error_of(answer)["code"] == "body_too_large"


def test_a_body_that_is_too_long_is_refused_while_it_comes(server: Served) -> None:
    """10 MB, declared or in chunks: the client is told, even one that sends all before it listens."""
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    assert server.ask("POST", COMPLETIONS, body).status == 413
    with connect(server) as sock:
        head = post(COMPLETIONS, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        sock.sendall(head)
        chunk = b"x" * (1 << 16)
        try:
            for _ in range(200):
                sock.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        except ConnectionError:
            pass
        answer = all_of(sock)
    assert status_of(answer) == 413
    assert error_of(answer)["code"] == "body_too_large"


def test_a_body_that_never_comes_ends_with_408(server: Served) -> None:
    with connect(server) as sock:
        sock.sendall(post(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 100") + b'{"prompt"')
        answer = all_of(sock)
    assert status_of(answer) == 408
    assert error_of(answer)["type"] == "timeout_error"


def test_a_head_that_is_too_long_closes_the_connection(server: Served) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        try:
            for number in range(2000):
                sock.sendall(b"X-%d: %b\r\n" % (number, b"y" * 1000))
        except ConnectionError:
            pass
        answer = all_of(sock)
    assert answer == b"" or 400 <= status_of(answer) < 500


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\1\2\3\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET http://example.com/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
    ],
)
def test_what_is_no_good_http_is_refused_or_closed(server: Served, sent: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        answer = all_of(sock)
    assert answer == b"" or 200 <= status_of(answer) < 500
    if answer and status_of(answer) >= 400:
        assert error_of(answer)["message"]


@pytest.mark.parametrize("path", ["/health", COMPLETIONS])
def test_trailers_without_an_end_close_the_connection(server: Served, path: str) -> None:
    """And take no memory: headers behind a body in chunks are read by nobody."""
    method = "GET" if path == "/health" else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    trailers = b"".join(b"name-%d: %s\r\n" % (number, b"v" * 60) for number in range(1000))
    with connect(server) as sock:
        sock.sendall(head.encode())
        with pytest.raises(ConnectionError):
            sock.sendall(trailers * 1000)


def test_an_answer_that_needs_no_body_does_not_wait_for_one(server: Served) -> None:
    """What is still to come of it is never taken for the next request."""
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        found = all_of(sock)
    assert status_of(found) == 200
    assert b"connection: close" in found.lower()


def test_web_pages_of_others_may_not_ask_where_there_is_no_key(server: Served) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    found = server.ask("POST", COMPLETIONS, body, {"Origin": "http://elsewhere.example"})
    assert (found.status, found.error["code"]) == (403, "origin_not_allowed")
    assert "--allowed-origins" in found.error["message"]
    assert server.ask("POST", COMPLETIONS, body, {"Origin": server.url}).status == 200


def test_a_request_id_must_be_printable_and_short(server: Served) -> None:
    for bad in ("x" * 300, "tab\tinside", "esc\x1b[31m"):
        found = server.ask("GET", "/v1/models", None, {"x-request-id": bad})
        assert found.status == 400
        assert found.headers.get("x-request-id") != bad


def test_a_request_id_that_is_in_use_is_refused(server: Served) -> None:
    body = json.dumps({**LONG, "max_tokens": 1000}).encode()
    with connect(server) as sock:
        sock.sendall(post(COMPLETIONS, body, "x-request-id: twice"))
        assert b"200 OK" in sock.recv(1000)
        found = server.ask(
            "POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}, {"x-request-id": "twice"}
        )
        assert (found.status, "twice is there already" in found.error["message"]) == (400, True)


def test_pipelined_requests_are_answered_in_their_order(server: Served) -> None:
    bodies = [json.dumps({"prompt": "x", "max_tokens": n}).encode() for n in (1, 2, 0, 3)]
    sent = b"".join(post(COMPLETIONS, body) for body in bodies)
    with connect(server) as sock:
        sock.sendall(sent + b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = all_of(sock)
    statuses = [int(it[:3]) for it in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 200, 400, 200, 404]
    ends = [answer.find(b'"completion_tokens":%d' % n) for n in (1, 2, 3)]
    assert ends == sorted(ends)
    assert ends[0] > 0


def test_a_connection_can_be_used_again_after_an_error(server: Served) -> None:
    with connect(server) as sock:
        sock.sendall(post(COMPLETIONS, b"{"))
        assert next_status(sock) == 400
        sock.sendall(post(COMPLETIONS, b'{"prompt": "x", "max_tokens": 1}'))
        assert next_status(sock) == 200


@contextmanager
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_requests_that_are_half_sent_are_closed_and_disturb_nobody(
    server: Served,
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-"
    body = post(COMPLETIONS, b"x" * 100)[:-50]
    with many_files(), ExitStack() as stack:
        socks = [stack.enter_context(connect(server)) for _ in range(1000)]
        for index, sock in enumerate(socks):
            sock.sendall(body if index % 2 else head)
        assert server.ask("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1}).status == 200
        answers = [all_of(sock) for sock in socks]
    assert set(answers[::2]) == {b""}
    assert {status_of(answer) for answer in answers[1::2]} == {408}


# --- memory ------------------------------------------------------------------------------------


def rss_bytes(pid: int) -> int:
    (line,) = (it for it in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in it)
    return int(line.split()[1]) * 1024


def test_memory_stays_bounded_while_bad_requests_pass(server: Served) -> None:
    asks: list[Callable[[], Answer]] = [
        lambda: server.ask("POST", COMPLETIONS, b'{"prompt": "' + b"x" * (1 << 20)),
        lambda: server.ask("POST", COMPLETIONS, {"prompt": "word " * 100_000}),
        lambda: server.ask("POST", COMPLETIONS, b"x" * 9_000_000),
        lambda: server.ask("POST", CHAT, {"messages": [{"role": "robot"}] * 1000}),
        lambda: server.ask(
            "POST", COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": "("}}
        ),
    ]

    def pass_by(num: int) -> None:
        with ThreadPoolExecutor(4) as threads:
            found = set(threads.map(lambda index: status(asks[index % len(asks)]), range(num)))
        assert found <= {400, 408, 413, None}
        assert {400, 413} <= found

    def status(ask: Callable[[], Answer]) -> int | None:
        try:
            return ask().status
        except ConnectionError:  # too slow to listen
            return None

    pass_by(50)
    before = rss_bytes(server.pid)
    pass_by(200)
    assert rss_bytes(server.pid) - before < 64 << 20
