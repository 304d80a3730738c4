"""Connections between the nodes of one model: what is said on them, and how either end shows the other that it may.

Both ends show that they know the shared key before anything is read that could do harm. What follows is not encrypted, no
more than what ranks exchange over gloo or NCCL: nodes belong on a network of their own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from backends.node_place import NodePlace

HANDSHAKE_S = 10.0
"""How long the other end of a new connection may take to show that it knows the key."""
TRY_EVERY_S = 0.2
_ASK_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux."""


class NodesFailed(RuntimeError):
    """Nodes that did not come together, or have lost one another, in one line."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first word of a node that has come."""

    node: int
    settings: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Why it cannot take part."""

    line: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """It takes part; ranks meet at this port of node 0."""

    store_port: int


@dataclass(frozen=True, slots=True)
class RankHello:
    """The first word of a rank on another node, which will be spoken to as ranks of this one are over a pipe."""

    rank: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Node 0 asks for a sign of life; ``sent_s`` is of its own clock."""

    sent_s: float


@dataclass(frozen=True, slots=True)
class Beat:
    """The answer to a :class:`Tick`: how the ranks of a node are."""

    tick_s: float
    """``sent_s`` of the tick."""
    now_s: float
    """The monotonic clock of the node."""
    silent_s: float
    """How long its rank that is silent longest has been so."""
    worked_s: float


@dataclass(frozen=True, slots=True)
class Serving:
    """All ranks are ready: from now on whoever ends a node asks for the end of the server."""


@dataclass(frozen=True, slots=True)
class EndAsked:
    """A node was told to end, and asks node 0 to end the server."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A node cannot go on."""

    line: str


@dataclass(frozen=True, slots=True)
class End:
    """The server ends: in order, or for the reason in ``line``."""

    line: str | None
    patience_s: float = 5.0
    """How long ranks have to end by themselves."""


def listen(place: NodePlace) -> socket.socket:
    """Return a socket that listens where nodes meet. Raises ValueError, in one line, when the address cannot be had."""
    try:
        return _bound(place.host, place.port)
    except OSError as error:
        raise ValueError(f"rendezvous: cannot listen on {place.where}: {error.strerror or error}") from error


def listen_for_ranks(host: str) -> socket.socket:
    """Return a socket that listens on a free port of the same address."""
    return _bound(host, 0)


def _bound(host: str, port: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, proto)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError:
        found.close()
        raise
    return found


def accepted(incoming: socket.socket, key: bytes) -> Connection:
    """Return the connection to who has come. Raises AuthenticationError for one that does not know the key, OSError for one
    that is silent or has gone."""
    return _greeted(incoming, key, first=True)


def connected(place: NodePlace) -> Connection:
    """Connect to node 0, as soon as it is there. Raises NodesFailed when it does not come, ValueError when it is another, or
    has another key."""
    until_s = time.monotonic() + place.wait_s
    while True:
        try:
            outgoing = socket.create_connection((place.host, place.port), timeout=HANDSHAKE_S)
            break
        except socket.gaierror as error:
            raise ValueError(f"rendezvous: {place.where}: {error.strerror or error}") from error
        except OSError as error:
            if time.monotonic() > until_s:
                why = error.strerror or error
                raise NodesFailed(f"node 0 was not at {place.where} within {place.wait_s:g} s: {why}") from error
            time.sleep(TRY_EVERY_S)
    try:
        return _greeted(outgoing, place.key, first=False)
    except AuthenticationError as error:
        raise ValueError(f"peer_key: node 0 at {place.where} has another key") from error
    except OSError as error:
        raise ValueError(f"rendezvous: {place.where} is no node 0 of a server that has started its wait") from error


def _greeted(raw: socket.socket, key: bytes, first: bool) -> Connection:
    """Show each other that both know the key, within :data:`HANDSHAKE_S` in all. Raises AuthenticationError or OSError."""
    raw.settimeout(None)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection = Connection(raw.detach())
    late = threading.Timer(HANDSHAKE_S, cut, (connection,))
    late.daemon = True
    late.start()
    try:
        for deliver in (first, not first):
            (deliver_challenge if deliver else answer_challenge)(connection, key)
    except AuthenticationError:
        connection.close()
        raise
    except (OSError, EOFError, AssertionError) as error:  # it is silent, has gone, or says something else
        connection.close()
        raise ConnectionError(str(error) or type(error).__name__) from error
    finally:
        late.cancel()
    return connection


def _socket(connection: Connection) -> socket.socket:
    """Return another handle of a connection's socket."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def cut(connection: Connection) -> None:
    """End a connection under whoever reads from it or writes to it, now."""
    with contextlib.suppress(OSError), _socket(connection) as same:
        same.shutdown(socket.SHUT_RDWR)


def said(connection: Connection, message: object) -> None:
    """Send where it does not matter whether anybody is left to hear it."""
    with contextlib.suppress(OSError):
        connection.send(message)


def addresses(connection: Connection) -> tuple[str, str]:
    """(own address, that of the other end) of a connection."""
    with _socket(connection) as same:
        return same.getsockname()[0], same.getpeername()[0]


def interface_of(address: str) -> str | None:
    """Return the network interface that has this address; None where that cannot be told, and what uses it finds one."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    if ":" in address:
        digits = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        lines = map(str.split, Path("/proc/net/if_inet6").read_text().splitlines())
        return next((words[-1] for words in lines if words[0] == digits), None)
    packed = socket.inet_aton("127.0.0.1" if address.startswith("127.") else address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no such address
                asked = struct.pack("256s", name.encode()[:15])
                if fcntl.ioctl(any_socket.fileno(), _ASK_ADDRESS, asked)[20:24] == packed:
                    return name
    return None
