"""The server as curl and other programs see it: its routes, its options, and what it writes down."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import Answer, Served, is_there, serving, started

import bireme
from bireme.checkpoint.hub import DEMO, resolve_model
from bireme.cli import run

KEYS = ("the first key", "the-second-key")
CHAT = {"messages": [{"role": "user", "content": "A secret question"}], "max_tokens": 2}


def curl(*arguments: str) -> str:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "60", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- routes ------------------------------------------------------------------------------------


def test_the_line_that_is_told_at_the_start_works_as_it_stands(server: Served) -> None:
    server_line = next(line for line in server.told if line.startswith("serving"))
    assert "it is open to whoever reaches it (no --api-key)" in server_line
    done = subprocess.run(
        ["sh", "-c", f"{server.curl} --silent"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_start_tells_of_memory_and_how_much_fits(server: Served) -> None:
    told = "\n".join(server.told)
    assert re.search(r"weights [\d.]+ MiB, cache [\d.]+ MiB", told)
    assert re.search(r"cache of \d+ tokens: [\d.]+ requests of 1024 at once", told)


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_it_is_healthy_once_it_serves(server: Served, path: str) -> None:
    assert json.loads(curl(server.url + path)) == {"status": "ready"}


def test_small_routes_say_what_they_are_named_for(server: Served) -> None:
    assert json.loads(curl(f"{server.url}/version")) == {"version": bireme.__version__}
    assert json.loads(curl(f"{server.url}/load")) == {"server_load": 0}
    assert json.loads(curl("-X", "POST", f"{server.url}/ping")) == {"status": "ready"}
    (card,) = json.loads(curl(f"{server.url}/v1/models"))["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == (DEMO, DEMO, 1024)
    assert json.loads(curl(f"{server.url}/v1/models/{DEMO}")) == card


def test_metrics_are_prometheus_text_and_answer_head(server: Served) -> None:
    families = {it.name for it in text_string_to_metric_families(curl(f"{server.url}/metrics"))}
    assert {
        "bireme:num_requests_running",
        "bireme:http_requests",
        "bireme:engine_ready",
    } <= families
    head = curl("--head", f"{server.url}/metrics")
    assert head.startswith("HTTP/1.1 200")
    assert "text/plain" in head


def test_the_documents_need_nothing_from_elsewhere(server: Served) -> None:
    document = json.loads(curl(f"{server.url}/openapi.json"))
    assert {"/v1/chat/completions", "/v1/completions", "/health"} <= set(document["paths"])
    page = curl(f"{server.url}/docs")
    assert "swagger-ui" in page
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert sources
    for source in sources:
        assert source.startswith("/"), source
        assert server.ask("GET", source).status == 200


def test_texts_become_ids_and_ids_texts(server: Served) -> None:
    found = server.ask("POST", "/tokenize", {"prompt": "x = é😀", "return_token_strs": True}).json
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 1024
    bare = server.ask("POST", "/tokenize", {"prompt": "x = é😀", "add_special_tokens": False}).json
    assert found["tokens"][-bare["count"] :] == bare["tokens"]
    back = server.ask("POST", "/detokenize", {"tokens": bare["tokens"]}).json
    assert back == {"prompt": "x = é😀"}
    assert server.ask("POST", "/detokenize", {"tokens": [10**9]}).status == 400
    assert server.ask("POST", "/detokenize", {"tokens": []}).json == {"prompt": ""}


def test_the_tokenizer_is_described(server: Served) -> None:
    found = server.ask("GET", "/tokenizer_info").json
    assert found["bos_token"] == "<|bos|>"
    assert "messages" in found["chat_template"]


def test_the_request_id_is_kept_or_made(server: Served) -> None:
    body = {"prompt": "import ", "max_tokens": 1}
    found = server.ask("POST", "/v1/completions", body, {"X-Request-Id": "mine-1"})
    assert found.headers["x-request-id"] == "mine-1"
    assert found.json["id"] == "cmpl-mine-1"
    made = [server.ask("GET", "/health").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("POST", "/v1/nope", 404),
        ("GET", "/v1/models/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/models", 405),
        ("DELETE", "/health", 405),
        ("BREW", "/health", 400),
    ],
)
def test_what_there_is_not_is_an_error_in_openais_words(
    server: Served, method: str, path: str, status: int
) -> None:
    found = server.ask(method, path)
    assert found.status == status
    assert found.error["type"]
    assert ("allow" in found.headers) == (status == 405)


def test_head_of_a_route_without_it_has_no_body(server: Served) -> None:
    found = server.ask("HEAD", "/tokenizer_info")
    assert (found.status, found.body) == (405, b"")


@pytest.mark.parametrize(
    "path",
    ["/health", "/ping", "/version", "/load", "/metrics", "/v1/models", f"/v1/models/{DEMO}"],
)
def test_head_of_what_is_watched_is_get_without_its_body(server: Served, path: str) -> None:
    found, whole = server.ask("HEAD", path), server.ask("GET", path)
    assert (found.status, found.body) == (200, b"")
    assert found.headers["content-type"] == whole.headers["content-type"]


def test_unknown_fields_are_accepted_and_told_once() -> None:
    body = {"prompt": "import ", "max_tokens": 1, "never_heard_of": {"a": 1}, "metadata": None}
    with serving() as server:  # of its own: others may have sent as many as are told
        for _ in range(2):
            assert server.ask("POST", "/v1/completions", body).status == 200
        server.wait_for("accepted and do nothing.*never_heard_of")
        server.wait_for("request .*status=200")
        server.wait_for("request .*status=200")
        assert sum("never_heard_of" in line for line in server.told) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num", [1, 2])
def test_a_request_that_is_refused_is_none_that_has_ended(
    server: Served, stream: bool, num: int
) -> None:
    def ended() -> list[str]:
        told = server.ask("GET", "/metrics").text.splitlines()
        names = ("bireme:request_success_total", "bireme:e2e_request_latency_seconds_count")
        return [line for line in told if line.startswith(names)]

    before = ended()
    body = {"prompt": "x", "n": num, "stream": stream, "structured_outputs": {"regex": "("}}
    assert server.ask("POST", "/v1/completions", body).status == 400
    assert ended() == before


def test_a_request_is_a_line_of_the_log_without_its_prompt(server: Served) -> None:
    server.ask("POST", "/v1/chat/completions", CHAT, {"x-request-id": "logged"})
    line = server.wait_for("request_id=logged").string
    assert "path=/v1/chat/completions status=200" in line
    assert re.search(r"prompt_tokens=\d+ .*completion_tokens=2", line)
    assert "secret" not in line
    server.ask("POST", "/v1/completions", {"prompt": 5}, {"x-request-id": 'forged" x=1'})
    assert r'request_id="forged\" x=1"' in server.wait_for("forged").string


LONG_SECRET = "A secret question " * 2000
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (COMPLETIONS, {"prompt": "A secret", "temperature": -1}, "temperature=-1.0 must be"),
        (COMPLETIONS, {"prompt": "A secret", "structured_outputs": {"regex": "("}}, "structured outputs"),
        (COMPLETIONS, {"prompt": "A secret", "suffix": "secret"}, "suffix is not supported"),
        (COMPLETIONS, {"prompt": {"secret": "secret"}}, "prompt must be a text, token ids, or"),
        (COMPLETIONS, {"prompt": "A secret", "n": "secret"}, "n: Input should be a valid integer"),
        (COMPLETIONS, b'{"prompt": "A secret', "the body is no JSON"),
        (COMPLETIONS, {"prompt": LONG_SECRET}, "the context holds 1024"),
        (CHATS, {"messages": [{"role": "user", "content": {"a": "secret"}}]}, "messages.0.content must be"),
        (CHATS, {"messages": [{"role": "tool", "content": "secret"}]}, "the chat template refuses"),
        ("/v1/responses", {"input": [{"type": "image", "content": "secret"}]}, "input.0 is of type 'image'"),
        ("/v1/nope", {"prompt": "A secret"}, "there is no /v1/nope"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_the_log_says_why_a_request_was_refused_and_nothing_of_its_prompt(
    server: Served, path: str, body: Any, told: str
) -> None:
    name = secrets.token_hex(4)
    assert server.ask("POST", path, body, {"x-request-id": name}).status in (400, 404)
    line = server.wait_for(f"request_id={name}").string
    assert re.search(f'error="[^"]*{re.escape(told)}', line), line
    assert "secret" not in line


# --- options -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(
    tmp_path_factory: pytest.TempPathFactory, hermes_template: Path
) -> Iterator[tuple[Served, list[str]]]:
    """With keys, names, a template of its own, CORS and a log in JSON; from YAML and the environment."""
    path = tmp_path_factory.mktemp("config") / "server.yaml"
    path.write_text(
        f"served-model-name: [first, second]\n"
        f"log_format: text\n"
        f"chat-template: {hermes_template}\n"
        f"api-key: {KEYS}\n".replace("(", "[").replace(")", "]")
    )
    options = ("--config", str(path), "--log-prompts", "--dtype", "float32")
    env = {
        "BIREME_SERVE_LOG_FORMAT": "json",
        "BIREME_SERVE_ALLOWED_ORIGINS": "https://page.example",
        "BIREME_SERVE_PORT": "0",
    }
    with serving(*options, env=env, port=False) as server:
        yield server, server.told


@pytest.fixture
def locked(closed: tuple[Served, list[str]]) -> Served:
    return closed[0]


def with_key(server: Served, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    key = {"Authorization": f"Bearer {KEYS[1]}"}
    return server.ask(method, path, body, {**key, **headers})


def test_every_route_but_health_needs_a_key(locked: Served) -> None:
    document = with_key(locked, "GET", "/openapi.json").json
    routes = [(method, path) for path, item in document["paths"].items() for method in item]
    routes += [("get", "/docs"), ("get", "/openapi.json"), ("head", "/metrics"), ("get", "/nope")]
    assert len(routes) > 12
    for method, path in routes:
        found = locked.ask(method.upper(), path, {} if method == "post" else None)
        assert found.status == (200 if path == "/health" else 401), path
        if found.status == 401 and found.body:
            assert found.error["code"] == "invalid_api_key"
            assert found.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        (f"Bearer {KEYS[0]}x", 401),
        (f"Bearer {KEYS[0][:-1]}", 401),
        (f"Basic {KEYS[0]}", 401),
        (KEYS[0], 401),
        (f"Bearer {KEYS[0]}", 200),
        (f"bearer {KEYS[1]}", 200),
    ],
)
def test_a_key_is_right_or_wrong_as_a_whole(
    locked: Served, header: str | None, status: int
) -> None:
    headers = {} if header is None else {"Authorization": header}
    assert locked.ask("GET", "/v1/models", None, headers).status == status


def test_a_server_with_keys_asks_for_one_in_its_curl_line(closed: tuple[Served, list[str]]) -> None:
    server, told = closed
    assert "it is open" not in "".join(told)
    assert '"Authorization: Bearer $BIREME_SERVE_API_KEY"' in server.curl


def test_each_served_name_is_answered_under(locked: Served) -> None:
    listed = with_key(locked, "GET", "/v1/models").json["data"]
    assert [card["id"] for card in listed] == ["first", "second"]
    assert {card["root"] for card in listed} == {DEMO}
    for name, expected in (("second", "second"), (None, "first")):
        body = {**CHAT, "model": name}
        assert with_key(locked, "POST", "/v1/chat/completions", body).json["model"] == expected
    found = with_key(locked, "POST", "/v1/chat/completions", {**CHAT, "model": DEMO})
    assert (found.status, found.error["param"]) == (404, "model")


def test_the_log_in_json_has_the_prompts_that_were_asked_for(locked: Served) -> None:
    with_key(locked, "POST", "/v1/chat/completions", CHAT, **{"x-request-id": "told"})
    line = json.loads(locked.wait_for('"request_id": "told"').string)
    assert (line["message"], line["status"], line["completion_tokens"]) == ("request", 200, 2)
    assert len(line["prompts"]) == 1
    body = {"prompt": "A secret", "max_tokens": 1}
    with_key(locked, "POST", "/v1/completions", body, **{"x-request-id": "plain"})
    assert json.loads(locked.wait_for('"plain"').string)["prompts"] == ["A secret"]


def test_web_pages_of_an_allowed_origin_may_ask(locked: Served) -> None:
    asked = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    found = locked.ask(
        "OPTIONS", "/v1/chat/completions", None, asked
    )  # a browser sends no key here
    assert found.status == 200
    assert found.headers["access-control-allow-origin"] == "https://page.example"
    refused = locked.ask("GET", "/v1/models", None, {"Origin": "https://page.example"})
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"
    other = locked.ask("OPTIONS", "/v1/models", None, {**asked, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_without_allowed_origins_no_page_may_ask(server: Served) -> None:
    found = server.ask("GET", "/v1/models", None, {"Origin": "https://page.example"})
    assert not any(name.lower().startswith("access-control") for name in found.headers)


# --- chat templates ----------------------------------------------------------------------------

SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 日本?"},
    {"role": "assistant", "content": "A country"},
]
TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"é": {}}}},
}


@pytest.mark.parametrize("more", [{}, {"tools": [TOOL]}], ids=["plain", "tools"])
@pytest.mark.parametrize(
    "form",
    [{}, {"add_generation_prompt": False}, {"continue_final_message": True}],
    ids=["answer", "no-prompt", "go-on"],
)
@pytest.mark.parametrize("template", ["own", "given"])
def test_conversations_become_the_ids_that_transformers_gives(
    server: Served,
    locked: Served,
    hermes_template: Path,
    form: dict[str, bool],
    more: dict[str, Any],
    template: str,
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(resolve_model(DEMO))
    goes_on = form.get("continue_final_message", False)
    expected = theirs.apply_chat_template(
        SAID,
        tools=more.get("tools"),
        chat_template=hermes_template.read_text() if template == "given" else None,
        add_generation_prompt=form.get("add_generation_prompt", True) and not goes_on,
        continue_final_message=goes_on,
        tokenize=True,
        return_dict=False,
    )
    asked = locked if template == "given" else server
    found = with_key(asked, "POST", "/tokenize", {"messages": SAID, **form, **more})
    assert found.json["tokens"] == expected


def test_calls_that_the_model_writes_by_itself_are_calls(locked: Served) -> None:
    """The demo model writes none: it is made to."""
    call = '{"name": "find", "arguments": {"é": [1, "}"]}}'
    text = f"Let me see.\n<tool_call>\n{call}\n</tool_call>"
    body = {**CHAT, "tools": [TOOL], "max_tokens": 200, "structured_outputs": {"choice": [text]}}
    found = with_key(locked, "POST", "/v1/chat/completions", body).json["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] == "Let me see."
    (made,) = found["message"]["tool_calls"]
    assert made["function"] == {"name": "find", "arguments": '{"é": [1, "}"]}'}
    streamed = with_key(locked, "POST", "/v1/chat/completions", {**body, "stream": True}).text
    events = [json.loads(it[6:]) for it in streamed.split("\n\n")[:-2]]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
    pieces = [piece["function"] for delta in deltas for piece in delta.get("tool_calls", ())]
    assert pieces[0]["name"] == "find"
    assert "".join(it.get("arguments", "") for it in pieces) == made["function"]["arguments"]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("parallel", "num", "stream"),
    [(None, 2, False), (True, 2, True), (False, 1, False), (False, 1, True)],
)
def test_without_parallel_calls_the_first_alone_is_told(
    locked: Served, parallel: bool | None, num: int, stream: bool
) -> None:
    text = "\n".join(
        f'<tool_call>\n{{"name": "find", "arguments": {{"é": {number}}}}}\n</tool_call>'
        for number in (1, 2)
    )
    body = {
        **CHAT, "tools": [TOOL], "max_tokens": 200, "structured_outputs": {"choice": [text]},
        "parallel_tool_calls": parallel, "stream": stream,
    }  # fmt: skip
    told = with_key(locked, "POST", "/v1/chat/completions", body).text
    events = [json.loads(it.removeprefix("data: ")) for it in told.split("\n\n") if "{" in it]
    choices = [event["choices"][0] for event in events]
    pieces = [
        it for one in choices for it in (one.get("message") or one["delta"]).get("tool_calls", ())
    ]
    arguments = "".join(it["function"].get("arguments", "") for it in pieces)
    assert arguments == '{"é": 1}{"é": 2}'[: num * 8]
    assert choices[-1]["finish_reason"] == "tool_calls"


# --- the command line --------------------------------------------------------------------------


def test_the_command_line_overrules_the_environment_and_that_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each port is one that is refused by its number."""
    for path, text in (
        (tmp_path / "a.yaml", "port: 70001\n"),
        (tmp_path / "a.toml", "port = 70001\n"),
    ):
        path.write_text(text)
        arguments = ["serve", DEMO, "--config", str(path)]
        assert run(arguments) == 2
        assert "port=70001 must be from 0 to 65535" in capsys.readouterr().err
        monkeypatch.setenv("BIREME_SERVE_PORT", "70002")
        assert run(arguments) == 2
        assert "port=70002" in capsys.readouterr().err
        assert run([*arguments, "--port", "70003"]) == 2
        assert "port=70003" in capsys.readouterr().err
        monkeypatch.delenv("BIREME_SERVE_PORT")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prot: 8000", "'prot', which is no option of bireme serve; did you mean port?"),
        ("zzz: 8000", "'zzz', which is no option of bireme serve\n"),
        ("config: other.yaml", "'config', which is no option"),
        ("port: {a: 1}", "'port'"),
        ("port: eight", "eight"),
        ("- port", "holds a list"),
        ("api-key: 0123", "'api-key' something that is no text; put it in quotes"),
        ("served-model-name: [demo, true]", "'served-model-name' something that is no text"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_config_file_that_cannot_be_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(text)
    assert run(["serve", DEMO, "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("BIREME_SERVE_PROT", "; did you mean BIREME_SERVE_PORT?"),
        ("BIREME_SERVE_MAX_NUM_SEQ", "; did you mean BIREME_SERVE_MAX_NUM_SEQS?"),
        ("BIREME_SERVE_ZZZ", ""),
    ],
)
def test_a_variable_that_no_option_has_is_refused_as_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, hint: str
) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("BIREME_SERVE", "no option's at all")
    assert run(["serve", DEMO]) == 2
    expected = f"the environment gives {name}, which is no option of bireme serve{hint}\n"
    assert capsys.readouterr().err == f"bireme: {expected}"
    assert run(["serve", "--help"]) == 0


def test_a_variable_is_one_key_whatever_spaces_are_in_it() -> None:
    with serving(env={"BIREME_SERVE_API_KEY": "correct horse"}) as server:
        for key, status in (("correct horse", 200), ("horse", 401), ("correct", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert server.ask("GET", "/v1/models", None, headers).status == status


def test_an_empty_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that was forgotten must not open the server."""
    monkeypatch.setenv("BIREME_SERVE_API_KEY", "")
    assert run(["serve", DEMO]) == 2
    assert "BIREME_SERVE_API_KEY is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--ssl-keyfile", "/nowhere"], "ssl_certfile and ssl_keyfile go together"),
        (["--chat-template", "/nowhere"], "chat_template /nowhere is no file"),
        (["--tool-call-parser", "other"], "use auto, hermes, llama3_json, none"),
        (["--max-body-bytes", "12 monkeys"], "12 monkeys"),
        (["--receive-timeout", "0"], "receive_timeout_s=0"),
        (["--api-key", ""], "api_keys"),
        (
            ["--otlp-traces-endpoint", "foo"],
            "otlp_traces_endpoint='foo' must begin with http:// or https://",
        ),
        (["--root-path", "foo"], "root_path='foo' must begin with a slash, like /foo"),
        (["--host", "no.such.host.invalid"], "--port and --host name another place"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    assert run(["serve", DEMO, *options]) == 2
    assert complaint in capsys.readouterr().err


def test_a_busy_port_is_named_with_the_flag_that_changes_it(
    server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", DEMO, "--port", str(server.port)]) == 2
    told = capsys.readouterr().err
    assert f"127.0.0.1:{server.port}" in told
    assert "--port" in told


def test_a_port_is_busy_as_soon_as_a_server_has_taken_it() -> None:
    from bireme.errors import ConfigError
    from bireme.server.config import ServerConfig
    from bireme.server.sockets import listen

    with listen(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            listen(ServerConfig(port=port))


# --- starting, and TLS -------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_while_the_model_loads_health_says_how_far_it_is_and_work_is_refused() -> None:
    port = free_port()
    with started("--port", str(port), port=False) as server:
        server.port = port
        found = wait_for_answer(server)
        assert (found.status, found.json["status"]) == (503, "loading")
        assert found.json["doing"]
        refused = server.ask("POST", "/v1/chat/completions", CHAT)
        if refused.status != 200:  # it may be ready by now
            assert (refused.status, refused.error["code"]) == (503, "loading")
            assert refused.headers["retry-after"] == "1"
        server.wait_ready()
        assert server.ask("GET", "/health").json == {"status": "ready"}


def wait_for_answer(server: Served) -> Answer:
    """The first, of a server that does not listen yet."""
    while True:
        try:
            return server.ask("GET", "/health")
        except ConnectionRefusedError:
            assert is_there(server.pid)


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """A key, and a certificate that it has signed itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out",
            certificate, "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1",
        ],
        capture_output=True, check=True,
    )  # fmt: skip
    return key, certificate


def test_with_a_certificate_it_serves_https(signed: tuple[Path, Path], tmp_path: Path) -> None:
    key, certificate = signed
    config = tmp_path / "server.toml"
    config.write_text(
        f'ssl-certfile = "{certificate}"\nssl-keyfile = "{key}"\nreceive-timeout = 2\n'
    )
    with serving("--config", str(config)) as server:
        assert server.scheme == "https"
        found = curl("--cacert", str(certificate), f"{server.url}/health")
        assert json.loads(found) == {"status": "ready"}
        body = json.dumps({**CHAT, "stream": True})
        streamed = curl(
            "--cacert", str(certificate), "-H", "Content-Type: application/json",
            "-d", body, f"{server.url}/v1/chat/completions",
        )  # fmt: skip
        assert streamed.endswith("data: [DONE]\n\n")
        with socket.create_connection((server.host, server.port), timeout=20) as silent:
            assert silent.recv(1) == b""  # no handshake within the receive timeout


def test_clients_without_a_signed_certificate_are_refused(signed: tuple[Path, Path]) -> None:
    key, certificate = map(str, signed)
    options = ("--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certs", certificate)
    with serving(*options) as server:
        shown = ("--cert", certificate, "--key", key)
        found = curl("--cacert", certificate, *shown, f"{server.url}/health")
        assert json.loads(found) == {"status": "ready"}
        with pytest.raises(AssertionError, match=r"curl: \(\d+\)"):
            curl("--cacert", certificate, f"{server.url}/health")


def test_a_switch_that_turns_off_has_one_name_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("no-log-requests: true\n")
    done = subprocess.run(
        [sys.executable, "-m", "bireme", "serve", "demo", "--config", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "'no-log-requests', which is no option" in done.stderr


def test_the_page_needs_nothing_from_elsewhere_and_no_inline_script(server: Served) -> None:
    page = server.ask("GET", "/")
    assert page.status == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", page.text)
    ids = re.findall(r'\sid="([^"]+)"', page.text)
    assert len(ids) == len(set(ids)) > 10
    sources = re.findall(r'(?:src|href)="([^#"]+)"', page.text)
    assert len(sources) == 6
    for source in sources:
        found = server.ask("GET", f"/{source}")
        assert found.status == 200, source
        assert found.headers["x-content-type-options"] == "nosniff"
    assert server.ask("GET", "/page/index.html").status == 404
    assert server.ask("GET", "/page/../live.py").status == 404
