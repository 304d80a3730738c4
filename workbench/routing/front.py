"""The application of a router: its paths, and what belongs to them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workbench.routing.admin import TO_ALL, Admin
from workbench.routing.asked import asked_in
from workbench.routing.attempts import Passed
from workbench.routing.circuit import CircuitState
from workbench.routing.clocks import Clocks
from workbench.routing.dispatch import Dispatch
from workbench.routing.headers import to_worker
from workbench.routing.health import Health, why_not
from workbench.routing.pair_attempt import Rooms
from workbench.routing.passing import Means, Passing, session_in
from workbench.routing.roster import Roster
from workbench.routing.route_settings import RouteSettings
from workbench.routing.router_metrics import RouterMetrics
from workbench.routing.worker import Worker
from workbench.scheduler.settings import ConfigError
from workbench.serving.http.doors import check_key, error_handlers, read_body
from workbench.serving.http.errors import ApiError, api_error, json_response
from workbench.serving.http.metrics_page import CONTENT_TYPE
from workbench.serving.http.request_ids import given_id, id_of
from workbench.serving.refusals import Refusal

Endpoint = Callable[[Request], Awaitable[Any]]
PASSED_ON = (
    *("/generate", "/open_session", "/close_session", "/tokenize", "/detokenize"),
    *("/pooling", "/classify", "/score", "/rerank", "/encode"),
)
"""Paths beside /v1 that servers have for what one worker answers; others are of one server, and are asked there."""
BY_PAIRS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/generate")
"""What a pair answers. It keeps no sessions."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Front:
    """A router: ``app`` is what listens, between :meth:`start` and :meth:`close`."""

    def __init__(
        self,
        settings: RouteSettings,
        address: str = "127.0.0.1",
        clocks: Clocks | None = None,
        say: Callable[[str], None] = _say,
    ) -> None:
        """``address`` is the one that it listens on; ``say`` is told, in a line, what whoever runs it should know. Raises
        ConfigError for workers that there cannot be."""
        clocks = clocks or Clocks()
        self._settings = settings
        self._say = say
        self.metrics = RouterMetrics()
        self.roster = Roster(settings, clocks, self._circuit_changed)
        self.roster.left = self._left
        self.health = Health(settings, self.roster, say, clocks.sleep)
        self.dispatch = Dispatch(settings, self.roster, clocks.within)
        self.health.looked = self.dispatch.room.look
        self.metrics.shows(self.roster, self.dispatch)
        self._means = Means(self.dispatch, self.metrics, settings.retries, Rooms(), clocks.now_s, self.health.doubt)
        self._admin = Admin(settings, self.roster, self.health, self.dispatch.room.look, address)
        self._leaving: set[asyncio.Task[None]] = set()
        self._draining = False
        self._open = 0
        self.idle = asyncio.Event()
        """Set while no request is under way."""
        self.idle.set()
        self.app = self._starlette()

    async def start(self) -> None:
        """Look at the workers, and go on doing so. Raises ConfigError for one that can never do what it is there for; one
        that does not answer may come yet."""
        await self.health.first_looks()
        workers = self.roster.workers.values()
        for worker in workers:
            worker.accepted = None  # one after the other now, so that the first says what the others have to be
        for worker in workers:
            if not worker.healthy:
                continue
            worker.refused = why_not(worker, workers)
            if worker.refused:
                name = "worker" if worker.role == "both" else worker.role
                raise ConfigError(f"{name}: {worker.url} {worker.refused}")
        for worker in workers:
            self.health.watch(worker)

    def drain(self) -> None:
        """Take no new requests."""
        self._draining = True

    async def close(self) -> None:
        """End the looks, and the connections to workers."""
        await self.health.close()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        for worker in self.roster.workers.values():
            worker.upstream.close()

    def _circuit_changed(self, worker: Worker, state: CircuitState) -> None:
        self.metrics.circuit_changed(worker, state)
        if state != "half_open":
            self._say(f"note: the breaker of worker {worker.url} is {state}")

    def _left(self, worker: Worker) -> None:
        async def leave() -> None:
            await self.health.leave(worker)
            worker.upstream.close()

        task = asyncio.create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    # -- paths -----------------------------------------------------------------------------------------------------------

    def _starlette(self) -> Starlette:
        def route(
            path: str, endpoint: Endpoint, *methods: str, key: Callable[[Request], None] = self._check_key
        ) -> Route:
            async def run(request: Request) -> Any:
                key(request)
                return await endpoint(request)

            return Route(path, run, methods=list(methods))

        admin = self._admin
        routes = [
            route("/health", self.healthy, "GET", key=lambda request: None),
            route("/metrics", self.metrics_page, "GET", key=lambda request: None),
            route("/workers", admin.workers, "GET", key=admin.check_key),
            route("/workers", admin.add, "POST", key=admin.check_key),
            route("/workers/{named:path}", admin.remove, "DELETE", key=admin.check_key),
            *(route(f"/{name}", admin.of_all(name), "POST") for name in TO_ALL),
            route("/v1/models", self.models, "GET"),
            route("/v1/models/{model:path}", self.model, "GET"),
            *(route(path, self.passed_on, "POST") for path in (BY_PAIRS if self._settings.paired else PASSED_ON)),
        ]
        if not self._settings.paired:
            routes.append(route("/v1/{path:path}", self.passed_on, "GET", "POST", "DELETE"))
        return Starlette(routes=routes, exception_handlers=error_handlers(self.metrics.refused))

    def _check_key(self, request: Request) -> None:
        check_key(request.headers, self._settings.api_key)

    async def passed_on(self, request: Request) -> Any:
        """A request that one worker, or a pair, answers."""
        if self._draining:
            raise api_error(Refusal("draining", "the router is shutting down", retry_after_s=1))
        given_id(request.headers)
        path: str = request.scope["path"]
        if not {".", ".."}.isdisjoint(path.replace("\\", "/").split("/")):
            # What stands before a worker may take it for a path that no client is let through to.
            raise ApiError(400, "the path has . or .. in it")
        self._open += 1
        self.idle.clear()
        try:
            body = await read_body(request, self._settings.max_body_bytes)
            asked = asked_in(body, request.headers, self._settings.session_header.lower())
            headers = to_worker(request.scope["headers"], id_of(request.scope), self._settings.api_key is not None)
            passed = Passed(request.method, _target(request), headers, body)
        except BaseException:
            self._ended()
            raise
        sessions: Callable[[int, bytes, tuple[Worker, ...]], None] | None = None
        if path == "/open_session":
            sessions = self._session_opened
        elif path == "/close_session":
            sessions = partial(self._session_closed, asked.session)
        passing = Passing(self._means, asked, passed, sessions)

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            try:
                await passing(scope, receive, send)
            finally:
                self._ended()

        return answer

    def _ended(self) -> None:
        self._open -= 1
        if self._open == 0:
            self.idle.set()

    def _session_opened(self, status: int, answer: bytes, workers: tuple[Worker, ...]) -> None:
        if status < 400:
            self.dispatch.sticky.went(session_in(answer), *(worker.number for worker in workers))

    def _session_closed(self, session: str | None, status: int, answer: bytes, workers: tuple[Worker, ...]) -> None:
        self.dispatch.sticky.forget(session)

    def _models(self) -> dict[str, dict[str, Any]]:
        """The models that there are, each as the first worker shows it that has it; what fits is what fits them all."""
        merged: dict[str, dict[str, Any]] = {}
        for worker in self.roster.workers.values():
            if not (worker.healthy and not worker.refused):
                continue
            for name, card in worker.models.items():
                mine = merged.setdefault(name, dict(card))
                lengths = [each.get("max_model_len") for each in (mine, card)]
                if all(isinstance(length, int) for length in lengths):
                    mine["max_model_len"] = min(lengths)  # type: ignore[type-var]  # whole numbers
        return merged

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": list(self._models().values())})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if (card := self._models().get(name)) is None:
            raise ApiError(404, f"model: {name[:200]!r} is served by no worker", code="model_not_found", param="model")
        return json_response(card)

    async def healthy(self, request: Request) -> Response:
        workers = [worker for worker in self.roster.workers.values() if worker.usable]
        said = {"status": "ok", "workers": len(workers)}
        if self._draining:
            return json_response({**said, "status": "draining"}, 503)
        if not self.roster.serves:
            return json_response({**said, "status": "no_worker"}, 503)
        return json_response(said)

    async def metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _target(request: Request) -> bytes:
    """Path and query, as they came."""
    raw: bytes = request.scope.get("raw_path") or request.url.path.encode()
    query: bytes = request.scope["query_string"]
    return raw.partition(b"?")[0] + (b"?" + query if query else b"")
