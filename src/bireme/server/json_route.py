"""Routes whose bodies are JSON: read before FastAPI takes over, and checked where they delay nobody."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, cast

import msgspec
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from bireme.server.errors import ClientGone

_SMALL = 64 << 10  # bytes; to check more takes milliseconds
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """Its body is read first: FastAPI makes 400 of all that goes wrong on the way."""

    executor: Executor  # for large bodies: one of them at a time, beside the streams

    @classmethod
    def on(cls, executor: Executor) -> type[JsonRoute]:
        return type(cls.__name__, (cls,), {"executor": executor})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        model = None if field is None else cast(type[BaseModel], field.field_info.annotation)

        async def strictly(request: Request) -> Response:
            strict = _StrictJson(request.scope, request.receive)
            try:
                body = await strict.body()
            except ClientDisconnect:
                raise ClientGone from None
            if model is not None and len(body) > _SMALL:
                loop = asyncio.get_running_loop()
                strict.checked = await loop.run_in_executor(self.executor, _checked, body, model)
            return await handle(strict)

        return strictly


class _StrictJson(Request):
    """Bodies as JSON is defined: no NaN, no half of a surrogate pair, and an error that says where."""

    checked: BaseModel | None = None  # which FastAPI takes as it is

    async def json(self) -> Any:
        return _decoded(await self.body()) if self.checked is None else self.checked


def _checked(body: bytes, model: type[BaseModel]) -> BaseModel:
    """As FastAPI does it, errors too."""
    try:
        return model.model_validate(_decoded(body), from_attributes=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in found]
        ) from None


def _decoded(body: bytes) -> Any:
    """HTTPException 400 for what is no JSON."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise HTTPException(400, f"the body is no JSON: {_why(body, error)}") from None


def _why(body: bytes, error: Exception) -> str:
    """msgspec takes the end of a text behind half of a surrogate pair for the body's end."""
    if _HALF.search(body) and "surrogate" not in str(error):
        return f"{error}, or a text holds half of a surrogate pair"
    return str(error)
