"""`/openapi.json` is true: what it says is what a server does, whatever is sent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from served import Served, serving

KEY = "a key"
BEARER = {"Authorization": f"Bearer {KEY}"}
WITHOUT_KEY = {"/health"}
WITHOUT_503 = {"/metrics", "/version", "/load"}
LEDGERS = {"/debug/ledger", "/debug/live"}
READ_NO_BODY = {
    "/v1/models", "/v1/models/{model}", "/health", "/ping", *LEDGERS, "/debug/setup", *WITHOUT_503,
}  # fmt: skip
NAME_A_MODEL = {"/tokenize", "/detokenize", "/v1/models/{model}"}
GENERATE = {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
METHODS = {"get", "post"}


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """Its answers are short, as the context is."""
    with serving("--dtype", "float32", "--max-model-len", "48", "--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="module")
def document(locked: Served) -> dict[str, Any]:
    found: dict[str, Any] = locked.ask("GET", "/openapi.json", headers=BEARER).json
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        assert set(item) <= METHODS
        for operation in item.values():
            yield path, operation


# --- what it says ------------------------------------------------------------------------------


def test_it_is_openapi(document: dict[str, Any]) -> None:
    from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

    assert document["openapi"].startswith("3.1.")
    OPENAPI_31_VALIDATOR.validate(document)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(reference := node.get("$ref"), str):
            yield reference
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def test_all_that_it_refers_to_is_in_it(document: dict[str, Any]) -> None:
    named = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert named >= set(references(document))


def test_each_operation_has_the_statuses_that_can_occur(document: dict[str, Any]) -> None:
    """405 is of methods that are not there."""
    for path, operation in operations(document):
        expected = {"200", "400", "413", "500"}
        expected |= set() if path in WITHOUT_KEY else {"401"}
        expected |= set() if path in WITHOUT_503 else {"503"}
        expected |= set() if path in READ_NO_BODY else {"408"}
        expected |= {"404"} if path in NAME_A_MODEL | GENERATE else set()
        expected |= {"429"} if path in GENERATE | LEDGERS else set()
        assert set(operation["responses"]) == expected, path
        assert operation["description"], path


def test_nothing_in_it_is_a_422(document: dict[str, Any]) -> None:
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])
    assert all("422" not in operation["responses"] for _, operation in operations(document))


def test_every_route_is_in_it(locked: Served, document: dict[str, Any]) -> None:
    """As far as a path's `Allow` says: both ways, and the answer to what is not there."""
    for path, item in document["paths"].items():
        found = locked.ask("OPTIONS", path.format(model="demo"), headers=BEARER)
        assert found.status == 405
        allowed = {method.lower() for method in found.headers["allow"].split(", ")}
        assert allowed - {"head"} == set(item), path
    assert set(document["paths"]) == GENERATE | NAME_A_MODEL | READ_NO_BODY | {"/tokenizer_info"}


def test_keys_are_told_of_where_there_are_some(server: Served, document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"]
    assert {(it["type"], it["scheme"]) for it in schemes.values()} == {("http", "bearer")}
    assert document["security"] == [{name: []} for name in schemes]
    for path, operation in operations(document):
        assert (operation.get("security") == []) == (path in WITHOUT_KEY), path
    open_to_all = server.ask("GET", "/openapi.json").json
    assert "security" not in open_to_all
    assert "securitySchemes" not in open_to_all["components"]
    assert all("401" not in it["responses"] for _, it in operations(open_to_all))


def test_what_comes_with_an_error_is_told(document: dict[str, Any]) -> None:
    for path, operation in operations(document):
        for status, response in operation["responses"].items():
            is_health = status == "503" and path in ("/health", "/ping")
            expected = {"401": {"WWW-Authenticate"}, "429": {"Retry-After"}, "503": {"Retry-After"}}
            headers = set() if is_health else expected.get(status, set())
            assert set(response.get("headers", ())) == headers
            if status != "200":
                assert set(response["content"]) == {"application/json"}, path


def test_streams_and_texts_are_told_as_such(document: dict[str, Any]) -> None:
    kinds = {
        path: set(operation["responses"]["200"]["content"])
        for path, operation in operations(document)
    }
    for path, found in kinds.items():
        also = {"text/event-stream"} if path in GENERATE else set()
        expected = {"text/plain"} if path == "/metrics" else {"application/json"} | also
        if path == "/debug/live":
            expected = {"text/event-stream"}
        assert found == expected, path


# --- what the server does ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--phases", "coverage", "--mode", "negative"),
        ("--phases", "fuzzing", "--max-examples", "20"),
    ],
    ids=["each constraint", "at random"],
)
def test_it_is_kept_whatever_is_sent(
    locked: Served, options: tuple[str, ...], tmp_path: Path
) -> None:
    """No 5xx, no status, type or body that is not told of, and nothing wrong is accepted."""
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{locked.url}/openapi.json",
            "--header", f"Authorization: {BEARER['Authorization']}", *options, "--seed", "1",
            "--request-timeout", "30", "--generation-database", "none", "--no-color",
            "--suppress-health-check", "all", "--warnings", "off",
            "--exclude-path", "/debug/live",  # goes on for ever; test_live_stream.py has its events
            "--exclude-checks", "positive_data_acceptance",  # what fields are together may not fit
        ],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert locked.ask("GET", "/health").status == 200


# --- what answers hold -------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "find"}}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
RICH: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        CHAT,
        {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        {**CHAT, "prompt_logprobs": 1, "seed": 3},
        {**CHAT, "tools": [TOOL], "tool_choice": "required", "max_tokens": 40, "temperature": 0},
    ],
    "/v1/completions": [
        {"prompt": "x", "max_tokens": 4},
        {"prompt": ["x", [5]], "n": 2, "logprobs": 2, "echo": True, "return_token_ids": True},
    ],
    "/v1/responses": [
        {"input": "x", "max_output_tokens": 4},
        {"input": "x", "max_output_tokens": 4, "top_logprobs": 2, "instructions": "y"},
    ],
}
ANSWERS = [(path, body) for path, bodies in RICH.items() for body in bodies]


def test_the_examples_can_be_tried(locked: Served, document: dict[str, Any]) -> None:
    for path in GENERATE | {"/tokenize", "/detokenize"}:
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = content["schema"]["$ref"].rpartition("/")[2]
        (example,) = document["components"]["schemas"][name]["examples"]
        assert locked.ask("POST", path, example, BEARER).status == 200, path


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(
        value
    )


def schema_of(document: dict[str, Any], path: str, media_type: str) -> dict[str, Any]:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    found: dict[str, Any] = content[media_type]["schema"]
    return found


@pytest.mark.parametrize(("path", "body"), ANSWERS)
def test_an_answer_is_as_told(
    locked: Served, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    found = locked.ask("POST", path, body, BEARER)
    assert found.status == 200, found.text
    check(document, schema_of(document, path, "application/json"), found.json)


STREAMED = [(path, body) for path, body in ANSWERS if "prompt_logprobs" not in body]


@pytest.mark.parametrize(("path", "body"), STREAMED)
def test_each_event_of_a_stream_is_as_told(
    locked: Served, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    is_named = path == "/v1/responses"
    usage = {} if is_named else {"stream_options": {"include_usage": True}}
    found = locked.ask("POST", path, {**body, "stream": True, **usage}, BEARER)
    assert found.headers["content-type"].startswith("text/event-stream")
    event = schema_of(document, path, "text/event-stream")
    data = event["properties"]["data"]
    payload = data if is_named else data["anyOf"][1]
    *told, end = found.text.split("\n\n")
    assert end == ""
    assert is_named or told.pop() == "data: [DONE]"
    for one in told:
        fields = dict(line.split(": ", 1) for line in one.split("\n"))
        check(document, event, fields)
        check(document, payload["contentSchema"], json.loads(fields["data"]))
