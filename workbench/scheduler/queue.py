"""The waiting queue: order of service, ageing, and how long a request may wait."""

from __future__ import annotations

import math
import random
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.kv.prefix_cache import PrefixCache
from workbench.scheduler.policy import PREFIX_LIMIT, Policy, PolicyView, check_permutation, load_policy
from workbench.scheduler.request import Req

FOREVER = 1 << 62


class WaitingQueue:
    """Requests that hold no KV. ``waiting`` is in order of arrival, and a retracted request returns to its place in it,
    unless rules of an engine have it otherwise (``requeue``, ``queue_order``)."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache, clock: Callable[[], float]) -> None:
        self.waiting: list[Req] = []
        self.clock = clock
        self._config = config
        self._cache = cache
        self._policy = load_policy(config.policy)
        self._rng = random.Random(config.seed)
        self._entries = count()
        self._put_back: Callable[[Req], None] = {
            "arrival": self.put,
            "front": self._put_first,
            "back": self.waiting.append,
        }[config.requeue]
        self._refresh = config.refresh_waiting
        self._looks = 0
        self._look_touches = config.look_touches
        self._defer_shared = config.defer_shared_tokens
        self._by_arrival = config.requeue == "arrival" and config.queue_order == "arrival"
        """``waiting`` is in order of arrival."""
        self._keeps_order = config.queue_order == "policy"
        # In order of arrival, so in the order in which they run out.
        self._queue_deadlines: deque[Req] = deque()
        self._request_deadlines: deque[Req] = deque()
        self.elsewhere = 0
        """Requests that wait in other queues of the scheduler, for room or for their KV."""

    def __len__(self) -> int:
        return len(self.waiting)

    def take_config(self, config: SchedulerConfig) -> None:
        """Go on under other settings."""
        if config.policy != self._config.policy:
            self._policy = load_policy(config.policy)
        self._config = config

    # -- in ----------------------------------------------------------------------------------------------------------

    def arrive(self, req: Req) -> None:
        """Take in a request that has just come; its timeouts begin."""
        self.put(req)
        self.watch(req)

    def watch(self, req: Req) -> None:
        """Begin the timeouts of a request that has just come, wherever it waits."""
        req.queued = next(self._entries)
        if self._config.queue_timeout is not None:
            self._queue_deadlines.append(req)
        if self._config.request_timeout is not None:
            self._request_deadlines.append(req)

    def put(self, req: Req) -> None:
        """Put a request at its place by arrival: behind everybody, or where it was before it got in."""
        if self.waiting and self.waiting[-1].seq > req.seq:
            insort(self.waiting, req, key=lambda r: r.seq)
        else:
            self.waiting.append(req)

    def put_back(self, req: Req) -> None:
        """Put a request that has lost its KV into the queue again."""
        req.queued = next(self._entries)
        self._put_back(req)

    def _put_first(self, req: Req) -> None:
        self.waiting.insert(0, req)

    # -- order -------------------------------------------------------------------------------------------------------

    def ordered(self) -> list[Req]:
        """Sort requests into their order of service: those passed over too often first, the rest as the policy says."""
        waiting = self.waiting
        if type(self._policy) is Policy:
            ordered = list(waiting)
            if self._refresh is not None:
                self._touch(ordered)
            return ordered
        overdue = [req for req in waiting if self.overdue(req)]
        if overdue:
            waiting = [req for req in waiting if not self.overdue(req)]
        view = PolicyView(self._cache, self.clock(), self._rng, self._look_touches, self._defer_shared)
        ordered = self._policy.order(list(waiting), view)
        check_permutation(ordered, waiting, self._policy)
        ordered = overdue + ordered
        if self._keeps_order:
            self.waiting[:] = ordered
        if self._refresh is not None and (not self._policy.by_prefix or len(ordered) > PREFIX_LIMIT):
            self._touch(ordered)
        return ordered

    def _touch(self, ordered: Sequence[Req]) -> None:
        """Let the prefixes of who goes first count as used, the first one's last, every so many looks."""
        if self._looks % (self._refresh or 1) == 0:
            for req in reversed(ordered[:PREFIX_LIMIT]):
                self._cache.touch(req)
        self._looks += 1

    def overdue(self, req: Req) -> bool:
        """Tell whether later arrivals have gone before a request as often as they may."""
        return req.passed_over >= (self._config.max_passed_over or FOREVER)

    # -- out ---------------------------------------------------------------------------------------------------------

    def admitted(self, reqs: Sequence[Req]) -> None:
        """Take the admitted out and count, for the others, that a later arrival went before them."""
        if not reqs:
            return
        newest = max(req.seq for req in reqs)
        self.remove(reqs)
        for req in self.waiting:
            if req.seq > newest:
                if self._by_arrival:
                    break
                continue
            req.passed_over += 1

    def remove(self, gone: Sequence[Req]) -> None:
        """Take requests out; quick when they are the queue's head."""
        queue = self.waiting
        if all(a is b for a, b in zip(queue, gone, strict=False)) and len(gone) <= len(queue):
            del queue[: len(gone)]
        else:
            ids = {id(req) for req in gone}
            queue[:] = [req for req in queue if id(req) not in ids]

    # -- timeouts ----------------------------------------------------------------------------------------------------

    @property
    def has_deadlines(self) -> bool:
        """Some request may time out, in the queue or later."""
        return bool(self._queue_deadlines or self._request_deadlines)

    def due_s(self) -> float:
        """Return when the next request that has not ended will have run out of time, with a nanosecond to spare, for sums
        of times round; infinite where none does."""
        due_s = math.inf
        for deadlines, limit_s in (
            (self._queue_deadlines, self._config.queue_timeout),
            (self._request_deadlines, self._config.request_timeout),
        ):
            while deadlines and deadlines[0].finish is not None:
                deadlines.popleft()
            if deadlines:
                due_s = min(due_s, deadlines[0].arrival_s + (limit_s or 0.0) + 1e-9)
        return due_s

    def timed_out(self) -> Iterator[tuple[Req, str]]:
        """Each request whose time is over, in the queue or altogether, and which of the two; the caller ends it."""
        now = self.clock()
        for deadlines, limit_s, why, unscheduled_only in (
            (self._queue_deadlines, self._config.queue_timeout, "queue_timeout", True),
            (self._request_deadlines, self._config.request_timeout, "request_timeout", False),
        ):
            while deadlines and (deadlines[0].finish is not None or now - deadlines[0].arrival_s >= (limit_s or 0.0)):
                req = deadlines.popleft()
                if req.finish is None and not (unscheduled_only and req.scheduled):
                    yield req, why
