"""A language model as all its routes see it: its engine, and what requests leave out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from bireme.engine.client import EngineClient
from bireme.engine.input_processor import InputProcessor
from bireme.engine.service_messages import Stats
from bireme.hf_config import read_json
from bireme.sampling_params import SamplingParams
from bireme.server.config import ServerConfig
from bireme.server.log import Log
from bireme.server.metrics import ServerMetrics
from bireme.server.service import Service
from bireme.server.tools.parsers import style_of
from bireme.server.tracing import Tracer

_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MOST_NAMES = 100
_ANSWER_S = 1.0  # an engine that takes longer is left out of the metrics


class Serving(Service):
    def __init__(self, config: ServerConfig, client: EngineClient, model: str, log: Log) -> None:
        super().__init__(config, client, model, log)
        self.client, self.root = client, model
        aliases = () if config.metrics_compat == "none" else (config.metrics_compat,)
        self._metrics = ServerMetrics(self.model_names[0], aliases=aliases)
        self.tracer = Tracer.of(config.otlp_traces_endpoint, self.model_names[0])
        self._unknown: set[str] = set()

    @property
    def metrics(self) -> ServerMetrics:
        return self._metrics

    async def stats(self) -> Stats:
        return await asyncio.wait_for(self.client.stats(), _ANSWER_S)

    async def aclose(self) -> None:
        await super().aclose()
        await asyncio.to_thread(self.tracer.close)

    def how_to_ask(self, url: str, headers: str) -> tuple[str, str]:
        name = self.model_names[0]
        if self.inputs.has_tokenizer and self.inputs.tokenizer.chat_template:
            path, body = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
        else:
            path, body = "completions", '"prompt": "Hello"'
        return (
            f"serving {name} at {url}/v1",
            f"curl {url}/v1/{path}{headers} -H 'Content-Type: application/json' "
            f'-d \'{{"model": "{name}", {body}}}\'',
        )

    @property
    def inputs(self) -> InputProcessor:
        """ApiError 503 before the engine is ready, and after it broke."""
        self.check_ready()
        return self.client.inputs

    @property
    def can_chat(self) -> bool:
        return (
            self.is_ready
            and self.inputs.has_tokenizer
            and self.inputs.tokenizer.chat_template is not None
        )

    def check_fits(self, num_requests: int) -> None:
        """RequestError for more than the engine ever takes; ApiError 503 while it cannot be asked."""
        self.check_ready()
        self.client.callers.check_fits(num_requests)

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Sampling parameters of the model's generation_config.json, where they are to be used.

        What is no parameter of ours is left out, as vLLM does.
        """
        path = self.inputs.model.folder / "generation_config.json"
        if self.config.generation_config != "auto" or not path.is_file():
            return {}
        given = read_json(path)
        found = {name: given[name] for name in _DEFAULTS if given.get(name) is not None}
        SamplingParams(**found)
        return found

    @cached_property
    def tool_style(self) -> str | None:
        template = self.inputs.tokenizer.chat_template if self.inputs.has_tokenizer else None
        return style_of(template, self.config.tool_call_parser)

    def note_unknown(self, route: str, fields: Mapping[str, Any] | None) -> None:
        """Logs the fields that a route does not know, each once."""
        new = {f"{route} {name:.60}" for name in fields or ()} - self._unknown
        told = sorted(new)[: _MOST_NAMES - len(self._unknown)]
        if told:
            self._unknown.update(told)
            self.log.say("fields that are accepted and do nothing", fields=told)
