"""A router from its start to its end: it listens, drains on SIGTERM or SIGINT, and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable

from workbench.handover.addresses import join_address
from workbench.routing.front import Front
from workbench.routing.route_settings import RouteSettings
from workbench.scheduler.settings import ConfigError
from workbench.serving.http.connections import FLUSH_S, Crowded, Server, connection_room, raise_open_files
from workbench.serving.http.origins import Access, guarded
from workbench.serving.http.request_ids import RequestIds
from workbench.serving.listening import listen


def route(settings: RouteSettings) -> int:
    """Run a router to its end, and return the exit code. Raises ConfigError for what cannot work."""
    raise_open_files()
    listener = listen(settings.host, settings.port)
    try:
        return asyncio.run(_until_signalled(settings, listener))
    finally:
        listener.close()


async def _until_signalled(settings: RouteSettings, listener: socket.socket) -> int:
    signalled = asyncio.Event()

    def on_signal(number: int) -> None:
        if signalled.is_set():
            os._exit(128 + number)
        signalled.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    await serve_router(settings, Access.of(settings, listener.getsockname()[0]), listener, signalled)
    return 0


async def serve_router(
    settings: RouteSettings,
    access: Access,
    listener: socket.socket,
    ends: asyncio.Event,
    began: Callable[[Front], None] = lambda front: None,
) -> None:
    """Route on a bound socket until ``ends`` is set and what is under way has finished. ``began`` is told of the router
    before it takes anything. Raises ConfigError."""
    front = Front(settings, listener.getsockname()[0])
    began(front)
    try:
        starting, ended = asyncio.ensure_future(front.start()), asyncio.ensure_future(ends.wait())
        await asyncio.wait((starting, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not starting.done():
            starting.cancel()
            return
        starting.result()
        await _serve(front, settings, access, listener, ends)
    finally:
        await front.close()


async def _serve(
    front: Front, settings: RouteSettings, access: Access, listener: socket.socket, ends: asyncio.Event
) -> None:
    app = guarded(front.app, access, front.metrics.refused)
    # A request is two open files: one to its client and one to its worker, and in a pair one more.
    room = connection_room() // (3 if settings.paired else 2)
    if room < 1:
        raise ConfigError("the limit of open files leaves no room for connections; raise it (ulimit -n)")
    crowded = Crowded(app, front.metrics.refused)
    server = Server(listener, RequestIds(app), RequestIds(crowded), room)
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    _announce(front, settings, listener)
    for note in access.notes():
        print(f"note: {note}", file=sys.stderr)
    ended = asyncio.ensure_future(ends.wait())
    await asyncio.wait((ended, serving), return_when=asyncio.FIRST_COMPLETED)
    front.drain()
    try:
        await asyncio.wait_for(front.idle.wait(), settings.drain_timeout_s)
    except TimeoutError:
        print("warning: some requests were cut off at the end of --drain-timeout", file=sys.stderr)
    else:
        server.flush_s = FLUSH_S
    server.should_exit = True
    await serving


def _announce(front: Front, settings: RouteSettings, listener: socket.socket) -> None:
    address = join_address(*listener.getsockname()[:2])
    well = sum(worker.usable for worker in front.roster.workers.values())
    counts = ", ".join(_counted(len(front.roster.of(role)), role) for role in front.roster.sides)
    kinds = " and ".join(dict.fromkeys(settings.router_of(role) for role in front.roster.sides))
    print(f"routing on http://{address} ({kinds}; {counts}; {well} well)", flush=True)


def _counted(workers: int, role: str) -> str:
    kind = "" if role == "both" else f"{role} "
    return f"{workers} {kind}worker{'' if workers == 1 else 's'}"
