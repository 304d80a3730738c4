"""The choice of the worker, or the pair, for a request: the simulator's routers, among those that may be sent to."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from workbench.cluster.pairs import Side, choose_pair
from workbench.routing.asked import Asked
from workbench.routing.clocks import Within
from workbench.routing.roster import Roster
from workbench.routing.route_settings import RouteSettings
from workbench.routing.sticky import Sticky
from workbench.routing.waiting_room import WaitingRoom
from workbench.routing.worker import Worker
from workbench.scheduler.config import Role
from workbench.scheduler.own_code import failure
from workbench.scheduler.settings import ConfigError
from workbench.serving.http.errors import ApiError


@dataclass(eq=False)
class Sending:
    """A request under way at a worker: counted there, in its router and at its breaker until it ends."""

    worker: Worker
    side: Side
    tokens: int
    ended_there: Callable[[Worker], None]
    begun: tuple[int, int] = field(init=False)
    _answered: bool = False
    _ended: bool = False

    def __post_init__(self) -> None:
        self.begun = self.worker.circuit.begin()
        self.worker.running += 1

    def answered(self) -> None:
        """The first byte of its answer has come, or it ended without one."""
        if not self._answered:
            self._answered = True
            self.side.answered(self.worker.number, self.tokens)

    def ended(self, well: bool | None) -> None:
        """It has ended there: well, by the worker's failure, or (None) by nothing that tells of the worker."""
        if self._ended:
            return
        self._ended = True
        self.worker.circuit.end(self.begun, well)
        self.worker.running -= 1
        try:
            self.answered()
            self.side.left(self.worker.number, self.tokens)
        finally:  # a router of one's own may fail
            self.ended_there(self.worker)


class Dispatch:
    """Chooses for each request; where all have as many as they may have, it waits."""

    def __init__(self, settings: RouteSettings, roster: Roster, within: Within) -> None:
        self._settings = settings
        self._roster = roster
        self.sticky = Sticky()
        self.room: WaitingRoom[tuple[Sending, ...]] = WaitingRoom(
            self._has_room, _give_back, settings.max_queue, settings.queue_timeout_s, within
        )

    async def send(
        self, asked: Asked, failed: Collection[int] = (), lost: tuple[int, int] | None = None, again: bool = False
    ) -> tuple[Sending, ...]:
        """The worker for a request, or its prefill and its decode worker. Those that ``failed`` it get it only where
        there is no other; ``lost``: the pair that lost it; ``again``: it has waited before. Raises Refusal or ApiError."""
        return await self.room.enter(lambda: self._choose(asked, failed, lost), first=again)

    def has_other(self, worker: Worker, failed: Collection[int]) -> bool:
        """Whether in place of a worker there is another one, beside those that failed a request."""
        return any(w is not worker and w.number not in failed for w in self._roster.usable(worker.role))

    def _choose(
        self, asked: Asked, failed: Collection[int], lost: tuple[int, int] | None
    ) -> tuple[Sending, ...] | None:
        pinned = () if lost else self.sticky.workers(asked.session)
        for role, side in self._roster.sides.items():
            allowed = {worker.number for worker in self._allowed(role, asked, failed, pinned)}
            if not allowed:
                return None
            side.gone = {number for number in side.numbers if number not in allowed}
        sides = self._roster.sides
        try:
            if "both" in sides:
                chosen: tuple[int, ...] = (sides["both"].choose(asked),)
            else:
                chosen = choose_pair(sides["prefill"], sides["decode"], asked, lost)
        except Exception as error:
            said = str(error) if isinstance(error, ConfigError) else failure(error)
            if said is None:
                raise
            raise ApiError(500, said, code="router_failed", type="server_error") from error
        self.sticky.went(asked.session, *chosen)
        return tuple(
            Sending(self._roster.workers[number], side, len(asked.prompt), self._ended)
            for number, side in zip(chosen, sides.values(), strict=True)
        )

    def _allowed(self, role: Role, asked: Asked, failed: Collection[int], pinned: Collection[int]) -> list[Worker]:
        """The workers among which the router may choose; none where all of them have as many requests as they may have.
        Raises ApiError where there is no worker."""
        among = self._roster.usable(role)
        if not among:
            raise self._no_worker(role)
        among = [worker for worker in among if asked.model in worker.models] or among
        among = [worker for worker in among if worker.number not in failed] or among
        among = [worker for worker in among if worker.number in pinned] or among
        return [worker for worker in among if self._takes_more(worker)]

    def _takes_more(self, worker: Worker) -> bool:
        most = self._settings.worker_requests
        return most is None or worker.running < most

    def _has_room(self) -> bool:
        """Whether a request would not have to wait for another to end."""
        return all(
            not usable or any(map(self._takes_more, usable)) for usable in map(self._roster.usable, self._roster.sides)
        )

    def _ended(self, worker: Worker) -> None:
        self._roster.ended_at(worker)
        self.room.look()

    def _no_worker(self, role: Role) -> ApiError:
        waits_s = [w.circuit.reopens_in_s for w in self._roster.of(role) if w.healthy and w.circuit.state == "open"]
        soon_s = min([*waits_s, self._settings.health_interval_s])
        kind = "worker" if role == "both" else f"{role} worker"
        return ApiError(
            503,
            f"no {kind} can take requests now",
            code="no_worker",
            type="server_error",
            retry_after_s=max(1, math.ceil(soon_s)),
        )


def _give_back(sent: tuple[Sending, ...]) -> None:
    for each in sent:
        each.ended(None)
