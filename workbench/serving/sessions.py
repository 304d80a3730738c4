"""Sessions as clients see them: how they are begun and forgotten, and what a turn may ask."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

from workbench.scheduler.messages import CloseSession, OpenSession
from workbench.serving.engine.wire import Done, SessionControl
from workbench.serving.http.protocol import Sequences, bad_value

MAX_NAME_CHARACTERS = 200


class OpenSessionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /open_session."""

    session_id: str | None = None


class CloseSessionRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /close_session."""

    session_id: str


def new_name(asked: str | None) -> str:
    """The name of a session to be opened: a made one when none is asked for. Raises ApiError 400 for a bad one."""
    return uuid.uuid4().hex if asked is None else check_name(asked)


def check_name(name: str) -> str:
    """A session's name. Raises ApiError 400 for a bad one."""
    if not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise bad_value("session_id", f"must have between 1 and {MAX_NAME_CHARACTERS} characters")
    return name


def check_turn(wanted: Sequences) -> None:
    """Raise ApiError 400 for a request that no session can be continued with."""
    if not wanted.session:
        return
    if len(wanted.prompts) > 1:
        raise bad_value("prompt", f"a session takes one prompt at a time, not {len(wanted.prompts)}")
    if wanted.n > 1:
        raise bad_value("n", f"a session goes on from one choice, not from {wanted.n}")


def session_message(asked: SessionControl, answer: Callable[[Done], None]) -> OpenSession | CloseSession:
    """What the HTTP process asks as the scheduler takes it."""
    message = OpenSession if asked.action == "open" else CloseSession
    return message(asked.session, lambda refused: answer(Done(asked.number, refused=refused)))
