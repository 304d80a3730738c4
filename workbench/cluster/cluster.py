"""Instances behind a router. Whether their clock is simulated or real, requests come, are sent on, and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from workbench.backend import Wait
from workbench.clients.messages import ClientRequest
from workbench.cluster.router import Routes, told_of_answers
from workbench.recording.recorder import Recorder


class Mailbox(Protocol):
    """The inbox of an instance, from both sides."""

    def put(self, message: object) -> None:
        """Deliver a message now."""
        ...

    def drain(self) -> list[object]: ...

    def arrival(self) -> Wait: ...


class Cluster:
    """Instances by number, through their ``inboxes``, and a note of where each request went."""

    def __init__(
        self,
        router: Routes,
        recorder: Recorder,
        inboxes: Sequence[Mailbox],
        on_end: Callable[[ClientRequest], None] = lambda request: None,
    ) -> None:
        """``on_end`` is told of requests that end here: no instance would say so."""
        self._router = router
        self._on_end = on_end
        self._open: dict[str, ClientRequest] = {}
        """Requests that have not ended."""
        self._shut: set[int] = set()
        """Numbers of instances that take nothing new."""
        self._told = told_of_answers(router)
        self._recorder = recorder
        self._inboxes = inboxes

    def send(self, request: ClientRequest) -> None:
        """A request has come, in the words of its message."""
        self._recorder.arrived(request)
        self._open[request.trace.request_id] = request
        if len(self._shut) < len(self._inboxes):
            self._deliver(request)
        else:
            self._end(request, "aborted:no_instance", 0)

    def _deliver(self, request: ClientRequest) -> None:
        message = request.message
        assert message is not None
        request.instance = self._router.choose(message.prompt, message.namespace)
        request.attempts += 1
        request.answered = False
        self._recorder.by_id[request.trace.request_id].instance = request.instance
        self._inboxes[request.instance].put(message)

    @property
    def wants_answers(self) -> bool:
        """Whether it is to be told of first tokens."""
        return self._told is not None

    def answered(self, request: ClientRequest) -> None:
        """The first token of a request has come back."""
        if self._told is not None and not request.answered:
            assert request.message is not None
            request.answered = True
            self._told.answered(request.instance, len(request.message.prompt))

    def ended(self, request: ClientRequest) -> None:
        """A request has ended where it was sent."""
        del self._open[request.trace.request_id]
        self._leave(request)

    def _leave(self, request: ClientRequest) -> None:
        assert request.message is not None
        self.answered(request)
        self._router.ended(request.instance, len(request.message.prompt))

    # -- instances that come and go --------------------------------------------------------------------------------------

    def shut(self, number: int) -> None:
        """Send nothing new to an instance."""
        self._shut.add(number)
        self._router.closed = set(self._shut)

    def back(self, number: int) -> None:
        """Send requests to an instance again."""
        self._shut.discard(number)
        self._router.closed = set(self._shut)

    def gone(self, number: int, written: Callable[[str], int]) -> None:
        """An instance is gone, with all it held. A request is sent once more, to another one, if none of its output had been
        sent; others end. ``written`` says how much an open request had written there."""
        self.shut(number)
        by_id = self._recorder.by_id
        for request in [request for request in self._open.values() if request.instance == number]:
            row = by_id.get(request.trace.request_id)
            if row is None:
                continue  # its end is on its way to the client
            self._leave(request)
            nothing_sent = row.first_token_s != row.first_token_s
            if nothing_sent and request.attempts < 2 and len(self._shut) < len(self._inboxes):
                self._deliver(request)
            else:
                self._end(request, "aborted:instance_gone", written(request.trace.request_id))

    def load(self, number: int) -> int:
        """Count the requests that an instance is not done with."""
        return sum(request.instance == number for request in self._open.values())

    def _end(self, request: ClientRequest, status: str, output_tokens: int) -> None:
        del self._open[request.trace.request_id]
        self._recorder.lost(request, status, output_tokens)
        self._on_end(request)
