"""Instances that are lost and come back, and pools whose number of instances follows the load, on the simulated clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf, isfinite
from typing import Literal, Protocol

from backends.simulated.clock import Clock
from reports.record.meta import FleetSpan
from workbench.recording.recorder import Recorder, RequestRow
from workbench.scheduler.config import Role
from workbench.settings.fleet_spec import Failure, Scaling

State = Literal["off", "starting", "up", "draining", "down"]
MOST_AT_ONCE = 2
"""A pool grows to so many times as many instances at most, each time it is looked at."""
SLACK = 0.5
"""Below this share of its target a signal says that there are too many instances."""
KV_AFTER = 0.8
"""Share of the KV of those left that may be in use once an instance is taken away."""


class Members(Protocol):
    """What sends requests to instances (:class:`~workbench.cluster.cluster.Cluster`,
    :class:`~workbench.cluster.pairs.Pairs`)."""

    def shut(self, number: int) -> None:
        """Send nothing new to an instance."""
        ...

    def back(self, number: int) -> None:
        """Send requests to an instance again."""
        ...

    def gone(self, number: int, written: Callable[[str], int]) -> None:
        """An instance is lost, with all it held."""
        ...

    def load(self, number: int) -> int:
        """Count the requests that an instance is not done with."""
        ...


class Machines(Protocol):
    """What runs the instances."""

    def begin(self, number: int) -> None:
        """Start an instance that was ended."""
        ...

    def end(self, number: int) -> Callable[[str], int]:
        """End an instance, whatever it is at; returns what says how much an open request had written there."""
        ...

    def waiting(self, number: int) -> int:
        """Count the requests that wait on an instance."""
        ...

    def kv_share(self, number: int) -> float:
        """The share of its KV that requests hold."""
        ...


@dataclass(frozen=True)
class FleetPool:
    """The instances of a pool: those of ``numbers`` of which the first ``begins`` are there from the beginning."""

    name: str
    role: Role
    numbers: range
    begins: int
    slo_s: float | None = None
    """TTFT, or of a pool that decodes TPOT, of requests that do not say."""
    scaling: Scaling | None = None


class Fleet:
    """Which instances are there. A change is noted in :attr:`spans`."""

    def __init__(
        self,
        clock: Clock,
        pools: Sequence[FleetPool],
        failures: Sequence[Failure],
        members: Members,
        machines: Machines,
        recorder: Recorder,
    ) -> None:
        self._clock, self._members, self._machines, self._recorder = clock, members, machines, recorder
        self._state: dict[int, State] = {}
        self._since_s: dict[int, float] = {}
        self._spans: list[FleetSpan] = []
        self._ran: set[int] = set()
        """Instances that have to be begun afresh before they take requests again."""
        self._changed_s: dict[str, float] = {}
        self._turn: dict[int, int] = {}
        """How often an instance has changed: what was meant for an earlier state does nothing."""
        self._ours = 0
        """Events of the fleet that have not happened."""
        self._over = False
        self.notes: list[str] = []
        """Sentences about what was asked for and did nothing."""
        self._pool_of = {number: pool.name for pool in pools for number in pool.numbers}
        for pool in pools:
            for number in pool.numbers:
                there = number - pool.numbers.start < pool.begins
                self._state[number], self._since_s[number] = ("up" if there else "off"), 0.0
                self._turn[number] = 0
                if there:
                    self._ran.add(number)
                else:
                    members.shut(number)
            if pool.scaling is not None:
                self._changed_s[pool.name] = -inf
                self._at(pool.scaling.every_s, partial(self._look, pool))
        by_name = {pool.name: pool for pool in pools}
        for failure in failures:
            number = by_name[failure.pool].numbers[failure.place]
            late = partial(self._idle_failure, failure, "the run was over by then")
            self._at(failure.at_s, partial(self._fail, number, failure), late)

    # -- the record --------------------------------------------------------------------------------------------------

    def spans(self, end_s: float) -> list[FleetSpan]:
        """What each instance was from when to when, up to the end of the run; the time in which it was not there is none."""
        last = [
            FleetSpan(number, state, self._since_s[number], end_s)
            for number, state in self._state.items()
            if state != "off" and end_s > self._since_s[number]
        ]
        spans = [
            replace(each, begin_s=round(each.begin_s, 9), end_s=round(each.end_s, 9)) for each in (*self._spans, *last)
        ]
        return sorted(spans, key=lambda span: (span.instance, span.begin_s))

    def _set(self, number: int, state: State) -> int:
        """Note that an instance is something else from now on; returns what tells this state from later ones."""
        now_s = self._clock.now_s()
        if self._state[number] != "off" and now_s > self._since_s[number]:
            self._spans.append(FleetSpan(number, self._state[number], self._since_s[number], now_s))
        self._state[number], self._since_s[number] = state, now_s
        self._turn[number] += 1
        return self._turn[number]

    # -- time --------------------------------------------------------------------------------------------------------

    def _at(self, moment_s: float, act: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
        """Do something at a moment, or something else if the run is over by then."""
        self._ours += 1

        def called() -> None:
            self._ours -= 1
            if not self._is_over():
                act()
            elif otherwise is not None:
                otherwise()

        self._clock.call_at(moment_s, called)

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._at(self._clock.now_s() + seconds, act)

    def _is_over(self) -> bool:
        """Tell whether nothing happens any more but for the fleet's own sake."""
        if not self._over and self._clock.events <= self._ours and not self._recorder.by_id:
            self._over = True
        return self._over

    # -- instances that are lost ---------------------------------------------------------------------------------------

    def _fail(self, number: int, failure: Failure) -> None:
        if self._state[number] in ("off", "down"):
            self._idle_failure(failure, "the instance was not there then")
            return
        starting = self._state[number] == "starting"
        turn = self._set(number, "down")
        if starting:
            self._members.shut(number)
        else:
            self._lose(number)
        if isfinite(failure.for_s):
            self._after(failure.for_s, partial(self._take_up, number, turn))

    def _idle_failure(self, failure: Failure, why: str) -> None:
        self.notes.append(f"fail: {failure.pool}.{failure.place} at {failure.at_s:g} s did nothing: {why}")

    def _lose(self, number: int) -> None:
        """End an instance with all it holds."""
        written = self._machines.end(number)
        self._members.gone(number, written)

    def _take_up(self, number: int, turn: int) -> None:
        """An instance takes requests from now on."""
        if self._turn[number] != turn:
            return
        if number in self._ran:
            self._machines.begin(number)
        self._ran.add(number)
        self._set(number, "up")
        self._changed_s[self._pool_of[number]] = self._clock.now_s()
        self._members.back(number)

    # -- pools that follow the load ------------------------------------------------------------------------------------

    def _look(self, pool: FleetPool) -> None:
        """Compare a pool's signal with its target, and change the number of its instances."""
        scaling = pool.scaling
        assert scaling is not None
        self._after(scaling.every_s, partial(self._look, pool))
        up = self._those(pool, "up")
        if not up:
            return
        now_s = self._clock.now_s()
        ratio = self._signal(pool, up) / scaling.target
        coming = len(self._those(pool, "starting"))
        if ratio > 1:
            present = len(up) + coming
            wanted = min(ceil(len(up) * ratio), MOST_AT_ONCE * present, scaling.most - len(self._those(pool, "down")))
            for _ in range(wanted - present):
                self._add(pool)
        elif ratio < SLACK and not coming and now_s - self._changed_s[pool.name] >= scaling.cool_down_s:
            self._take_away(pool, up)

    def _those(self, pool: FleetPool, state: State) -> list[int]:
        return [number for number in pool.numbers if self._state[number] == state]

    def _add(self, pool: FleetPool) -> None:
        """One more: an instance that is still draining takes requests again, else one starts."""
        assert pool.scaling is not None
        self._changed_s[pool.name] = self._clock.now_s()
        if draining := self._those(pool, "draining"):
            self._set(draining[0], "up")
            self._members.back(draining[0])
        elif off := self._those(pool, "off"):
            number = off[0]
            turn = self._set(number, "starting")
            self._after(pool.scaling.start_s, partial(self._take_up, number, turn))

    def _take_away(self, pool: FleetPool, up: list[int]) -> None:
        """One less, if that leaves enough: the one with the least to do, and of several the last one."""
        scaling = pool.scaling
        assert scaling is not None
        loads = {number: self._members.load(number) for number in up}
        number = min(up, key=lambda each: (loads[each], -each))
        kv_share = sum(map(self._machines.kv_share, up))
        if len(up) <= scaling.least or kv_share / max(len(up) - 1, 1) > KV_AFTER:
            return
        self._changed_s[pool.name] = self._clock.now_s()
        self._members.shut(number)
        turn = self._set(number, "draining")
        if isfinite(scaling.drain_s):
            self._after(scaling.drain_s, partial(self._cut_short, number, turn))
        self._let_go(number, turn)

    def _cut_short(self, number: int, turn: int) -> None:
        """An instance has drained for as long as it may."""
        if self._turn[number] == turn:
            self._lose(number)
            self._set(number, "off")

    def _let_go(self, number: int, turn: int) -> None:
        if self._turn[number] == turn and not self._members.load(number):
            self._machines.end(number)
            self._members.shut(number)
            self._set(number, "off")

    def ended(self) -> None:
        """A request has ended: an instance that drains may have nothing left. It is ended in an event of its own, because
        it may be the one that says so."""
        for number, state in self._state.items():
            if state == "draining" and not self._members.load(number):
                turn = self._turn[number]
                self._after(0.0, partial(self._let_go, number, turn))

    # -- signals -------------------------------------------------------------------------------------------------------

    def _signal(self, pool: FleetPool, up: Sequence[int]) -> float:
        scaling = pool.scaling
        assert scaling is not None
        if scaling.signal == "queue":
            return sum(map(self._machines.waiting, up)) / len(up)
        if scaling.signal == "kv":
            return sum(map(self._machines.kv_share, up)) / len(up)
        return self._missed(pool, scaling.every_s)

    def _missed(self, pool: FleetPool, window_s: float) -> float:
        """The share of requests that missed their objective: of a pool that decodes, of those that have ended since the last
        look; else of those that got their first token since then, and those that have waited too long already."""
        now_s = self._clock.now_s()
        decodes = pool.role == "decode"
        kept = missed = 0
        for row in reversed(self._recorder.rows):
            own_s = row.slo_tpot_s if decodes else row.slo_ttft_s
            limit_s = own_s if own_s == own_s else pool.slo_s
            if limit_s is None or not self._is_of(pool, row):
                continue
            late = _late(row, limit_s, now_s, window_s, decodes)
            missed += late is True
            kept += late is False
        return missed / (missed + kept) if missed + kept else 0.0

    def _is_of(self, pool: FleetPool, row: RequestRow) -> bool:
        number = row.handover.prefill_instance if pool.role == "prefill" and row.handover is not None else row.instance
        return number in pool.numbers


def _late(row: RequestRow, limit_s: float, now_s: float, window_s: float, decodes: bool) -> bool | None:
    """Tell whether a request missed its objective since the last look; None where nothing was to be seen of it since."""
    first_s, finish_s = row.first_token_s, row.finish_s
    if decodes:
        if not now_s - window_s < finish_s <= now_s or row.output_tokens < 2:
            return None
        return (finish_s - first_s) / (row.output_tokens - 1) > limit_s
    if first_s == first_s:
        return first_s - row.arrival_s > limit_s if now_s - window_s < first_s <= now_s else None
    if finish_s == finish_s:
        return None
    return True if now_s - row.arrival_s > limit_s else None
