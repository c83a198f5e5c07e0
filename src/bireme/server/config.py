"""Settings of the front end; those of the engine are `EngineConfig`'s."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from bireme.errors import ConfigError

ToolCallParser = Literal["auto", "hermes", "llama3_json", "none"]
LogFormat = Literal["text", "json"]
GenerationConfig = Literal["auto", "vllm"]
MetricsCompat = Literal["none", "vllm"]

_CHOICES = {
    "tool_call_parser": ToolCallParser,
    "log_format": LogFormat,
    "generation_config": GenerationConfig,
    "metrics_compat": MetricsCompat,
}
_BOUNDS = {
    "port": (0, 65535),
    "max_body_bytes": (1024, 1 << 30),
    "max_connections": (1, 1 << 20),
    "receive_timeout_s": (0.1, 3600),
    "send_timeout_s": (0.1, 3600),
    "keep_alive_s": (0.1, 3600),
    "shutdown_timeout_s": (0, 86400),
}


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, who may ask, and how much one client may take.

    `receive_timeout_s` bounds how long a request may take to arrive, from its first byte to its last;
    `send_timeout_s` how long a client may take nothing of its answer.
    `generation_config` auto takes the sampling defaults of the model's generation_config.json.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    max_body_bytes: int = 8 << 20
    max_connections: int = 4096
    receive_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    keep_alive_s: float = 30.0
    shutdown_timeout_s: float = 30.0
    tool_call_parser: ToolCallParser = "auto"
    chat_template: Path | None = None
    generation_config: GenerationConfig = "auto"
    metrics_compat: MetricsCompat = "none"
    otlp_traces_endpoint: str | None = None
    log_format: LogFormat = "text"
    log_requests: bool = True
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name, literal in _CHOICES.items():
            value, known = getattr(self, name), get_args(literal)
            if value not in known:
                raise ConfigError(f"{name} {value!r} is not known; use {', '.join(known)}")
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"{name}={value} must be from {least:g} to {most:g}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile go together; give both, or neither")
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "chat_template"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"{name} {path} is no file")
        self._check_certificates()
        self._check_template()
        self._check_urls()
        if not all(self.api_keys) or not all(self.served_model_names):
            raise ConfigError("api_keys and served_model_names hold an empty text; leave it out")

    def _check_urls(self) -> None:
        endpoint, root = self.otlp_traces_endpoint, self.root_path
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_traces_endpoint={endpoint!r} must begin with http:// or https://, "
                "like http://localhost:4318/v1/traces"
            )
        if root and not root.startswith("/"):
            raise ConfigError(f"root_path={root!r} must begin with a slash, like /{root}")

    def _check_certificates(self) -> None:
        if self.ssl_certfile is None:
            return
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            if self.ssl_ca_certs is not None:
                context.load_verify_locations(self.ssl_ca_certs)
        except (OSError, ValueError) as error:
            names = ", ".join(
                str(path)
                for path in (self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs)
                if path is not None
            )
            raise ConfigError(f"TLS cannot be set up with {names}: {error}") from None

    def _check_template(self) -> None:
        if self.chat_template is None:
            return
        from bireme.text.tokenizer import check_chat_template

        try:
            check_chat_template(self.chat_template.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat_template {self.chat_template}: {error}") from None

    @property
    def scheme(self) -> str:
        return "http" if self.ssl_certfile is None else "https"
