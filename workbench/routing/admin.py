"""/workers: who is there, who comes and who goes. And what is asked of all workers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from workbench.handover.addresses import is_loopback
from workbench.routing.connection import WorkerFailed
from workbench.routing.headers import to_worker, with_key_of
from workbench.routing.health import Health
from workbench.routing.roster import Roster
from workbench.routing.route_settings import RouteSettings
from workbench.routing.upstream import object_in
from workbench.routing.worker import Worker
from workbench.scheduler.config import Role
from workbench.scheduler.settings import ConfigError
from workbench.serving.http import bodies
from workbench.serving.http.doors import check_key, read_body
from workbench.serving.http.errors import ApiError, json_response
from workbench.serving.http.request_ids import id_of
from workbench.serving.listen_settings import check_api_key

TO_ALL = ("abort", "flush_cache", "pause", "resume")
"""Endpoints of a server that a router passes on to all its workers."""


class AddWorker(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /workers."""

    url: str
    role: Role = "both"
    api_key: str | None = None
    """Its key, where it is not that of the others."""


class Admin:
    """The endpoints about workers."""

    def __init__(
        self,
        settings: RouteSettings,
        roster: Roster,
        health: Health,
        changed: Callable[[], None],
        address: str,
    ) -> None:
        """``changed`` is told when there may be more room; ``address`` is the one that the router listens on."""
        self._settings = settings
        self._roster = roster
        self._health = health
        self._changed = changed
        self._local = is_loopback(address)

    def check_key(self, request: Request) -> None:
        """Raise ApiError for who may not ask about workers. A worker sees what clients write, so it takes more than a
        client's key to add one."""
        if self._settings.admin_key is not None:
            check_key(request.headers, self._settings.admin_key)
        elif self._settings.api_key is not None or not self._local:
            raise ApiError(403, "/workers: a router that others reach needs --admin-key for it", code="no_admin_key")

    async def workers(self, request: Request) -> Response:
        return json_response({"workers": [shown(worker) for worker in self._roster.workers.values()]})

    async def add(self, request: Request) -> Response:
        asked: AddWorker = bodies.parse(await read_body(request, self._settings.max_body_bytes), AddWorker)
        try:
            check_api_key("api_key", asked.api_key)
            worker = self._roster.add(asked.url, asked.role, asked.api_key)
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value", param=str(error).partition(":")[0]) from error
        try:
            await self._health.look(worker)
        except BaseException:
            self._roster.drain(worker)
            raise
        if worker.draining:
            raise ApiError(409, f"{worker.url} was removed while it was looked at", code="worker_removed", param="url")
        if worker.refused:
            self._roster.drain(worker)
            raise ApiError(400, f"{worker.url} {worker.refused}", code="invalid_value", param="url")
        self._health.watch(worker)
        self._changed()
        return json_response(shown(worker), 201)

    async def remove(self, request: Request) -> Response:
        named = request.path_params["named"]
        worker = self._roster.find(named)
        if worker is None:
            raise ApiError(404, f"{named[:200]!r} is neither the id nor the URL of a worker", code="worker_not_found")
        self._roster.drain(worker)
        return json_response(shown(worker))

    def of_all(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint ``/name``, asked of every worker that is well."""

        async def ask(request: Request) -> Response:
            body = await read_body(request, self._settings.max_body_bytes)
            headers = to_worker(request.scope["headers"], id_of(request.scope), self._settings.api_key is not None)
            asked = [worker for worker in self._roster.workers.values() if worker.healthy and not worker.refused]
            limit_s = self._settings.first_byte_timeout_s

            async def one(worker: Worker) -> tuple[int, bytes]:
                try:
                    return await worker.upstream.fetch("POST", f"/{name}", with_key_of(worker, headers), body, limit_s)
                except WorkerFailed as error:
                    return 502, msgspec.json.encode({"error": {"message": str(error)}})

            answers = await asyncio.gather(*map(one, asked))
            return of_all(name, asked, answers)

        return ask


def of_all(name: str, asked: list[Worker], answers: list[tuple[int, bytes]]) -> Response:
    """What all have answered, as one answer. Raises ApiError where not all have done it."""
    failed = [(w, status, body) for w, (status, body) in zip(asked, answers, strict=True) if status >= 400]
    if not asked:
        raise ApiError(503, "no worker is well", code="no_worker", type="server_error", retry_after_s=1)
    if len(failed) == len(asked) and failed[0][1] < 500:
        return Response(failed[0][2], failed[0][1], media_type="application/json")  # they agree on what is wrong
    if failed:
        said = ", ".join(f"worker {worker.number} answers {status}" for worker, status, _ in failed)
        raise ApiError(502, f"/{name}: not done by all: {said}", code="worker_failed", type="server_error")
    if name == "abort":
        return json_response({"aborted": sum(_aborted(body) for _, body in answers)})
    return json_response({"status": "ok"})


def _aborted(body: bytes) -> int:
    count = object_in(body).get("aborted", 0)
    return count if isinstance(count, int) else 0


def shown(worker: Worker) -> dict[str, Any]:
    """A worker as /workers shows it."""
    return {
        "id": str(worker.number),
        "url": worker.url,
        "role": worker.role,
        "state": worker.state,
        "breaker": worker.circuit.state,
        "running": worker.running,
        "models": sorted(worker.models),
        "why": worker.refused or worker.why or None,
    }
