"""ShareGPT: a JSON array of conversations. Only text and no times: needs a tokenizer, and every session arrives at 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from traces.content import TokenIds
from traces.fields import MISSING, text
from traces.files import Source
from traces.formats.base import Format, Head, Reading
from traces.request import TraceRequest
from traces.text import encode

_PROMPT_ROLES = ("human", "user", "system")
_OUTPUT_ROLES = ("gpt", "assistant", "chatgpt", "bing", "bard")


def _sniff(head: Head) -> bool:
    return head.has("conversations")


def conversations(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based place, conversation). The format is one JSON value, so the file is read whole.

    Raises TraceError when the file is not an array of objects.
    """
    raw = b"".join(source.chunks()).removeprefix(b"\xef\xbb\xbf")
    try:
        # The elements stay undecoded bytes until their turn comes.
        elements = msgspec.json.decode(raw, type=list[msgspec.Raw])
    except msgspec.DecodeError as fault:
        raise source.error(0, "", f"not a JSON array: {fault}") from None
    del raw
    for number, element in enumerate(elements):
        record = msgspec.json.decode(element)
        if not isinstance(record, dict):
            raise source.error(0, f"[{number}]", "is not a JSON object")
        yield number + 1, record


def _read(reading: Reading) -> Iterator[TraceRequest]:
    source = reading.source
    skipped = 0
    for place, record in conversations(source):
        where = f"[{place - 1}]"
        session_id = f"s{place}"
        said = record.get("conversations", MISSING)
        if not isinstance(said, list):
            raise source.error(0, f"{where}.conversations", "is missing or not a list")
        history: list[np.ndarray] = []
        turn = told = 0  # `told`: pieces of the history since the last answer.
        for number, message in enumerate(said):
            here = f"{where}.conversations[{number}]"
            if not isinstance(message, dict):
                raise source.error(0, here, "is not a JSON object")
            role = text(source, 0, f"{here}.from", message.get("from", MISSING))
            ids = encode(reading.tokenizer, source, 0, f"{here}.value", message.get("value", MISSING))
            if role in _PROMPT_ROLES:
                history.append(ids)
                told += len(ids)
            elif role not in _OUTPUT_ROLES:
                raise source.error(
                    0, f"{here}.from", f"'{role}' is not one of {', '.join(_PROMPT_ROLES + _OUTPUT_ROLES)}"
                )
            else:
                if told and len(ids):
                    prompt = np.concatenate(history)
                    yield TraceRequest(
                        request_id=f"{session_id}/{turn}",
                        arrival_s=None if turn else 0.0,
                        input_length=len(prompt),
                        output_length=len(ids),
                        session_id=session_id,
                        turn=turn,
                        content=TokenIds(prompt, ids, str(source.path), f"{where}.conversations", f"{here}.value"),
                    )
                    turn += 1
                else:
                    skipped += 1
                history.append(ids)
                told = 0
    if skipped:
        reading.note(f"{skipped} answers were skipped: empty, or with nothing said before them")


FORMAT = Format(
    name="sharegpt",
    about="ShareGPT, a JSON array of conversations (needs a tokenizer)",
    sniff=_sniff,
    read=_read,
    closed_loop=True,
    ids_from_file=False,
    notes=("no times in the file: all sessions arrive at 0 unless a rate spreads them, and nobody thinks",),
)
