"""Sessions: what a conversation has said so far, kept between its requests.

A request of a session continues the session's token ids: nothing is encoded again, so a turn finds in the prefix cache what
the turn before has left there. A session holds no KV and locks none; what was evicted is computed again.
"""

from __future__ import annotations

import numpy as np

from workbench.scheduler.kv.page_table import TableManager
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Req, Session

MAX_SESSIONS = 4096
"""Sessions that may be open at a time, so that clients which never close theirs cannot eat memory without end: an open one
holds 4 bytes a token, a context of them at most."""


class Sessions:
    """The open sessions of a scheduler, by name."""

    def __init__(self, most: int = MAX_SESSIONS) -> None:
        self._most = most
        self._open: dict[str, Session] = {}
        self._by_last_rid: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, name: str) -> str | None:
        """Begin an empty session; returns why not, in one line, or None."""
        if name in self._open:
            return f"session {name!r} is open already"
        if len(self._open) >= self._most:
            return f"{self._most} sessions are open, and there can be no more: close some"
        self._open[name] = Session(name)
        return None

    def close(self, name: str) -> str | None:
        """Forget a session; returns why not, in one line, or None. A request of it goes on."""
        session = self._open.pop(name, None)
        if session is None:
            return f"session {name!r} is not open"
        self._by_last_rid.pop(session.last_rid, None)
        return None

    def tokens_of(self, name: str) -> np.ndarray:
        """int32: what an open session has said so far. Raises KeyError for one that is not open."""
        return self._open[name].tokens

    def place(self, message: Generate) -> tuple[Session | None, np.ndarray, str | None]:
        """(the session that a request is of, its prompt with the session's tokens before it, why it is rejected or None)."""
        session = self._open.get(message.session)
        if session is None:
            return None, message.prompt, "unknown_session"
        if session.busy:
            return None, message.prompt, "session_busy"
        if not len(session.tokens):
            return session, message.prompt, None
        return session, np.concatenate((session.tokens, message.prompt[message.bos_tokens :])), None

    def ended(self, req: Req, table: TableManager) -> None:
        """A request of a session has ended, and its row is still its own: if it finished, the session goes on from it."""
        session, finish = req.session, req.finish
        assert session is not None and finish is not None
        session.busy = False
        if finish.kind not in ("length", "stop") or self._open.get(session.name) is not session:
            return  # cut off; or its session was closed, and another one may have the name now
        count = req.input_len + req.output_len
        # Without a row it was retracted, and has with it what it had written.
        session.tokens = req.tokens[:count] if req.row < 0 else table.tokens(req.row, count).copy()
        session.turns += 1
        self._by_last_rid.pop(session.last_rid, None)
        self._by_last_rid[req.rid] = session
        session.last_rid, session.last_input_len = req.rid, req.input_len

    def cut(self, rid: str, output_tokens: int) -> None:
        """The last request of a session was over after so many tokens: those that came while nobody knew are not said."""
        session = self._by_last_rid.get(rid)
        if session is not None:
            session.tokens = session.tokens[: session.last_input_len + output_tokens]
