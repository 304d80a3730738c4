"""Simulated clients: they deliver a trace's requests at their times, or as earlier ones end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator

import simpy

from workbench.clients.messages import ClientRequest, Session

Deliver = Callable[[ClientRequest, float], None]
"""Takes a request and its arrival time."""
Waiting = Callable[[float, float], None]
"""Called again and again while nothing runs, with the moment at which the next request comes and the present one."""


class Clients:
    """Replays a trace: open loop at its arrivals, or ``concurrency`` at a time. Later turns of a session start when the
    turn before has ended and the user has thought, in either case."""

    def __init__(
        self, env: simpy.Environment, trace: Iterable[ClientRequest], deliver: Deliver, concurrency: int | None = None
    ) -> None:
        self._env = env
        self._deliver = deliver
        self._sessions: dict[str, Session] = {}
        """By the name that later turns have it by."""
        self._concurrency = concurrency
        self._stream: Iterator[ClientRequest] = iter(trace)
        self._ahead: ClientRequest | None = None
        self.fault: Exception | None = None
        """What reading the trace or delivering a request of it ran into. Kept for the run to raise: SimPy would rebuild it
        from its text."""
        if concurrency is None:
            env.process(self._replay())
        else:
            for _ in range(concurrency):
                if not self._start_next():
                    break

    def ended(self, request: ClientRequest) -> None:
        """A delivered request has ended, however."""
        session = request.session
        if session is None:
            if self._concurrency is not None:
                self._start_next()
            return
        session.running = False
        session.ended_s = self._env.now
        if self._concurrency is not None:
            self._read_turns()
        if session.turns:
            self._env.process(self._next_turn(session))
        elif self._concurrency is not None:
            self._start_next()

    def _replay(self) -> Generator[simpy.Event, None, None]:
        while self.fault is None and (request := self._read()) is not None:
            arrival_s = request.trace.arrival_s
            if arrival_s is None:
                self._later_turn(request)
                continue
            if arrival_s > self._env.now:
                yield self._env.timeout(arrival_s - self._env.now)
            self._start(request, arrival_s)

    def _read(self) -> ClientRequest | None:
        try:
            return next(self._stream, None)
        except Exception as error:
            self.fault = error
            return None

    def _start(self, request: ClientRequest, arrival_s: float) -> None:
        if request.trace.session_id is not None:
            request.session = self._sessions.setdefault(request.trace.session_id, Session())
            request.session.running = True
        try:
            self._deliver(request, arrival_s)
        except ValueError as error:  # token ids, too, are read only now
            self.fault = self.fault or error

    def _later_turn(self, request: ClientRequest) -> None:
        session = self._sessions[request.trace.session_id or ""]
        session.turns.append(request)
        if not session.running and len(session.turns) == 1:
            self._env.process(self._next_turn(session))

    def _next_turn(self, session: Session) -> Generator[simpy.Event, None, None]:
        session.running = True
        due_s = session.ended_s + session.turns[0].trace.think_time_s
        yield self._env.timeout(max(due_s - self._env.now, 0.0))
        self._start(session.turns.popleft(), self._env.now)

    def _start_next(self) -> bool:
        """Closed loop: deliver the next request or first turn of the trace now; False when there is none."""
        self._read_turns()
        request, self._ahead = self._ahead, None
        if request is None:
            return False
        self._start(request, self._env.now)
        return True

    def _read_turns(self) -> None:
        """Read up to the next request that starts something new."""
        while self._ahead is None:
            request = self._read()
            if request is None:
                return
            if request.trace.arrival_s is None:
                self._sessions[request.trace.session_id or ""].turns.append(request)
            else:
                self._ahead = request
