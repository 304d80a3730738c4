"""A cluster in which one instance prefills a request and another decodes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from workbench.clients.messages import ClientRequest
from workbench.cluster.cluster import Mailbox
from workbench.cluster.router import Routes
from workbench.recording.recorder import Recorder
from workbench.scheduler.request import Finish, Pair, Req

RETRIED = frozenset({"transfer_failed", "transfer_timeout", "prefill_gone", "decode_gone"})
"""Why a request that was lost on its way is sent once more, to another pair."""


class Pairs:
    """Prefill and decode instances by number, through the ``inboxes`` of all. A router of each role chooses among its own,
    the first of which have the numbers ``first_prefill`` and ``first_decode``."""

    def __init__(
        self,
        prefill: tuple[list[int], Routes],
        decode: tuple[list[int], Routes],
        recorder: Recorder,
        inboxes: Sequence[Mailbox],
    ) -> None:
        """``prefill`` and ``decode``: the numbers of the instances of a role, and the router among them."""
        self._prefill, self._prefill_router = prefill
        self._decode, self._decode_router = decode
        self._recorder = recorder
        self._inboxes = inboxes
        self._numbers = count()
        self._prefilling: dict[int, tuple[int, int]] = {}
        """By number of the handover: place of the prefill instance among its own, and tokens of the prompt."""

    def send(self, request: ClientRequest) -> None:
        """A request has come, in the words of its message."""
        decode = self._choose(request)
        request.instance = self._decode[decode]
        self._recorder.arrived(request)
        self._deliver(request)

    def _choose(self, request: ClientRequest) -> int:
        message = request.message
        assert message is not None
        return self._decode_router.choose(message.prompt, message.namespace)

    def _deliver(self, request: ClientRequest) -> None:
        message = request.message
        assert message is not None
        tokens = len(message.prompt)
        place = self._prefill_router.choose(message.prompt, message.namespace)
        prefill, decode = self._prefill[place], request.instance
        number = next(self._numbers)
        self._prefilling[number] = place, tokens
        request.attempts += 1
        self._recorder.sent_to_pair(request, prefill, decode)
        self._inboxes[prefill].put(replace(message, pair=Pair((number, 0), decode, prefill)))
        self._inboxes[decode].put(replace(message, pair=Pair((number, 0), prefill, decode)))

    def prefilled(self, req: Req) -> None:
        """A prefill instance is done with a request, however it ended there."""
        assert req.pair is not None
        place, tokens = self._prefilling.pop(req.pair.room[0], (-1, 0))
        if place >= 0:
            self._prefill_router.ended(place, tokens)

    def retries(self, request: ClientRequest, finish: Finish, sent_tokens: bool) -> bool:
        """A request was lost before it ended. Sends it to another pair, if it may be sent once more, and tells whether."""
        if sent_tokens or finish.detail not in RETRIED or request.attempts > 1:
            return False
        self._leave_decode(request)
        decode = self._choose(request)
        request.instance = self._decode[decode]
        self._deliver(request)
        return True

    def ended(self, request: ClientRequest) -> None:
        """A request has ended."""
        self._leave_decode(request)

    def _leave_decode(self, request: ClientRequest) -> None:
        assert request.message is not None
        self._decode_router.ended(self._decode.index(request.instance), len(request.message.prompt))
