"""A fleet from its start to its end: instances, and a router before them, in one command."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from typing import Any

from reports.record.run_record import prepare_out
from workbench.fleet.fleet_record import FleetRecord
from workbench.fleet.instance_process import Guard
from workbench.fleet.planned import FleetSettings, Planned, visible_gpus, with_gpus
from workbench.fleet.started import FleetInstance
from workbench.routing.front import Front
from workbench.routing.run_router import serve_router
from workbench.scheduler.config import ConfigError, Role
from workbench.serving.http.connections import raise_open_files
from workbench.serving.http.origins import Access
from workbench.serving.listening import listen

LAST_S = 75.0
"""How long an instance may take to end once it has nothing under way: its record may be long."""
AT_ONCE_S = 2.0
"""How long it may take when it was told not to finish anything."""


def run_fleet(settings: FleetSettings, force: bool, guard: Guard, gpus: bool) -> int:
    """Run a fleet to its end and return the exit code: 0 drained, 2 what it was told cannot work, 1 else.

    ``gpus``: instances run on GPUs, which are dealt out. Raises ConfigError or RecordError before anything is started.
    """
    planned = settings.instances()
    if gpus:
        planned = with_gpus(planned, visible_gpus())
    raise_open_files()
    listener = listen(settings.listens.host, settings.listens.port)
    try:
        access = Access.of(settings.listens, listener.getsockname()[0])
        record = None
        if settings.record is not None:
            prepare_out(settings.record, force)
            record = FleetRecord(settings, planned)
            planned = record.planned
        fleet = _Fleet(settings, planned, listener, access, guard)
        try:
            code = asyncio.run(fleet.run())
        except ConfigError:
            if record is not None:
                record.discard()  # what could not be routed to has served nobody
            raise
        if record is not None and fleet.spans:
            code = max(code, record.close(fleet.spans, fleet.lost))
        elif record is not None:
            record.discard()  # nothing was ever served
        return code
    finally:
        listener.close()


class _Fleet:
    """One fleet's life."""

    def __init__(
        self, settings: FleetSettings, planned: list[Planned], listener: socket.socket, access: Access, guard: Guard
    ) -> None:
        self._settings = settings
        self._access = access
        self._planned = planned
        self._listener = listener
        self._guard = guard
        self._instances: list[FleetInstance] = []
        self._serving = 0
        self._front: Front | None = None
        self._told = False
        self._ending = False
        """What ends from now on was told to."""
        self._ends = asyncio.Event()
        self._ready = asyncio.Event()
        self._code = 0
        self.spans: dict[str, tuple[float, float]] = {}
        """When each instance began to serve and ended, on the monotonic clock."""
        self.lost: dict[str, str] = {}
        """Instances that ended before the others, and why."""

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            for planned in self._planned:
                self._start(planned)
            await _first(self._ready.wait(), self._ends.wait())
            if not self._ends.is_set():
                await self._route()
            await self._end()
        finally:
            self._ending = True
            for instance in self._instances:
                instance.kill()
            for instance in self._instances:
                instance.process.join()
        return self._code

    def _start(self, planned: Planned) -> None:
        loop = asyncio.get_running_loop()

        def served(instance: FleetInstance) -> None:
            loop.call_soon_threadsafe(self._on_served, instance)

        instance = FleetInstance(planned, self._guard, served)
        self._instances.append(instance)
        loop.add_reader(instance.process.sentinel, self._on_ended, instance)

    def _on_served(self, instance: FleetInstance) -> None:
        self._serving += 1
        self.spans[instance.name] = (time.monotonic(), float("nan"))
        if self._serving == len(self._planned):
            self._ready.set()

    def _on_ended(self, instance: FleetInstance) -> None:
        asyncio.get_running_loop().remove_reader(instance.process.sentinel)
        instance.kill()  # whatever of it is left
        if instance.name in self.spans:
            self.spans[instance.name] = (self.spans[instance.name][0], time.monotonic())
        if self._ending:
            return
        why = self.lost[instance.name] = instance.how_it_ended()
        if not self._ready.is_set():
            self._ending = True  # the others may have the same to say
            self._fail(f"{instance.name}: {why}", instance.process.exitcode or 1)
            return
        role = instance.planned.role
        left = [each for each in self._instances if each.planned.role == role and each.alive]
        if not left:
            self._fail(f"{instance.name}: {why}; there is nobody left of role {role}", 1)
            return
        others = ", ".join(each.name for each in left) + (" goes on" if len(left) == 1 else " go on")
        print(f"warning: {instance.name}: {why}; {others}", file=sys.stderr)
        if self._front is not None and (worker := self._front.roster.find(instance.url)) is not None:
            self._front.roster.drain(worker)

    def _fail(self, line: str, code: int) -> None:
        """The fleet cannot go on; what is under way elsewhere may finish."""
        print(f"error: {line}", file=sys.stderr)
        self._code = self._code or (code if code > 0 else 1)
        self._ends.set()

    async def _route(self) -> None:
        urls: dict[Role, list[str]] = {"both": [], "prefill": [], "decode": []}
        for instance in self._instances:
            urls[instance.planned.role].append(instance.url)
            print(f"{instance.name}: {instance.announced}", file=sys.stderr)

        def began(front: Front) -> None:
            self._front = front

        await serve_router(self._settings.route(urls), self._access, self._listener, self._ends, began)

    async def _end(self) -> None:
        """End the instances, which have nothing under way any more, or what outlasted the time to drain."""
        self._ending = True
        for instance in self._instances:
            instance.end()
        until_s = time.monotonic() + LAST_S
        for instance in self._instances:
            while instance.alive and time.monotonic() < until_s:
                await asyncio.sleep(0.02)
            if instance.alive:
                self._fail(f"{instance.name}: it did not end within {LAST_S:g} s and was killed", 1)
                instance.kill()
            elif instance.process.exitcode and instance.name in self.spans and instance.name not in self.lost:
                self._fail(f"{instance.name}: {instance.how_it_ended()}", 1)
        await asyncio.sleep(0)  # what waits to be told of their ends is

    def _on_signal(self, number: int) -> None:
        if not self._told:
            self._told = True
            self._ends.set()
            return
        for instance in self._instances:
            instance.end_at_once()
        until_s = time.monotonic() + AT_ONCE_S
        while any(instance.alive for instance in self._instances) and time.monotonic() < until_s:
            time.sleep(0.02)
        for instance in self._instances:
            instance.kill()
        os._exit(128 + number)


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait for any of these."""
    tasks = [asyncio.create_task(each) for each in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
