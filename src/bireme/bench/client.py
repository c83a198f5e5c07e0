"""A client of one OpenAI-compatible server: asks it for its models, and streams its answers."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import msgspec

from bireme.bench.queries import Query
from bireme.bench.streamed import StreamError, error_message, read_events
from bireme.errors import RequestError

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
_CONNECT_TIMEOUT_S = 30
_ASK_TIMEOUT_S = 10
_KEEP_ALIVE_S = 4  # less than servers do (uvicorn: 5), so that none closes what is just reused
_RETRY_S = 0.5
_MAX_ERROR_BYTES = 4096
_MAX_BODY_BYTES = 1 << 22
_NOT_READY = (502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, and what each says beside its prompt."""

    base_url: str
    endpoint: str = ENDPOINTS[0]
    model: str | None = None  # the first that the server names
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    request_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if not self.base_url.lower().startswith(("http://", "https://")):
            raise RequestError(
                f"base_url={self.base_url!r} must begin with http:// or https://, "
                "like http://127.0.0.1:8000"
            )
        if not self.endpoint.endswith("/completions"):
            raise RequestError(
                f"endpoint={self.endpoint!r} must end with /completions or /chat/completions"
            )
        if not self.request_timeout_s > 0:
            raise RequestError(f"request_timeout={self.request_timeout_s} must be above 0 s")

    @classmethod
    def of(cls, url: str, api_key: str | None) -> Target:
        """A server that is not asked for answers."""
        return cls(base_url=url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    def url(self, path: str) -> str:
        """`base_url` may end with /v1 or /v2, as other clients want it and servers print it."""
        return (
            self.base_url.rstrip("/").removesuffix("/v1").removesuffix("/v2")
            + "/"
            + path.lstrip("/")
        )

    def body(self, model: str, query: Query) -> bytes:
        """Of the request that asks for it, encoded."""
        if self.is_chat:
            messages = [{"role": "user", "content": query.prompt}]
            return self.chat_body(model, messages, query.output_len)
        return self._encoded(model, {"prompt": query.prompt, "max_tokens": query.output_len})

    def chat_body(self, model: str, messages: list[dict[str, Any]], max_tokens: int) -> bytes:
        return self._encoded(model, {"messages": messages, "max_completion_tokens": max_tokens})

    def _encoded(self, model: str, said: dict[str, Any]) -> bytes:
        always = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode({**always, **said, **self.extra_body})


class Refused(StreamError):
    """The server answered with another status than 200."""

    def __init__(self, status: int, reason: str | None, said: str) -> None:
        super().__init__(f"{status} {reason}: {said}")
        self.status = status


class Client:
    """Use it in `async with`. Who comes back after idling for long, as people do, had better not reuse
    connections: the server may close one while it is taken up."""

    def __init__(self, target: Target, *, reuses_connections: bool = True) -> None:
        self.target = target
        self._reuses_connections = reuses_connections
        self._model = target.model or ""
        self._url = target.url(target.endpoint)

    @property
    def model(self) -> str:
        """What is asked for; empty before `find_model`, where the target names none."""
        return self._model

    async def __aenter__(self) -> Self:
        connector = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
            if self._reuses_connections
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={**self.target.headers, "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(
                total=self.target.request_timeout_s, sock_connect=_CONNECT_TIMEOUT_S
            ),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def stream(self, body: bytes) -> AsyncGenerator[bytes]:
        """The data of each event that answers it. StreamError says on one line why there is no more."""
        try:
            async with self._session.post(self._url, data=body) as response:
                if response.status != 200:
                    said = error_message(await _read(response, _MAX_ERROR_BYTES))
                    raise Refused(response.status, response.reason, said)
                async for data in read_events(response.content.iter_any()):
                    yield data
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise StreamError(self._reason(error, self.target.request_timeout_s)) from None

    async def get_text(self, path: str) -> str:
        """What is there; empty where nothing is."""
        timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
        try:
            async with self._session.get(self.target.url(path), timeout=timeout) as response:
                body = await _read(response, _MAX_BODY_BYTES)
        except (aiohttp.ClientError, OSError):
            return ""
        return body.decode(errors="replace") if response.status == 200 else ""

    async def fetch(self, path: str) -> bytes:
        """What is there; RequestError says why nothing is."""
        url, timeout = self.target.url(path), aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
        try:
            async with self._session.get(url, timeout=timeout) as response:
                body = await _read(response, _MAX_BODY_BYTES)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RequestError(self._unanswered(error)) from None
        if response.status != 200:
            raise RequestError(f"{url} says {response.status}: {error_message(body)}")
        return body

    async def find_model(self, ready_timeout_s: float = 0.0) -> str:
        """The model to ask for: the target's, or the first that the server names, which is waited for.

        RequestError says why it does not answer. Where the model is known and no time to wait is
        given, the server is not asked.
        """
        if ready_timeout_s or not self._model:
            status, body = await self._ask_models(ready_timeout_s)
            self._model = self._model or _first_model(self.target, status, body)
        return self._model

    async def _ask_models(self, ready_timeout_s: float) -> tuple[int, bytes]:
        """What /v1/models answers, whatever it is, once the server does."""
        deadline = time.monotonic() + ready_timeout_s
        timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
        while True:
            try:
                async with self._session.get(_models_url(self.target), timeout=timeout) as response:
                    body = await _read(response, _MAX_BODY_BYTES)
                if response.status not in _NOT_READY:
                    return response.status, body
                why = error_message(body) or response.reason
                reason = f"{self.target.base_url} is not ready: {response.status}, {why}"
            except (aiohttp.ClientError, OSError, ValueError) as error:
                reason = self._unanswered(error)
            if time.monotonic() >= deadline:
                raise RequestError(reason)
            await asyncio.sleep(_RETRY_S)

    def _unanswered(self, error: Exception) -> str:
        url, why = self.target.base_url, self._reason(error, _ASK_TIMEOUT_S)
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return f"{url} shows a certificate that is not trusted; SSL_CERT_FILE names one that is"
        if isinstance(error, aiohttp.ClientConnectorError):
            return f"{why}; start a server there, or name the one that runs"
        return f"{url} does not answer: {why}"

    def _reason(self, error: Exception, timeout_s: float) -> str:
        """On one line; of a time-out aiohttp says nothing."""
        if isinstance(error, aiohttp.ClientConnectorError):
            return f"nothing answers at {self.target.base_url}: {_why_unreachable(error.os_error)}"
        if isinstance(error, TimeoutError):
            return f"no end of the answer within {timeout_s:g} s" if not str(error) else str(error)
        return " ".join(f"{error or type(error).__name__}".split())


def _models_url(target: Target) -> str:
    return target.url("/v1/models")


def _first_model(target: Target, status: int, body: bytes) -> str:
    if status != 200:
        raise RequestError(
            f"{_models_url(target)} says {status}: {error_message(body)}; "
            "name the model by --model, or the key by --api-key"
        )
    try:
        return msgspec.json.decode(body, type=_Models).data[0].id
    except (msgspec.MsgspecError, UnicodeDecodeError, IndexError):
        raise RequestError(
            f"{_models_url(target)} names no model ({body[:60]!r}); name it by --model"
        ) from None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _why_unreachable(error: OSError) -> str:
    """In the system's words: asyncio names the address again instead."""
    is_of_system = error.errno and not isinstance(error, socket.gaierror | ssl.SSLError)
    words = os.strerror(error.errno or 0) if is_of_system else error.strerror or str(error)
    return " ".join(words.lower().split())


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """At most so many bytes of the body."""
    body = b""
    while len(body) < most and (piece := await response.content.read(most - len(body))):
        body += piece
    return body


async def fetch(url: str, api_key: str | None, *paths: str) -> list[bytes]:
    """The bodies that a server answers GET of the paths with; RequestError where it does not."""
    async with Client(Target.of(url, api_key)) as client:
        return [await client.fetch(path) for path in paths]
