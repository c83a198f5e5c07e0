"""Where the server listens; without what HTTP needs, so that a busy port is told at once."""

from __future__ import annotations

import socket

from bireme.errors import ConfigError
from bireme.server.config import ServerConfig


def listen(config: ServerConfig) -> socket.socket:
    """A bound socket; ConfigError names a busy port and the flag that changes it."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; "
            "--port and --host name another place"
        ) from None
    return sock
