"""Serve a model over HTTP, in OpenAI's words.

Every option can stand in a file (--config, YAML or TOML) or in the environment (BIREME_SERVE_PORT for
--port); the command line has the last word, the environment the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bireme.cli import options
from bireme.cli.config_file import ConfigFile
from bireme.cli.grouped import flattened
from bireme.config import EngineConfig, ParallelConfig, parse_bytes

if TYPE_CHECKING:
    from bireme.server.config import ServerConfig

NAME = "serve"
SHORT = "Serve a model over HTTP, in OpenAI's words."


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens and what it takes."""

    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; 0.0.0.0 is every one.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8000
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            metavar="NAME",
            help="What clients call it; may be given repeatedly.",
        ),
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="Ask every client for it, but on /health; may be given repeatedly. Better in the "
            "environment: BIREME_SERVE_API_KEY.",
        ),
    ] = None
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-origins", metavar="URL", help="Web pages of these origins may ask (CORS)."
        ),
    ] = None
    root_path: Annotated[
        str, typer.Option("--root-path", help="The path that a proxy in front takes away.")
    ] = ""
    ssl_certfile: Annotated[
        Path | None, typer.Option("--ssl-certfile", help="Serve HTTPS with this certificate.")
    ] = None
    ssl_keyfile: Annotated[
        Path | None, typer.Option("--ssl-keyfile", help="The certificate's key.")
    ] = None
    ssl_ca_certs: Annotated[
        Path | None,
        typer.Option(
            "--ssl-ca-certs",
            help="Take clients whose certificate these have signed, and no others.",
        ),
    ] = None
    max_body_bytes: Annotated[
        str, typer.Option("--max-body-bytes", metavar="SIZE", help="Of one request, like 8MiB.")
    ] = "8MiB"
    max_connections: Annotated[int, typer.Option("--max-connections", help="At once.")] = 4096
    receive_timeout: Annotated[
        float,
        typer.Option(
            "--receive-timeout", metavar="S", help="Seconds that a request may take to arrive."
        ),
    ] = 30.0
    send_timeout: Annotated[
        float,
        typer.Option(
            "--send-timeout",
            metavar="S",
            help="Seconds that a client may take nothing of its answer.",
        ),
    ] = 60.0
    keep_alive: Annotated[
        float,
        typer.Option(
            "--keep-alive", metavar="S", help="Seconds that an idle connection stays open."
        ),
    ] = 30.0
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            "--shutdown-timeout",
            metavar="S",
            help="Seconds that running requests have after SIGTERM or Ctrl-C.",
        ),
    ] = 30.0
    tool_call_parser: Annotated[
        str,
        typer.Option(
            "--tool-call-parser",
            help="How the model writes calls of tools: hermes, llama3_json, none, or auto (by its "
            "chat template).",
        ),
    ] = "auto"
    enable_auto_tool_choice: Annotated[
        bool,
        typer.Option(
            "--enable-auto-tool-choice", hidden=True, help="vLLM's; it is always enabled here."
        ),
    ] = True
    chat_template: Annotated[
        Path | None,
        typer.Option("--chat-template", metavar="FILE", help="In place of the model's own."),
    ] = None
    generation_config: Annotated[
        str,
        typer.Option(
            "--generation-config",
            help="auto: sampling defaults of the model's generation_config.json; vllm: neutral ones.",
        ),
    ] = "auto"
    metrics_compat: Annotated[
        str,
        typer.Option(
            "--metrics-compat", help="vllm: every metric under vllm: too, for its dashboards."
        ),
    ] = "none"
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            "--otlp-traces-endpoint", metavar="URL", help="Send a trace of each request there."
        ),
    ] = None
    log_format: Annotated[str, typer.Option("--log-format", help="text or json.")] = "text"
    log_requests: Annotated[
        bool, typer.Option("--log-requests/--no-log-requests", help="A line a request.")
    ] = True
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="With the prompts in it.")] = (
        False
    )

    def config(self) -> ServerConfig:
        from bireme.server.config import ServerConfig

        same = (
            "host port root_path ssl_certfile ssl_keyfile ssl_ca_certs max_connections "
            "tool_call_parser chat_template generation_config metrics_compat otlp_traces_endpoint "
            "log_format log_requests log_prompts"
        )
        given: dict[str, Any] = {name: getattr(self, name) for name in same.split()}
        return ServerConfig(
            **given,
            served_model_names=tuple(self.served_model_name or ()),
            api_keys=tuple(self.api_key or ()),
            allowed_origins=tuple(self.allowed_origins or ()),
            max_body_bytes=parse_bytes(self.max_body_bytes),
            receive_timeout_s=self.receive_timeout,
            send_timeout_s=self.send_timeout,
            keep_alive_s=self.keep_alive,
            shutdown_timeout_s=self.shutdown_timeout,
        )


@flattened
def run(
    model: options.Model,
    *,
    engine: options.EngineOptions,
    cache: options.CacheOptions,
    server: ServerOptions,
    config: ConfigFile = None,
) -> None:
    settings = server.config()
    engine_config, is_auto = _engine_config(engine, cache)
    from bireme.engine.client import EngineProcess
    from bireme.server.sockets import listen

    sock = listen(settings)
    process = EngineProcess(model, engine_config, is_auto=is_auto)
    try:  # the engine starts while this process imports what HTTP needs
        from bireme.server.app import make_serving
        from bireme.server.run import serve

        status = serve(settings, sock, partial(make_serving, settings, process))
    finally:
        process.close()
    raise typer.Exit(status)


def _engine_config(
    engine: options.EngineOptions, cache: options.CacheOptions
) -> tuple[EngineConfig, bool]:
    """And whether the width is to be found."""
    given = engine.keywords() | cache.keywords()
    width = given.pop("tensor_parallel_size")
    is_auto = width == "auto"
    parallel = ParallelConfig.of(
        (1,) if is_auto else width,
        given.pop("pipeline_parallel_size"),
        given.pop("layers_per_stage"),
    )
    return EngineConfig(parallel=parallel, **given), is_auto
