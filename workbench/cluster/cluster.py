"""Instances behind a router. Whether their clock is simulated or real, requests come, are sent on, and end."""

from __future__ import annotations

from collections.abc import Sequence
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

    def __init__(self, router: Routes, recorder: Recorder, inboxes: Sequence[Mailbox]) -> None:
        self._router = router
        self._told = told_of_answers(router)
        self._recorder = recorder
        self._inboxes = inboxes

    def send(self, request: ClientRequest) -> None:
        """A request has come, in the words of its message."""
        message = request.message
        assert message is not None
        request.instance = self._router.choose(message.prompt, message.namespace)
        self._recorder.arrived(request)
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
        assert request.message is not None
        self.answered(request)
        self._router.ended(request.instance, len(request.message.prompt))
