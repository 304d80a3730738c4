"""The connections of a server: how many may be open, who is answered beyond that, and how they end.

Every connection is an open file. Where there is none left to accept one with, the kernel reports it again and again, and
nothing is answered any more, /health included. So the limit is raised as far as it goes, fewer connections than it allows
are served, and a few more are kept for saying no.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench.scheduler.config import ConfigError
from workbench.serving.http.errors import api_error, error_response
from workbench.serving.refusals import Refusal

OWN_FILES = 32
"""Open files that the process may need beside connections, once it serves."""
CROWDED = 32
"""Connections beyond the room for them, which are answered and closed."""
CROWDED_S = 1.0
"""How long one of those may take to say what it wants."""
FLUSH_S = 5.0
"""How long answers may take to leave once nothing more will come."""
ACCEPTED_AT_ONCE = 64
LOOK_AGAIN_S = 0.05
ALWAYS_ANSWERED = ("/health", "/metrics")


def raise_open_files() -> None:
    """Let this process and its children open as many files as the system allows them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connection_room() -> int:
    """Return how many connections may be open beside what this process has open now. Raises ConfigError for none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    room = limit - len(os.listdir("/dev/fd")) - OWN_FILES - CROWDED
    if room < 1:
        raise ConfigError(f"the limit of open files ({limit}) leaves no room for connections; raise it (ulimit -n)")
    return room


class Crowded:
    """The application for a connection beyond the room: /health and /metrics, else a 503; closed after its answer."""

    def __init__(self, app: ASGIApp, refused: Callable[[int], None]) -> None:
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        if scope["type"] == "http" and scope["path"] in ALWAYS_ANSWERED:
            await self._app(scope, receive, send_and_close)
            return
        # Closed with something unread, a connection is reset, and the client may not see its answer.
        while (await receive()).get("more_body"):
            pass
        error = api_error(
            Refusal(
                "overloaded",
                "overloaded: as many connections are open as the limit of open files allows",
                retry_after_s=1,
            )
        )
        self._refused(error.status)
        await error_response(error)(scope, receive, send_and_close)


class Server(uvicorn.Server):
    """Uvicorn with a door of its own: ``room`` connections get ``app``, those beyond it ``crowded``.

    Signals are the supervisor's.
    """

    def __init__(self, listener: socket.socket, app: ASGIApp, crowded: ASGIApp, room: int) -> None:
        super().__init__(_config(app))
        self._crowded_config = _config(crowded)
        self._listener = listener
        self._room = room
        self._accepting: set[asyncio.Task[None]] = set()
        self._again: asyncio.TimerHandle | None = None
        self._said_s = 0.0
        self.flush_s = 0.0
        """How long answers may take to leave when the server ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._crowded_config.load()
        self._listener.setblocking(False)
        self._open_door()
        self.started = True

    def _open_door(self) -> None:
        self._again = None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _close_door(self, for_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        if self._again is not None:
            self._again.cancel()
        self._again = None if for_s is None else loop.call_later(for_s, self._open_door)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            count = len(self.server_state.connections) + len(self._accepting)
            if count >= self._room + CROWDED:
                self._close_door(LOOK_AGAIN_S)  # what waits in front of it waits in the kernel
                return
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # the whole system has no file or memory left
                self._say(f"no connection can be accepted: {error.strerror}")
                self._close_door(1.0)
                return
            accepted.setblocking(False)
            if crowded := count >= self._room:
                self._say(
                    f"{count:,} connections are open, as many as the limit of open files allows; more are answered 503"
                )
            task = asyncio.get_running_loop().create_task(self._connect(accepted, crowded))
            self._accepting.add(task)
            task.add_done_callback(self._accepting.discard)

    async def _connect(self, accepted: socket.socket, crowded: bool) -> None:
        loop = asyncio.get_running_loop()
        config = self._crowded_config if crowded else self.config

        def protocol() -> asyncio.Protocol:
            made: Any = config.http_protocol_class
            return made(config=config, server_state=self.server_state, app_state={}, _loop=loop)

        try:
            transport, _ = await loop.connect_accepted_socket(protocol, accepted)
        except OSError:  # gone already
            accepted.close()
            return
        if crowded:
            loop.call_later(CROWDED_S, transport.abort)

    def _say(self, line: str) -> None:
        if time.monotonic() - self._said_s >= 1.0:
            self._said_s = time.monotonic()
            print(f"warning: {line}", file=sys.stderr, flush=True)

    def cut_stalled(self) -> None:
        """Close the connections whose clients do not read what was sent, so that nothing waits for them."""
        for connection in list(self.server_state.connections):
            transport = connection.transport
            if transport.get_write_buffer_size() > transport.get_write_buffer_limits()[0]:
                transport.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, let what was answered leave within ``flush_s``, and cut what has not."""
        self._close_door(None)
        self._listener.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        await self._gone(self.flush_s)
        for connection in list(state.connections):
            connection.transport.abort()
        await self._gone(1.0)

    async def _gone(self, within_s: float) -> None:
        until_s = time.monotonic() + within_s
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < until_s:
            await asyncio.sleep(0.02)


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", ws="none", server_header=False)
