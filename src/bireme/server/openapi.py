"""What `/openapi.json` says of answers: the statuses that each route has, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from bireme.server.protocol.chat import ChatCompletionChunk
from bireme.server.protocol.common import ErrorResponse, Moment
from bireme.server.protocol.completions import Completion
from bireme.server.protocol.responses import Event

Responses = dict[int | str, dict[str, Any]]

ANY = (400, 401, 413, 500)  # before any route, or from a bug in one
_TOLD = {
    400: "what was sent cannot be served",
    401: "the API key is missing or wrong",
    404: "no such model",
    408: "the request did not arrive in time",
    413: "the body is too long",
    429: "too many requests are waiting; Retry-After says when to try again",
    500: "a bug, of which the server's log says more",
    503: "the model is loading, the engine broke, or the server is shutting down",
}
_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
_REFERENCE = "#/components/schemas/{model}"
_APART = (
    ErrorResponse,
    ChatCompletionChunk,
    Completion,
    Event,
    Moment,
)  # models that no route names


def answers(model: type[Any], *statuses: int) -> Responses:
    """A JSON answer, and errors."""
    return {200: {"model": model}} | errors(*statuses)


def errors(*statuses: int) -> Responses:
    """Errors in OpenAI's words, with the headers that go with them."""
    return {status: _error(status) for status in statuses}


def _error(status: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "description": _TOLD[status],
        "content": {"application/json": {"schema": _reference(ErrorResponse)}},
    }
    if status in _HEADERS:
        header = {"required": True, "schema": {"type": "string"}}
        found["headers"] = {_HEADERS[status]: header}
    return found


def streamed(found: Responses, piece: type[Any], *, is_named: bool = False) -> Responses:
    """With a stream beside the answer. OpenAPI 3.1 has no word for the items of one: as is usual, the
    schema is that of one event, whose data is JSON. Without names the last is [DONE]."""
    pieces = [_reference(piece)] if is_named else [_reference(piece), _reference(ErrorResponse)]
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": pieces},
    }
    event: dict[str, Any] = {
        "type": "object",
        "description": "One server-sent event.",
        "properties": {"data": data},
        "required": ["data"],
    }
    if is_named:
        event["properties"]["event"] = {"type": "string"}
        event["required"].append("event")
    else:
        event["properties"]["data"] = {"anyOf": [{"type": "string", "const": "[DONE]"}, data]}
    found[200]["content"] = {"text/event-stream": {"schema": event}}
    return found


def events(piece: type[Any], *statuses: int) -> Responses:
    """A stream alone, of one kind of named event."""
    found: Responses = {200: {}}
    return streamed(found | errors(*statuses), piece, is_named=True)


def _reference(model: type[Any]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def tell_the_truth(app: FastAPI, *, has_keys: bool, open_paths: tuple[str, ...]) -> None:
    """FastAPI documents a 422 for bodies of the wrong shape, which is a 400 here, and knows neither of
    keys nor of models that are in streams alone."""
    document = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            told = document()
            _drop_422(told)
            _, apart = models_json_schema(
                [(model, "serialization") for model in _APART], ref_template=_REFERENCE
            )
            told["components"]["schemas"] |= apart["$defs"]
            if has_keys:
                _tell_of_keys(told, open_paths)
            else:
                _drop_401(told)
        assert app.openapi_schema is not None, "it was made just now"
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _operations(told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in told["paths"].values():
        yield from path.values()


def _drop_422(told: dict[str, Any]) -> None:
    for operation in _operations(told):
        operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        told["components"]["schemas"].pop(name, None)


def _drop_401(told: dict[str, Any]) -> None:
    for operation in _operations(told):
        operation["responses"].pop("401", None)


def _tell_of_keys(told: dict[str, Any], open_paths: tuple[str, ...]) -> None:
    scheme = {"type": "http", "scheme": "bearer", "description": "One of the server's --api-key."}
    told["components"]["securitySchemes"] = {"key": scheme}
    told["security"] = [{"key": []}]
    for path in open_paths:
        for operation in told["paths"].get(path, {}).values():
            operation["security"] = []
            operation["responses"].pop("401", None)
