"""Options of `bireme serve`: where it listens, what it takes, and what only one kind of model has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bireme.config import parse_bytes
from bireme.errors import ConfigError

if TYPE_CHECKING:
    from bireme.server.config import ServerConfig

# What options of one kind of model are called for the other; those not named here have nothing like them.
_LANGUAGE = {
    "tp": "cut it with -pp",
    "layers_per_stage": "cut it with --split",
    "max_num_seqs": "give --max-batch-size",
    "max_num_batched_tokens": "give --max-batch-size",
    "max_num_waiting": "give --max-queue-size",
    "max_num_waiting_tokens": "give --max-queue-size",
    **dict.fromkeys(
        "load_format max_model_len prefix_caching deterministic block_size seed tool_call_parser "
        "enable_auto_tool_choice chat_template generation_config metrics_compat "
        "otlp_traces_endpoint log_prompts".split(),
        "leave it out",
    ),
}
_IMAGES = {
    "split": "cut it with --layers-per-stage",
    "max_batch_size": "give --max-num-seqs",
    "max_queue_size": "give --max-num-waiting",
    **dict.fromkeys("weights image_size max_queue_delay_ms threads".split(), "leave it out"),
}


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
        str | None,
        typer.Option(
            "--max-body-bytes",
            metavar="SIZE",
            help="Of one request. [default: 8MiB, of images 64MiB]",
        ),
    ] = None
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

    def config(self, max_body_bytes: str) -> ServerConfig:
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
            max_body_bytes=parse_bytes(self.max_body_bytes or max_body_bytes),
            receive_timeout_s=self.receive_timeout,
            send_timeout_s=self.send_timeout,
            keep_alive_s=self.keep_alive,
            shutdown_timeout_s=self.shutdown_timeout,
        )


@dataclass(frozen=True)
class ImageOptions:
    """Of a vision model alone."""

    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="layer3.0,layer4.0",
            help="Of a vision model: the blocks that begin a stage; by measured cost if not given.",
        ),
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FOLDER",
            help="Of a vision model that is no folder: safetensors files with the module's names; made up if "
            "not given.",
        ),
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            metavar="N",
            help="Of a vision model: pixels on a side. [default: the checkpoint's, else 224]",
        ),
    ] = None
    max_batch_size: Annotated[
        int,
        typer.Option(
            "--max-batch-size",
            metavar="N",
            help="Of a vision model: images of a micro-batch at most.",
        ),
    ] = 8
    max_queue_delay_ms: Annotated[
        float,
        typer.Option(
            "--max-queue-delay-ms",
            metavar="D",
            help="Of a vision model: so long an image waits for others at most, where a micro-batch could go.",
        ),
    ] = 0.0
    max_queue_size: Annotated[
        int,
        typer.Option(
            "--max-queue-size",
            metavar="N",
            help="Of a vision model: images that are there at once at most.",
        ),
    ] = 256
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            help="Of a vision model: of each CPU rank. [default: a stage's share of the cores]",
        ),
    ] = None


def check_kind(context: typer.Context, model: str, *, is_vision: bool) -> None:
    """ConfigError for an option that was given, wherever, and means nothing for this kind of model."""
    kinds = ("language", "vision") if is_vision else ("vision", "language")
    foreign = _LANGUAGE if is_vision else _IMAGES
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in foreign and source is not None and source.name != "DEFAULT":
            name = next(name for name in parameter.opts if name.startswith("--"))
            raise ConfigError(
                f"{name} is for {kinds[0]} models, and {model} is a {kinds[1]} model; "
                f"{foreign[parameter.name]}"
            )
