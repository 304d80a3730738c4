"""What a router reads of a request's body: the model, the session, and the prompt as far as a choice needs it."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

BYTES_A_TOKEN = 4
"""Of a text, so many bytes stand for a token. Two texts with a common beginning have a common beginning of such tokens."""


@dataclass(frozen=True)
class Asked:
    """A request as routers see it."""

    prompt: np.ndarray
    """int32[n]: its token ids, or of a text a number for every four bytes."""
    namespace: str = ""
    """Requests of different ones share no KV."""
    model: str | None = None
    session: str | None = None


class _Body(msgspec.Struct):
    """Fields of any generation endpoint, not decoded."""

    model: msgspec.Raw = msgspec.Raw()
    session_id: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Body).decode
_texts = msgspec.json.Decoder(str | list[str]).decode
_ids = msgspec.json.Decoder(list[int]).decode
_lists_of_ids = msgspec.json.Decoder(list[list[int]]).decode
_pieces = msgspec.json.Decoder(list[msgspec.Raw]).decode
_ABSENT = (b"", b"null")


def asked_in(body: bytes, headers: Mapping[str, str], session_header: str) -> Asked:
    """Read a body. One that is no JSON, or no request that is known here, is for the worker to refuse: all of it counts as
    the prompt."""
    try:
        found = _decode(body.removeprefix(codecs.BOM_UTF8))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Asked(estimated(body), session=headers.get(session_header) or None)
    model, salt = _text_in(found.model), _text_in(found.cache_salt)
    session = _text_in(found.session_id) or headers.get(session_header) or None
    return Asked(_prompt(found), f"{model or ''}\0{salt}" if salt else model or "", model, session)


def estimated(text: bytes) -> np.ndarray:
    """int32[n], n of a quarter of the bytes of a text: what stands for its tokens."""
    return np.frombuffer(text + b"\0" * (-len(text) % BYTES_A_TOKEN), "<i4")


def _prompt(body: _Body) -> np.ndarray:
    for raw in (body.input_ids, body.prompt, body.text):
        if bytes(raw) not in _ABSENT:
            return _tokens(raw)
    conversation = [part for part in (body.tools, body.system, body.instructions) if bytes(part) not in _ABSENT]
    for raw in (body.messages, body.input):
        if bytes(raw) in _ABSENT:
            continue
        if not conversation and (ids := _ids_in(raw)) is not None:
            return ids
        try:
            conversation += _pieces(raw)
        except msgspec.DecodeError:
            conversation.append(raw)
    # As it is written: what a client adds to a conversation comes after what it has sent before.
    return estimated(b"\n".join(map(bytes, conversation)))


def _tokens(raw: msgspec.Raw) -> np.ndarray:
    if (ids := _ids_in(raw)) is not None:
        return ids
    try:
        given = _texts(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return estimated(bytes(raw))
    return estimated((given if isinstance(given, str) else "\n".join(given)).encode(errors="replace"))


def _ids_in(raw: msgspec.Raw) -> np.ndarray | None:
    """Token ids of a prompt, or of several one after the other; None where it is no such thing."""
    if not bytes(raw).startswith(b"["):
        return None
    try:
        return np.array(_ids(raw), np.int32)
    except (msgspec.DecodeError, OverflowError):
        pass
    try:
        return np.array([token for ids in _lists_of_ids(raw) for token in ids], np.int32)
    except (msgspec.DecodeError, OverflowError):
        return None


def _text_in(raw: msgspec.Raw) -> str | None:
    try:
        found: Any = msgspec.json.decode(raw) if bytes(raw) not in _ABSENT else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if isinstance(found, str) else None
