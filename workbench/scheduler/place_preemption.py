"""Taking the place of running requests of lower priority for a waiting one (``preempt_for = "place"``)."""

from __future__ import annotations

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.parts import Parts
from workbench.scheduler.request import Req
from workbench.scheduler.slots import Slot


class PlacePreemption:
    """Retracts the least important running requests of a slot, and of equals who came into the queue last.

    How many, goes by what they may yet write: until that, and the KV left, is as much as the request was seen to need when
    it was last looked at. One at least.
    """

    def __init__(self, config: SchedulerConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts

    def make_room(self, req: Req, slot: Slot, total: float) -> bool:
        """Take places, if what their owners may yet write suffices; whether ``req`` can be let in now. ``total`` is the KV,
        in tokens, that a new request may count on so far."""
        threshold = self._config.preempt_threshold
        if threshold is None:
            return False
        kv, estimate, flights = self._parts.kv, self._parts.estimate, self._parts.flights
        running = slot.running
        lacks = req.last_need + estimate.most(req.max_new) - total
        victims: list[Req] = []
        expected = estimate.expected_of(running)
        for victim in sorted(
            (one for one in expected if one.finish is None), key=lambda one: (one.priority, -one.queued)
        ):
            if req.priority - victim.priority < threshold:
                break
            victims.append(victim)
            lacks -= expected[victim]
            if lacks <= 0:
                break
        if not victims or lacks > 0:
            return False
        left = len(expected)
        gone = [index for index, one in enumerate(running.reqs) if one in victims]
        ending = [one for one in flights.ending() if one in victims]
        for victim in [*running.remove(gone), *ending]:
            self._parts.lifecycle.retract(victim, requeue=False)
            left -= 1
            if self._config.retract_ahead is not None:
                kv.free_up(kv.pages_for(left * self._config.retract_ahead))
        for victim in victims:
            self._parts.queue.put_back(victim)
        return flights.free_rows > 0
