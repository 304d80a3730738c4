"""ShareGPT: conversations, as a JSON array or one a line.

Only text and no times: it needs a tokenizer, and every session arrives at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from traces.files.source import Source
from traces.files.values import MISSING, text
from traces.formats.base import Format, Head, Reading
from traces.requests.content import TokenIds
from traces.requests.text import encode
from traces.requests.trace_request import TraceRequest

_PROMPT_ROLES = ("human", "user", "system")
_OUTPUT_ROLES = ("gpt", "assistant", "chatgpt", "bing", "bard")


def _sniff(head: Head) -> bool:
    return head.has("conversations")


def _read(reading: Reading) -> Iterator[TraceRequest]:
    def make(source: Source, place: int, record: dict[str, Any]) -> list[TraceRequest]:
        requests, left_out = _conversation(reading, source, place, record)
        reading.skip("answer", "empty, or with nothing said before it", left_out)
        return requests

    return chain.from_iterable(reading.json(make))


def _conversation(
    reading: Reading, source: Source, place: int, record: dict[str, Any]
) -> tuple[list[TraceRequest], int]:
    """(a turn for each answer, answers that are none)."""
    session_id = f"s{place}"
    said = record.get("conversations", MISSING)
    if not isinstance(said, list):
        raise source.error(place, "conversations", "is missing or not a list")
    requests: list[TraceRequest] = []
    history: list[np.ndarray] = []
    told = skipped = 0  # `told`: tokens of the history since the last answer.
    for number, message in enumerate(said):
        here = f"conversations[{number}]"
        if not isinstance(message, dict):
            raise source.error(place, here, "is not a JSON object")
        role = text(source, place, f"{here}.from", message.get("from", MISSING))
        ids = encode(reading.tokenizer, source, place, f"{here}.value", message.get("value", MISSING))
        if role in _PROMPT_ROLES:
            history.append(ids)
            told += len(ids)
            continue
        if role not in _OUTPUT_ROLES:
            raise source.error(
                place, f"{here}.from", f"'{role}' is not one of {', '.join(_PROMPT_ROLES + _OUTPUT_ROLES)}"
            )
        if told and len(ids):
            prompt, turn = np.concatenate(history), len(requests)
            requests.append(
                TraceRequest(
                    request_id=f"{session_id}/{turn}",
                    arrival_s=None if turn else 0.0,
                    input_length=len(prompt),
                    output_length=len(ids),
                    session_id=session_id,
                    turn=turn,
                    content=TokenIds(
                        prompt,
                        ids,
                        str(source.path),
                        source.field("conversations"),
                        source.field(f"{here}.value"),
                    ),
                    line=source.line(place),
                )
            )
        else:
            skipped += 1
        history.append(ids)
        told = 0
    return requests, skipped


FORMAT = Format(
    name="sharegpt",
    about="ShareGPT, conversations as a JSON array or one a line (needs a tokenizer)",
    sniff=_sniff,
    read=_read,
    closed_loop=True,
    ids_from_file=False,
    needs=("conversations",),
    notes=("no times in the file: all sessions arrive at 0 unless a rate spreads them, and nobody thinks",),
)
