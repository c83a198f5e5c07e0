"""A small OpenAI-compatible server that streams what it is told to, on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class ScriptedServer:
    """What came is in `bodies` and `headers`. Answers wait until `num_held` requests have come."""

    num_held: int = 0
    refuse_every: int = 0  # the n-th, 2n-th... request gets a 400
    cut_every: int = 0  # and these end without an end
    max_messages: int = 100  # longer chats get a 400
    counts_stages: bool = False
    usage: bool = True
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_open: int = 0
    num_scrapes: int = 0
    most_open: int = 0
    have_come: threading.Event = field(default_factory=threading.Event)
    _let_go: asyncio.Event = field(default_factory=asyncio.Event)

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted"}]})

    async def metrics(self, _: web.Request) -> web.Response:
        """Stage 0 is always busy, stage 1 never."""
        if not self.counts_stages:
            return web.Response(status=404)
        self.num_scrapes += 1
        lines = [
            f'bireme:rank_busy_seconds_total{{model="m",stage="{stage}"}} {seconds}'
            for stage, seconds in ((0, self.num_scrapes * 1e6), (1, 7.0))
        ]
        return web.Response(text="# HELP x\n" + "\n".join(lines) + "\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        number = len(self.bodies)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        if number >= self.num_held:
            self._let_go.set()
            self.have_come.set()
        try:
            await self._let_go.wait()
            if self.refuse_every and number % self.refuse_every == 0:
                message = {"error": {"message": f"request {number} is refused", "code": 400}}
                return web.json_response(message, status=400)
            if len(body.get("messages", ())) > self.max_messages:
                return web.json_response({"error": {"message": "too long"}}, status=400)
            return await self._stream(request, body, number)
        finally:
            self.num_open -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], number: int
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_chat = "messages" in body
        num_tokens = body.get("max_tokens") or body["max_completion_tokens"]
        if is_chat:
            await _say(response, _piece({"delta": {"role": "assistant", "content": ""}}))
        for index in range(num_tokens):
            if self.cut_every and number % self.cut_every == 0 and index == num_tokens - 1:
                return response
            finish = "length" if index == num_tokens - 1 else None
            said = {"delta": {"content": "w "}} if is_chat else {"text": "w "}
            await _say(response, _piece({**said, "finish_reason": finish}))
        if self.usage:
            prompt = 5 if is_chat else len(body["prompt"])
            usage = {"prompt_tokens": prompt, "completion_tokens": num_tokens}
            await _say(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


def _piece(choice: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": 0, **choice}]}


async def _say(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())
    await asyncio.sleep(0)


@contextmanager
def serving(server: ScriptedServer) -> Iterator[ScriptedServer]:
    """Serves at `server.url` until it is left."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_get("/metrics", server.metrics)
        app.router.add_post("/v1/completions", server.complete)
        app.router.add_post("/v1/chat/completions", server.complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(30)
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
