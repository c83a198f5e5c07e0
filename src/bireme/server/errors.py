"""Errors as clients of OpenAI know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from bireme.errors import BiremeError, CapacityError, EngineError, RequestError
from bireme.server.exchange import Exchange
from bireme.server.faults import faults

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_TOO_LONG = "context_length_exceeded"
_RETRY_S = 1
_MOST_TOLD = 3


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: BiremeError) -> ApiError:
        if isinstance(error, CapacityError):
            return cls(429, str(error), code="rate_limit_exceeded")
        if isinstance(error, RequestError):
            text = str(error)
            code = _TOO_LONG if "the context holds" in text else None
            return cls(400, text, param=_field(text), code=code)
        return cls(503 if isinstance(error, EngineError) else 500, str(error), code="engine_error")

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else _TYPES[400])

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def as_json(self) -> bytes:
        """In ASCII: what a client sent and is told again may be no text that can be encoded."""
        return json.dumps(self.body()).encode()

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": str(_RETRY_S)}
        if self.status in (408, 413):
            return {"Connection": "close"}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def response(self, dialect: Dialect, headers: Mapping[str, str] | None = None) -> Response:
        return Response(
            json.dumps(dialect.body(self)).encode(),
            self.status,
            {**self.headers, **(headers or {})},
            media_type="application/json",
        )


@dataclass(frozen=True)
class Dialect:
    """How the clients of an application are told of errors, and where its routes are."""

    body: Callable[[ApiError], dict[str, Any]]
    routes: str


OPENAI = Dialect(ApiError.body, "OpenAI's routes begin with /v1, and /docs lists all")
KSERVE = Dialect(lambda error: {"error": error.message}, "KServe's routes begin with /v2")


def _field(text: str) -> str | None:
    """The one that a message begins with: `n=0 must be...`, `tool_choice needs...`."""
    named = re.match(r"(\w+)[= ]", text)
    return named[1] if named and ("=" in named[0] or "_" in named[0]) else None


@dataclass(frozen=True)
class FieldNames:
    """The fields that a client has sent for its prompt, for a structure and for
    `SamplingParams.max_tokens`."""

    prompt: str
    structure: str | None = None
    max_tokens: str = "max_tokens"

    def told(self, error: ApiError) -> ApiError:
        """In its own words."""
        if error.status != 400:
            return error
        text = re.sub(r"\bmax_tokens=", f"{self.max_tokens}=", error.message)
        param = _field(text) or error.param
        if param is None and re.search("structured outputs|the grammar", text):
            param = self.structure
        if param is None and error.code == _TOO_LONG:
            param = self.prompt
        return ApiError(400, text, param=param, code=error.code)

    @contextmanager
    def used(self) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            raise self.told(ApiError.of(error)) from None


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


class Handlers:
    """What an application with these routes answers where one of them raises."""

    def __init__(self, dialect: Dialect, routes: Sequence[BaseRoute]) -> None:
        self._dialect, self._routes = dialect, routes

    def install(self, app: FastAPI) -> None:
        handlers: dict[Any, Any] = {
            ApiError: self._on_api_error,
            BiremeError: self._on_bireme_error,
            HTTPException: self._on_http_error,
            RequestValidationError: self._on_invalid,
            ClientGone: self._on_client_gone,
            Exception: self._on_bug,
        }
        for kind, handler in handlers.items():
            app.add_exception_handler(kind, handler)

    def _refused(self, request: Request, error: ApiError, why: str | None = None) -> Response:
        """`why` for the log, where the message quotes what may be of a prompt."""
        Exchange.of(request.scope).error = why or error.message
        return error.response(self._dialect)

    async def _on_api_error(self, request: Request, error: ApiError) -> Response:
        return self._refused(request, error)

    async def _on_bireme_error(self, request: Request, error: BiremeError) -> Response:
        return self._refused(request, ApiError.of(error))

    async def _on_http_error(self, request: Request, error: HTTPException) -> Response:
        """Of the framework: no such route, a method that a route has not."""
        headers = dict(error.headers or {})
        if error.status_code == 405 and (allowed := _methods(self._routes, request.scope)):
            headers["Allow"] = ", ".join(allowed)
        told = str(error.detail)
        if error.status_code == 404:
            told = f"there is no {request.scope['path']:.100}; {self._dialect.routes}"
        elif error.status_code == 405:
            told = f"{request.method} is not for this route; use {headers.get('Allow', 'another')}"
        Exchange.of(request.scope).error = told
        return ApiError(error.status_code, told).response(self._dialect, headers)

    async def _on_invalid(self, request: Request, error: RequestValidationError) -> Response:
        """A body of the wrong shape: names the first fields."""
        told = faults(error.errors(), error.body)[:_MOST_TOLD]
        text = "; ".join(fault.message for fault in told)
        why = "; ".join(fault.unquoted for fault in told)
        return self._refused(request, ApiError(400, text, param=told[0].where[:100] or None), why)

    async def _on_client_gone(self, request: Request, _: ClientGone) -> Response:
        """Nobody hears it; metrics and the log count it as nginx does."""
        Exchange.of(request.scope).is_left = True
        return Response(status_code=499)

    async def _on_bug(self, _: Request, error: Exception) -> Response:
        """Is raised further once it is told."""
        return bug(error).response(self._dialect)


def _methods(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """Of all routes with this path; the framework names those of the first alone."""
    found = [
        route.methods or ()
        for route in routes
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE
    ]
    return sorted({method for methods in found for method in methods})


def bug(error: Exception) -> ApiError:
    """The server's log has the traceback."""
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")
