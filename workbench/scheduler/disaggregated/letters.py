"""What passes between the prefill and the decode instance of a request, and what they ask of the wire between them.

A scheduler makes letters and orders and leaves them to its loop, which posts them (:class:`workbench.backend.Wire`). What
comes back arrives as messages in its inbox, so that a queue is polled by looking at the inbox, and never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from workbench.scheduler.request import Finish

Room = tuple[int, int]
"""The name of a handover: its number in the cluster, and how often the request went back to a prefill instance since."""


NOT_SHARED = "grammar_or_session_of_a_pair"
"""Why a request is refused whose state instances of a pair do not hand over yet."""


class TokenLogprobs(NamedTuple):
    """The log probability of a handover's token, and of as many alternatives as were asked for."""

    sampled: float
    top: tuple[float, ...]
    """The largest, in order."""
    top_ids: tuple[int, ...]


# -- messages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HandsShaken:
    """To a decode instance: the handshake with a prefill instance is done."""

    peer: int


@dataclass(frozen=True, slots=True, eq=False)
class PagesSetAside:
    """From decode to prefill: there is room for the KV of a request."""

    room: Room
    request_id: str
    cached_tokens: int
    """Leading tokens, in whole pages, whose KV is there already and is not to be sent."""
    pages: np.ndarray
    """int32[k], pages of the decode instance for what comes after them."""


@dataclass(frozen=True, slots=True)
class KVSent:
    """To the prefill instance: the last page of a handover has arrived."""

    room: Room


@dataclass(frozen=True, slots=True)
class KVArrived:
    """To the decode instance: all KV of a handover is there, and what goes with it."""

    room: Room
    token: int | None
    """Sampled by the prefill instance; None where nothing was to be sampled."""
    cached_tokens: int
    """Tokens that the prefill instance found in its prefix cache."""
    logprobs: TokenLogprobs | None = None
    """Of the token, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """From decode to prefill: the request has ended, nothing more need be sent."""

    room: Room


@dataclass(frozen=True, slots=True)
class HandoverEnded:
    """To the decode instance: nothing of this handover will be written any more, and why it ended before it was done."""

    room: Room
    finish: Finish


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """To the prefill instance: the wire has lost a handover. Nothing more of it is written."""

    room: Room


@dataclass(frozen=True, slots=True)
class PeerGone:
    """To everybody who shares requests with an instance: it is gone, with all it held. It writes and reads no more."""

    peer: int


@dataclass(frozen=True, slots=True)
class TimeIsUp:
    """To oneself: a moment has come at which something may have run out of time."""


PeerMessage = (
    HandsShaken | PagesSetAside | KVSent | KVArrived | Withdrawn | HandoverEnded | TransferFailed | PeerGone | TimeIsUp
)


# -- orders to the wire --------------------------------------------------------------------------------------------------


class Letter(NamedTuple):
    """Deliver a message to another instance."""

    to: int
    message: object


class Shake(NamedTuple):
    """Shake hands with another instance; :class:`HandsShaken` is the answer."""

    peer: int


class SendPages(NamedTuple):
    """Copy pages to another instance, behind those of the same room before. After the ``last`` ones both get word."""

    room: Room
    request_id: str
    to: int
    pages: np.ndarray
    """int32[k], of the sender."""
    target_pages: np.ndarray
    """int32[k], of the receiver."""
    first: bool
    """They are the first of the room."""
    last: bool
    tokens: int
    """Tokens of the request that they are the KV of, with all before."""
    token: int | None = None
    cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None


class StopSending(NamedTuple):
    """Send nothing more of a room, not even what has been begun."""

    room: Room


Order = Letter | Shake | SendPages | StopSending
