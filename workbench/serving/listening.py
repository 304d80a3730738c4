"""Sockets that listen, for clients or for peers."""

from __future__ import annotations

import socket

from workbench.scheduler.config import ConfigError


def listen(host: str, port: int, backlog: int = 2048) -> socket.socket:
    """Return a bound socket that listens; ``backlog`` connections may wait there. Raises ConfigError, in one line, when the
    address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(backlog)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener
