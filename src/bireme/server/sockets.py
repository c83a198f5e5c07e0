"""Where the server listens; without what HTTP needs, so that a busy port is told at once."""

from __future__ import annotations

import socket

from bireme.errors import ConfigError
from bireme.server.config import ServerConfig

_BACKLOG = 2048


def listen(config: ServerConfig) -> socket.socket:
    """A socket on which clients wait until they are taken; ConfigError names a busy port and the flag
    that changes it."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
        sock.listen(_BACKLOG)  # two servers can bind a port, until one of them listens
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; "
            "--port and --host name another place"
        ) from None
    return sock
