"""What every request passes before its route: a name, the key, the bounds; and the log behind it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
import traceback
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bireme.server.errors import ApiError, Dialect, bug, shutting_down
from bireme.server.exchange import Exchange
from bireme.server.page.routes import PAGE_PATHS
from bireme.server.service import Service

OPEN_PATHS = ("/health", "/v2/health/live", "/v2/health/ready", *PAGE_PATHS)  # without a key
_WATCHED = (*OPEN_PATHS, "/ping", "/metrics", "/load")  # asked for every few seconds
_WHILE_DRAINING = (*_WATCHED, "/version")
_LONGEST_ID = 256
_LINGER_S = 2.0
_MOST_DROPPED = 64 << 20  # bytes


class Gate:
    """The outermost layer: one `Exchange` a request, and everything that is refused before a route.

    What breaks below becomes a 500, or cuts a stream that has begun.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = [_digest(key.encode()) for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _exchange(scope)
        scope.setdefault("state", {})["exchange"] = exchange
        body = _BoundedBody(scope, receive, self._service)
        try:
            await self._serve(
                exchange, scope, body, _Answer(send, exchange, body, self._service.dialect)
            )
        finally:
            self._note(exchange, scope)

    async def _serve(
        self, exchange: Exchange, scope: Scope, body: _BoundedBody, answer: _Answer
    ) -> None:
        is_work = exchange.method == "POST"
        self._service.begin(is_work)
        try:
            self._check(exchange, scope)
            body.check_length()
            await self._app(scope, body, answer)
        except ApiError as error:
            await answer.refuse(error, scope)
        except Exception as error:
            exchange.error = f"{type(error).__name__}: {error}"
            self._service.log.say("a bug", traceback=traceback.format_exc())
            await answer.refuse(bug(error), scope)
            if not answer.is_complete:
                raise  # uvicorn cuts the connection, so that nobody takes this for the end
        finally:
            self._service.end(is_work)
            body.release()
            exchange.is_left |= not answer.is_complete

    def _check(self, exchange: Exchange, scope: Scope) -> None:
        if self._keys and exchange.path not in OPEN_PATHS and not self._has_key(scope):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
        if self._service.is_draining and exchange.path not in _WHILE_DRAINING:
            raise shutting_down()
        self._check_origin(exchange, scope)
        if len(exchange.request_id) > _LONGEST_ID or not exchange.request_id.isprintable():
            exchange.request_id = secrets.token_hex(8)
            raise ApiError(400, f"x-request-id must be at most {_LONGEST_ID} printable characters")

    def _check_origin(self, exchange: Exchange, scope: Scope) -> None:
        """Browsers let any page send; a key keeps pages out, and where there is none, this does."""
        origin = _header(scope, b"origin").decode("latin-1")
        if not origin or self._keys or exchange.method != "POST":
            return
        own = f"{scope['scheme']}://{_header(scope, b'host').decode('latin-1')}"
        if origin != own and not {origin, "*"} & set(self._service.config.allowed_origins):
            raise ApiError(
                403,
                f"web pages of {origin:.200} may not ask; the server was started without "
                "--allowed-origins for them",
                code="origin_not_allowed",
            )

    def _has_key(self, scope: Scope) -> bool:
        """Compared in constant time, whatever the lengths."""
        given = _header(scope, b"authorization")
        digest = _digest(given[7:] if given[:7].lower() == b"bearer " else b"")
        return sum(hmac.compare_digest(digest, key) for key in self._keys) > 0

    def _note(self, exchange: Exchange, scope: Scope) -> None:
        if exchange.status is not None:
            handler = getattr(scope.get("route"), "path", "none")
            self._service.metrics.note_response(exchange.method, handler, exchange.status)
        is_told = exchange.method == "POST" or (exchange.status or 500) >= 400
        if self._service.config.log_requests and is_told and exchange.path not in _WATCHED:
            self._service.log.say("request", **exchange.as_log())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(scope: Scope, name: bytes) -> bytes:
    found: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return found


def _exchange(scope: Scope) -> Exchange:
    client = scope.get("client")
    return Exchange(
        request_id=_header(scope, b"x-request-id").decode("latin-1") or secrets.token_hex(16),
        method=scope["method"],
        path=scope["path"],
        client="" if client is None else f"{client[0]}:{client[1]}",
        trace_headers={
            name: value.decode("latin-1")
            for name in ("traceparent", "tracestate")
            if (value := _header(scope, name.encode()))
        },
    )


class _Answer:
    """`send`, with the request's id among the headers and the status noted.

    An answer ends once its request is whole: a client that listens only then would find the
    connection cut, and never see why.
    """

    def __init__(
        self, send: Send, exchange: Exchange, body: _BoundedBody, dialect: Dialect
    ) -> None:
        self._send, self._exchange, self._body = send, exchange, body
        self._dialect = dialect
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._exchange.status = message["status"]
            request_id = self._exchange.request_id.encode("latin-1", "replace")
            more = [(b"x-request-id", request_id)]
            if self._body.is_coming:  # what is not read is never followed by another request
                more.append((b"connection", b"close"))
            message["headers"] = [*message["headers"], *more]
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
            if self.is_complete and self._body.is_coming:
                await self._send({**message, "more_body": True})
                await self._body.drop()
                message = {"type": message["type"], "body": b""}
        await self._send(message)

    async def refuse(self, error: ApiError, scope: Scope) -> None:
        """And closes the connection, on which more of the request may be to come."""
        if self._exchange.status is None:
            self._exchange.error = error.message
            response = error.response(self._dialect, {"Connection": "close"})
            await response(scope, self._body, self)


class _BoundedBody:
    """`receive`, of a body that is neither too long nor too slow: ApiError 413 and 408."""

    def __init__(self, scope: Scope, receive: Receive, service: Service) -> None:
        config = service.config
        self._receive, self._service, self._most = receive, service, config.max_body_bytes
        self._timeout_s = config.receive_timeout_s
        self._deadline_s = time.monotonic() + config.receive_timeout_s
        declared = _header(scope, b"content-length")
        self._declared = int(declared) if declared.isdigit() else 0
        self._num_bytes = self._num_held = 0
        self.is_coming = self._declared > 0 or bool(_header(scope, b"transfer-encoding"))

    def check_length(self) -> None:
        """As far as it is declared."""
        if self._declared > self._most:
            self._refuse(self._declared)

    async def __call__(self) -> Message:
        if not self.is_coming:  # only an empty part, or a disconnect, is left to come
            return await self._receive()
        try:
            with self._service.receiving(self._deadline_s - time.monotonic()) as timeout:
                async with timeout:
                    message = await self._receive()
        except TimeoutError:
            self.is_coming = False
            if self._service.is_draining:
                raise shutting_down() from None
            raise ApiError(
                408, f"the request did not arrive within {self._timeout_s:g} s", code="timeout"
            ) from None
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        self.is_coming = message.get("more_body", False)
        if self._num_bytes > self._most:
            self._refuse(self._num_bytes)
        self._service.hold_bytes(num_bytes)
        self._num_held += num_bytes
        return message

    def release(self) -> None:
        """The request was served."""
        self._service.release_bytes(self._num_held)
        self._num_held = 0

    async def drop(self) -> None:
        """Takes what is still on its way, for a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while self.is_coming and self._num_bytes < _MOST_DROPPED:
                    message = await self._receive()
                    self._num_bytes += len(message.get("body", b""))
                    self.is_coming = message.get("more_body", False)

    def _refuse(self, num_bytes: int) -> None:
        raise ApiError(
            413,
            f"the body has at least {num_bytes} bytes; at most {self._most} are taken "
            "(--max-body-bytes)",
            code="body_too_large",
        )
