"""A cluster in which one instance prefills a request and another decodes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Protocol

import numpy as np

from workbench.clients.messages import ClientRequest
from workbench.cluster.cluster import Mailbox
from workbench.cluster.router import Routes, told_of_answers
from workbench.recording.recorder import Recorder
from workbench.scheduler.request import Finish, Pair, Req

RETRIED = frozenset({"transfer_failed", "transfer_timeout", "prefill_gone", "decode_gone"})
"""Why a request that was lost on its way is sent once more, to another pair."""


class Prompted(Protocol):
    """What routers look at of a request, simulated or live."""

    @property
    def prompt(self) -> np.ndarray:
        """int32[n], its tokens."""
        ...

    @property
    def namespace(self) -> str:
        """Requests of different ones share no KV."""
        ...


@dataclass
class Side:
    """Instances of one role, by their ``numbers`` in the cluster, and the router among them, which counts from 0."""

    numbers: list[int]
    router: Routes
    gone: set[int] = field(default_factory=set)
    """Numbers of those that take nothing."""

    @property
    def open(self) -> list[int]:
        """Numbers of the instances that take requests."""
        return [number for number in self.numbers if number not in self.gone]

    def choose(self, message: Prompted, but: int | None = None) -> int:
        """The number of an instance for a request; another one than ``but``, if there is another."""
        shut = {but} if but is not None and len(self.open) > 1 else set()
        self.router.closed = {self.numbers.index(number) for number in self.gone | shut}
        return self.numbers[self.router.choose(message.prompt, message.namespace)]

    def answered(self, number: int, tokens: int) -> None:
        """A request with so long a prompt has been answered for the first time."""
        if (told := told_of_answers(self.router)) is not None:
            told.answered(self.numbers.index(number), tokens)

    def left(self, number: int, tokens: int) -> None:
        """A request with so long a prompt has left an instance."""
        self.router.ended(self.numbers.index(number), tokens)


def choose_pair(prefill: Side, decode: Side, message: Prompted, lost: tuple[int, int] | None = None) -> tuple[int, int]:
    """The numbers of the prefill and the decode instance for a request. One that was ``lost`` on a pair gets another: its
    decode instance is another, or if there is no other, its prefill instance."""
    lost_prefill, lost_decode = lost or (None, None)
    decoding = decode.choose(message, lost_decode)
    return prefill.choose(message, lost_prefill if decoding == lost_decode else None), decoding


class Pairs:
    """Prefill and decode instances by number, through the ``inboxes`` of all."""

    wants_answers = True
    comes_back = False
    """Whether a request that loses its KV where it is decoded goes through its prefill instance again."""

    def __init__(
        self,
        prefill: Side,
        decode: Side,
        recorder: Recorder,
        inboxes: Sequence[Mailbox],
        on_end: Callable[[ClientRequest], None],
    ) -> None:
        """``on_end`` is told of requests that end here: no instance would say so."""
        self.prefill, self.decode = prefill, decode
        self._recorder = recorder
        self._inboxes = inboxes
        self._on_end = on_end
        self._numbers = count()
        self._prefilling: dict[int, tuple[int, int]] = {}
        """By number of the handover: the prefill instance, and tokens of the prompt."""
        self._open: dict[str, ClientRequest] = {}
        """Requests that have not ended."""

    def send(self, request: ClientRequest) -> None:
        """A request has come, in the words of its message."""
        self._recorder.arrived(request)
        self._open[request.trace.request_id] = request
        if self.prefill.open and self.decode.open:
            self._deliver(request)
        else:
            self._end(request, "aborted:no_instance", 0)

    def _deliver(self, request: ClientRequest, lost: tuple[int, int] | None = None) -> None:
        """Send a request to both its instances; ``lost``: the pair on which it was."""
        message = request.message
        assert message is not None
        prefill, decode = choose_pair(self.prefill, self.decode, message, lost)
        request.instance = decode
        number = next(self._numbers)
        self._prefilling[number] = prefill, len(message.prompt)
        request.attempts += 1
        request.answered = False
        self._recorder.sent_to_pair(request, prefill, decode)
        self._inboxes[prefill].put(replace(message, pair=Pair((number, 0), decode, prefill)))
        self._inboxes[decode].put(replace(message, pair=Pair((number, 0), prefill, decode)))

    # -- what comes back -------------------------------------------------------------------------------------------------

    def prefilled(self, req: Req) -> None:
        """A prefill instance is done with a request, however it ended there."""
        assert req.pair is not None
        self._left_prefill(req.pair.room[0])

    def _left_prefill(self, number: int) -> None:
        prefill, tokens = self._prefilling.pop(number, (-1, 0))
        if prefill >= 0:
            self.prefill.answered(prefill, tokens)
            self.prefill.left(prefill, tokens)

    def answered(self, request: ClientRequest) -> None:
        """The first token of a request has come back from its decode instance."""
        if not request.answered:
            assert request.message is not None
            request.answered = True
            self.decode.answered(request.instance, len(request.message.prompt))

    def ended(self, request: ClientRequest) -> None:
        """A request has ended on its decode instance."""
        del self._open[request.trace.request_id]
        self._leave(request)

    def _leave(self, request: ClientRequest) -> None:
        assert request.message is not None
        self.answered(request)
        self.decode.left(request.instance, len(request.message.prompt))

    # -- failures --------------------------------------------------------------------------------------------------------

    def retries(self, request: ClientRequest, finish: Finish, sent_tokens: bool) -> bool:
        """A request was lost before it ended. Sends it to another pair, if it may be sent once more, and tells whether."""
        if sent_tokens or finish.detail not in RETRIED or request.attempts > 1:
            return False
        if not (self.prefill.open and self.decode.open):
            return False
        row = self._recorder.by_id[request.trace.request_id]
        assert row.handover is not None
        self._leave(request)
        self._deliver(request, (row.handover.prefill_instance, row.handover.decode_instance))
        return True

    def gone(self, number: int, written: Callable[[str], int]) -> None:
        """An instance is gone, with all it held. Requests that it decoded are sent once more, to another pair, if none of
        their output had been sent; others end. ``written`` says how much an open request had written there.

        Those that it prefilled are found lost by their decode instances, which get word of it (``PeerGone``).
        """
        self.shut(number)
        for handover in [handover for handover, (prefill, _) in self._prefilling.items() if prefill == number]:
            self._left_prefill(handover)
        for request in [request for request in self._open.values() if request.instance == number]:
            row = self._recorder.by_id[request.trace.request_id]
            finish = Finish("aborted", "decode_gone")
            if not self.retries(request, finish, row.first_token_s == row.first_token_s):
                self._leave(request)
                self._end(request, finish.status, written(request.trace.request_id))

    def shut(self, number: int) -> None:
        """Send nothing new to an instance."""
        for side in (self.prefill, self.decode):
            if number in side.numbers:
                side.gone.add(number)

    def load(self, number: int) -> int:
        """Count the requests that an instance is not done with: of one that prefills also those that may have to come
        back."""
        if number in self.decode.numbers:
            return sum(request.instance == number for request in self._open.values())
        if self.comes_back:
            rows = (self._recorder.by_id.get(rid) for rid in self._open)
            return sum(
                row is not None and row.handover is not None and row.handover.prefill_instance == number for row in rows
            )
        return sum(prefill == number for prefill, _ in self._prefilling.values())

    def back(self, number: int) -> None:
        """An instance takes requests again."""
        for side in (self.prefill, self.decode):
            side.gone.discard(number)

    def _end(self, request: ClientRequest, status: str, output_tokens: int) -> None:
        del self._open[request.trace.request_id]
        self._recorder.lost(request, status, output_tokens)
        self._on_end(request)
