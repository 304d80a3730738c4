"""Looks at workers: whether they are well, what they serve, and whether they can be used here at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from workbench.handover.addresses import split_address
from workbench.routing.connection import WorkerFailed
from workbench.routing.roster import Roster
from workbench.routing.route_settings import RouteSettings
from workbench.routing.upstream import object_in
from workbench.routing.worker import Worker

ALIKE = ("model", "page_size", "kv_dtype")
"""What the workers of a pair have to have in common."""


class Health:
    """One task a worker, which looks at it again and again, and at once when a request has found it broken."""

    def __init__(
        self,
        settings: RouteSettings,
        roster: Roster,
        say: Callable[[str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``say`` is told, in a line, of what whoever runs the router should know."""
        self._settings = settings
        self._roster = roster
        self._say = say
        self._sleep = sleep
        self.looked: Callable[[], None] = lambda: None
        """Told after every look: a worker may be well again, or its breaker half open by now, and somebody wait for it."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._doubts: dict[int, asyncio.Event] = {}

    async def first_looks(self) -> None:
        """Look at every worker once."""
        await asyncio.gather(*map(self.look, self._roster.workers.values()))

    def watch(self, worker: Worker) -> None:
        """Look at a worker from now on."""
        self._doubts[worker.number] = asyncio.Event()
        self._tasks[worker.number] = asyncio.create_task(self._watch(worker))

    def doubt(self, worker: Worker) -> None:
        """A request has found a worker broken."""
        if worker.number in self._doubts:
            self._doubts[worker.number].set()

    async def leave(self, worker: Worker) -> None:
        """Look at a worker no more."""
        self._doubts.pop(worker.number, None)
        task = self._tasks.pop(worker.number, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """Look at nobody any more."""
        for worker in list(self._roster.workers.values()):
            await self.leave(worker)

    async def _watch(self, worker: Worker) -> None:
        doubt = self._doubts[worker.number]
        while True:
            slept, doubted = asyncio.ensure_future(self._sleep(self._settings.health_interval_s)), None
            try:
                doubted = asyncio.create_task(doubt.wait())
                await asyncio.wait((slept, doubted), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in filter(None, (slept, doubted)):
                    task.cancel()
            doubt.clear()
            await self.look(worker)

    async def look(self, worker: Worker) -> None:
        """Look at a worker now."""
        try:
            why = await self._ill(worker)
            if why is None:
                await self._learn(worker)
        except WorkerFailed as error:
            why = str(error)
        if why is None:
            self._well(worker)
        else:
            self._unwell(worker, why)
        self.looked()

    def _well(self, worker: Worker) -> None:
        worker.failed_looks = 0
        if not worker.healthy:
            if worker.healthy is False:
                self._say(f"note: worker {worker.url} is well again")
            worker.healthy, worker.why = True, ""

    def _unwell(self, worker: Worker, why: str) -> None:
        worker.failed_looks += 1
        worker.why = why
        # One that never answered gets nothing before it does.
        if worker.healthy is None or (worker.healthy and worker.failed_looks >= self._settings.health_failures):
            worker.healthy = False
            self._say(f"warning: worker {worker.url} gets nothing new: {why}")

    async def _ill(self, worker: Worker) -> str | None:
        """What is wrong with a worker, if anything is. Raises WorkerFailed."""
        status, _ = await self._get(worker, self._settings.health_path)
        return None if status < 400 else f"{self._settings.health_path} answers {status}"

    async def _learn(self, worker: Worker) -> None:
        """Find out what a worker serves, and whether it is one of ours. Raises WorkerFailed."""
        status, body = await self._get(worker, "/v1/models")
        worker.models = models_in(body) if status == 200 else {}
        status, body = await self._get(worker, "/server_info")
        if worker.role != "both" and status not in (200, 404, 405):
            raise WorkerFailed(f"/server_info answers {status}")
        worker.about = object_in(body) if status == 200 else {}
        refused = why_not(worker, self._roster.workers.values())
        # Who starts or adds a worker is told by the refusal itself.
        if refused and refused != worker.refused and worker.healthy is not None:
            self._say(f"warning: worker {worker.url} cannot be used: {refused}")
        worker.refused = refused

    async def _get(self, worker: Worker, path: str) -> tuple[int, bytes]:
        return await worker.upstream.fetch("GET", path, worker.authorization, b"", self._settings.health_timeout_s)


def why_not(worker: Worker, others: Iterable[Worker]) -> str:
    """Why a worker cannot do what it is there for, beside others that do it already; empty where it can."""
    about = worker.about
    role = about.get("role")
    if role not in ("both", "prefill", "decode"):
        return "" if worker.role == "both" else "is no workbench server, and only these hand KV to each other"
    if role != worker.role:
        wanted = "does both halves of a request" if role == "both" else f"has the role {role}"
        return f"{wanted}, and was given as --{'worker' if worker.role == 'both' else worker.role}"
    if role != "both":
        if not _is_address(about.get("peer")):
            return "does not say where it takes its peers' connections"
        mine = tuple(about.get(name) for name in ALIKE)
        if mine != worker.accepted:
            worker.accepted = None
            for other in others:
                if other is worker or other.accepted is None or not other.healthy or other.draining:
                    continue
                for name, its, their in zip(ALIKE, mine, other.accepted, strict=True):
                    if its != their:
                        return f"{name} is {its!r}, and {their!r} at {other.url}"
            worker.accepted = mine
    return ""


def _is_address(said: Any) -> bool:
    """Whether a worker has said an address, which goes on to others in a header."""
    try:
        return isinstance(said, str) and said.isascii() and said.isprintable() and bool(split_address(said))
    except ValueError:
        return False


def models_in(body: bytes) -> dict[str, dict[str, Any]]:
    """The cards of a list of models by their ids; none where it is no such list."""
    data = object_in(body).get("data")
    cards = data if isinstance(data, list) else []
    return {card["id"]: card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)}
