"""Refusals of requests, whatever protocol they came by: a kind, a parameter and one line."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal[
    # What a request says.
    "invalid_json",
    "invalid_type",
    "invalid_value",
    "missing_required_parameter",
    "unknown_parameter",
    "unsupported_parameter",
    "chat_template",
    "model_not_found",
    "context_length_exceeded",
    # What the scheduler rejects.
    "duplicate_id",
    "empty_prompt",
    "output_bound_below_zero",
    "prompt_exceeds_context",
    "prompt_exceeds_kv",
    "grammar_too_complex",
    "grammar_with_drafts",
    "session_busy",
    "unknown_session",
    "duplicate_room",
    "grammar_or_session_of_a_pair",
    # What it gives up.
    "grammar_dead_end",
    "kv_exhausted",
    "queue_timeout",
    "request_timeout",
    "handshake_timeout",
    "transfer_timeout",
    "transfer_failed",
    "prefill_gone",
    "decode_gone",
    # How the server stands.
    "draining",
    "engine_dead",
    "no_answer",
    "overloaded",
    "stuck",
    "too_slow",
]
KINDS: frozenset[str] = frozenset(get_args(Kind))


class Refusal(Exception):
    """Reason for which a request is not served, in one line."""

    def __init__(
        self, kind: Kind, message: str, parameter: str | None = None, *, retry_after_s: int | None = None
    ) -> None:
        """``parameter`` is the field that is wrong, by the name that the client has for it; ``retry_after_s`` says that
        the same request may be served then."""
        super().__init__(message)
        self.kind: Kind = kind
        self.parameter = parameter
        self.retry_after_s = retry_after_s


def bad_value(parameter: str, what: str, kind: Kind = "invalid_value") -> Refusal:
    """Return the refusal of a field whose value cannot be taken."""
    return Refusal(kind, f"{parameter}: {what}", parameter)


_REJECTED: dict[str, str] = {
    "grammar_too_complex": "the grammar of the output is too complex to be followed",
    "grammar_with_drafts": "drafted tokens are not verified against the grammar of an output",
    "unknown_session": "session_id: no session of this name is open",
    "session_busy": "session_id: a request of this session has not ended yet",
    "duplicate_room": "x-workbench-room: another request has this room, or had it",
    "grammar_or_session_of_a_pair": "a form of the output and sessions are not handed over",
}
_FIELDS = {"unknown_session": "session_id", "session_busy": "session_id", "duplicate_room": "x-workbench-room"}
_GIVEN_UP: dict[str, str] = {
    "grammar_dead_end": "the grammar of the output allows no further token, and is not complete",
    "kv_exhausted": "the KV cache is too small for this sequence to go on",
    "queue_timeout": "the request waited too long (--queue-timeout)",
    "request_timeout": "the request took too long (--request-timeout)",
    "handshake_timeout": "the decode instance set no pages aside in time (--handshake-timeout)",
    "transfer_timeout": "the KV of the prompt did not arrive in time (--transfer-timeout)",
    "transfer_failed": "the KV of the prompt was lost on its way",
    "prefill_gone": "the prefill instance is gone",
    "decode_gone": "the decode instance is gone",
}


def refusal_of(end: str, detail: str, prompt_parameter: str) -> Refusal | None:
    """Return what the end of a sequence (``rejected``, ``aborted``, ...) means for its request; None where it is an answer.

    ``prompt_parameter`` is what the client calls the prompt.
    """
    if end == "rejected" and detail in _REJECTED:
        return Refusal(_known(detail), _REJECTED[detail], _FIELDS.get(detail))
    if end == "rejected":
        return Refusal(_known(detail), f"the prompt cannot be served: {detail.replace('_', ' ')}", prompt_parameter)
    if end == "aborted" and detail in _GIVEN_UP:
        return Refusal(_known(detail), _GIVEN_UP[detail])
    return None


def _known(detail: str) -> Kind:
    """Return the kind that has the scheduler's own word for it."""
    for kind in get_args(Kind):
        if kind == detail:
            return kind
    raise ValueError(f"{detail!r} is no kind of refusal")
