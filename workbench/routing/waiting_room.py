"""Where requests wait while every worker has as many as it may have."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from workbench.routing.clocks import Within
from workbench.serving.refusals import Refusal

Place = TypeVar("Place")


@dataclass(eq=False)
class _Waiting(Generic[Place]):
    find: Callable[[], Place | None]
    place: asyncio.Future[Place]


class WaitingRoom(Generic[Place]):
    """First come, first served, but who could go only where there is no room holds up nobody who can go elsewhere."""

    def __init__(
        self,
        has_room: Callable[[], bool],
        give_back: Callable[[Place], None],
        most_waiting: int,
        timeout_s: float,
        within: Within,
    ) -> None:
        """``has_room`` says whether there may be a place for anybody; ``give_back`` takes one that nobody wants any more."""
        self._has_room = has_room
        self._give_back = give_back
        self._most_waiting = most_waiting
        self._timeout_s = timeout_s
        self._within = within
        self._waiting: deque[_Waiting[Place]] = deque()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    async def enter(self, find: Callable[[], Place | None], first: bool = False) -> Place:
        """Wait until ``find`` finds a place; ``first``: before all who wait, however many these are.

        Raises what ``find`` raises, and Refusal when too many wait, or for too long.
        """
        if (first or not self._waiting) and (found := find()) is not None:
            return found
        if not first and len(self._waiting) >= self._most_waiting:
            self.look()
            if len(self._waiting) >= self._most_waiting:
                raise Refusal("overloaded", f"overloaded: {len(self._waiting)} requests wait already", retry_after_s=1)
        mine = _Waiting(find, asyncio.get_running_loop().create_future())
        (self._waiting.appendleft if first else self._waiting.append)(mine)
        self.look()
        try:
            async with self._within(self._timeout_s):
                return await asyncio.shield(mine.place)
        except TimeoutError:
            if mine.place.done():  # at the same moment
                return mine.place.result()
            said = f"the request waited for more than {self._timeout_s:g} s (--queue-timeout of the router)"
            raise Refusal("queue_timeout", said, retry_after_s=1) from None
        except asyncio.CancelledError:
            if mine.place.done() and mine.place.exception() is None:
                self._give_back(mine.place.result())
            raise
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)

    def look(self) -> None:
        """Give the places that there are now to those that wait."""
        for one in list(self._waiting):
            if not self._has_room():
                return
            try:
                found = one.find()
            except Exception as error:
                one.place.set_exception(error)
            else:
                if found is None:
                    continue
                one.place.set_result(found)
            self._waiting.remove(one)
