"""What two instances say to each other. Whoever has connected sends all but the last four; those are answers, and so may
the end be."""

from __future__ import annotations

import msgspec

from workbench.scheduler.request import SamplingParams

RoomName = tuple[str, int, int]
"""(router, number there, how often the request went back): the name of a handover on both sides."""


class SetAside(msgspec.Struct, tag="set_aside", array_like=True, frozen=True):
    """``PagesSetAside``."""

    room: RoomName
    request_id: str
    cached_tokens: int
    pages: bytes
    """int32."""


class Prefill(msgspec.Struct, tag="prefill", array_like=True, frozen=True):
    """``Generate``: a request has lost its KV, and its prompt and output so far are to be prefilled again."""

    room: RoomName
    request_id: str
    tokens: bytes
    """int32."""
    written_tokens: int
    """How many of them are output."""
    params: SamplingParams
    priority: int
    namespace: str


class Withdraw(msgspec.Struct, tag="withdraw", array_like=True, frozen=True):
    """``Withdrawn``."""

    room: RoomName


class Ended(msgspec.Struct, tag="ended", array_like=True, frozen=True):
    """``HandoverEnded``."""

    room: RoomName
    kind: str
    detail: str


class Block(msgspec.Struct, tag="block", array_like=True, frozen=True):
    """Pages of some layers and heads; their bytes come by the carrier."""

    room: RoomName
    box: tuple[int, int, int, int]
    """First and end layer, first and end KV head."""
    first: int
    """Which of the pages set aside is the first of these."""
    pages: bytes
    """int32, those pages."""
    size: int
    """Bytes."""
    place: int = 0
    """Where the carrier has them, if it does not send them along."""


class Again(msgspec.Struct, tag="again", array_like=True, frozen=True):
    """What came of this handover is void: its first page comes next."""

    room: RoomName


class Sent(msgspec.Struct, tag="sent", array_like=True, frozen=True):
    """All pages of a handover have been sent, and what goes with them."""

    room: RoomName
    token: int | None
    cached_tokens: int
    logprobs: tuple[float, tuple[float, ...], tuple[int, ...]] | None = None
    """``TokenLogprobs``."""


class Ping(msgspec.Struct, tag="ping", array_like=True, frozen=True):
    """A sign of life."""


class Bye(msgspec.Struct, tag="bye", array_like=True, frozen=True):
    """The end, in order."""


class Pong(msgspec.Struct, tag="pong", array_like=True, frozen=True):
    """The answer to a sign of life."""


class Received(msgspec.Struct, tag="received", array_like=True, frozen=True):
    """All of a handover has arrived."""

    room: RoomName


class Taken(msgspec.Struct, tag="taken", array_like=True, frozen=True):
    """The bytes of a block have been copied: its place is free."""

    place: int


class Fault(msgspec.Struct, tag="fault", array_like=True, frozen=True):
    """The last word on a connection: what was wrong with what came, in one line."""

    line: str


Said = SetAside | Prefill | Withdraw | Ended | Block | Again | Sent | Ping | Bye
Answered = Pong | Received | Taken | Fault | Bye

encode = msgspec.msgpack.Encoder().encode
said_decoder = msgspec.msgpack.Decoder(Said)
answer_decoder = msgspec.msgpack.Decoder(Answered)
