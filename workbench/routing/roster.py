"""The workers of a router, by role, and the simulator's routers among them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from workbench.cluster.pairs import Side
from workbench.cluster.router import Router, make_router
from workbench.routing.circuit import Circuit, CircuitState
from workbench.routing.clocks import Clocks
from workbench.routing.route_settings import RouteSettings, parse_url
from workbench.routing.upstream import Timeouts, Upstream
from workbench.routing.worker import Worker
from workbench.scheduler.config import Role
from workbench.scheduler.settings import ConfigError, is_own

ROLES: dict[bool, tuple[Role, ...]] = {False: ("both",), True: ("prefill", "decode")}
"""Roles of workers, without pairs and with them."""


class Roster:
    """Workers that come and go. A place in a router that one has left is taken by the next that comes."""

    def __init__(
        self,
        settings: RouteSettings,
        clocks: Clocks,
        circuit_changed: Callable[[Worker, CircuitState], None] = lambda worker, state: None,
    ) -> None:
        self._settings = settings
        self._clocks = clocks
        self._circuit_changed = circuit_changed
        self._numbers = count()
        self._free = count(-1, -1)
        self.workers: dict[int, Worker] = {}
        self.left: Callable[[Worker], None] = lambda worker: None
        """Told of a worker that is gone."""
        self.sides: dict[Role, Side] = {}
        for role in ROLES[settings.paired]:
            kind = settings.router_of(role)
            given = sum(each == role for each, _ in settings.given)
            # One alone would not be counted for, and another may come; a place that nobody has changes no choice.
            places = given if is_own(kind) else max(given, 2)
            numbers = [next(self._free) for _ in range(places)]
            self.sides[role] = Side(numbers, make_router(kind, places, clocks.now_s))
        for role, url in settings.given:
            self.add(url, role)

    def add(self, url: str, role: Role, api_key: str | None = None) -> Worker:
        """One more worker. Raises ConfigError for one that there is, or that there cannot be."""
        url = parse_url("url", url)
        if role not in self.sides:
            raise ConfigError(f"role: {role!r} is not one of {', '.join(self.sides)}, which this router has")
        if any(worker.url == url for worker in self.workers.values()):
            raise ConfigError(f"url: {url} is a worker of this router already")
        place = self._place(role)
        s = self._settings
        circuit = Circuit(s.breaker_failures, s.breaker_open_s, s.breaker_successes, self._clocks.now_s)
        timeouts = Timeouts(s.connect_timeout_s, s.first_byte_timeout_s, s.silence_timeout_s)
        key = s.worker_api_key if api_key is None else api_key
        worker = Worker(next(self._numbers), url, role, Upstream(url, timeouts, self._clocks.within), circuit, key)
        circuit.changed = lambda state: self._circuit_changed(worker, state)
        self.workers[worker.number] = worker
        self.sides[role].numbers[place] = worker.number
        return worker

    def _place(self, role: Role) -> int:
        """A place in the router of a role that nobody has. Raises ConfigError where there is none."""
        side = self.sides[role]
        free = next((place for place, number in enumerate(side.numbers) if number < 0), None)
        if free is None:
            if not isinstance(side.router, Router):
                raise ConfigError(
                    f"url: {self._settings.router_of(role)} was made for {len(side.numbers)} workers and takes no more"
                )
            side.numbers.append(next(self._free))
            free = side.router.add()
        elif isinstance(side.router, Router):
            side.router.replaced(free)
        return free

    def drain(self, worker: Worker) -> None:
        """Send a worker nothing new; it goes when nothing is under way there."""
        worker.draining = True
        self.ended_at(worker)

    def ended_at(self, worker: Worker) -> None:
        """A request at a worker has ended."""
        if worker.draining and worker.running == 0 and self.workers.pop(worker.number, None) is not None:
            numbers = self.sides[worker.role].numbers
            numbers[numbers.index(worker.number)] = next(self._free)
            self.left(worker)

    def find(self, named: str) -> Worker | None:
        """The worker of that number or URL."""
        if named.isdecimal():
            return self.workers.get(int(named))
        try:
            url = parse_url("worker", named)
        except ConfigError:
            return None
        return next((worker for worker in self.workers.values() if worker.url == url), None)

    def of(self, role: Role) -> list[Worker]:
        """The workers of a role."""
        return [worker for worker in self.workers.values() if worker.role == role]

    def usable(self, role: Role) -> list[Worker]:
        """Those of a role that a request may be sent to now."""
        return [worker for worker in self.workers.values() if worker.role == role and worker.usable]

    @property
    def serves(self) -> bool:
        """Whether a request would find a worker, or a pair."""
        return all(self.usable(role) for role in self.sides)
