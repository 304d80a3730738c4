"""Mooncake and what grew out of it (aiperf, Dynamo, vLLM's timed traces): timestamp, input_length, output_length, hash_ids.

Block ids are shared by the whole file. Without a timestamp a request or session arrives at 0; with `session_id` a later turn
waits for the one before and `delay`, unless every turn has a timestamp of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.files.look_ahead import look_ahead
from traces.files.source import Source
from traces.files.values import MISSING, id_array, length, seconds, text
from traces.formats.base import Format, Head, Reading
from traces.formats.own import prompt_ids
from traces.formats.time_units import UNITS
from traces.requests.content import Blocks, Content, Synthetic, TokenIds, continued
from traces.requests.trace_request import TraceRequest

BLOCK_TOKENS = 512
_OWN = frozenset({"block_size", "hash_scope", "think_time_s", "prompt_token_ids", "output_token_ids", "slo_ttft_s"})
OTHER_BLOCK_TOKENS = (16, 32, 64, 128, 256, 1024, 2048)
FITTING = 0.9
"""Share of the first prompts that a block size must explain."""
WHOLE, NEW = "message_array_with_responses", ("deltas_without_responses", "deltas_with_responses")
"""Meanings of a later turn's lengths, in aiperf's words."""


@dataclass(slots=True)
class _Row:
    source: Source
    number: int
    stamp: float | None
    delay_s: float | None
    input_length: int
    prompt: np.ndarray | None
    """Token ids of a prompt of text; None for lengths."""
    prompt_field: str
    output_length: int
    ids: np.ndarray | None
    session_id: str | None
    mode: str | None


@dataclass(slots=True)
class _Session:
    """The turn of a session before the next one."""

    turn: int
    input_length: int
    end: int
    ids: np.ndarray | None
    content: Synthetic


def _sniff(head: Head) -> bool:
    record = head.record
    if record is None or "arrival_s" in record or not ({"input_length", "text_input", "messages"} & record.keys()):
        return False
    if not _OWN.isdisjoint(record):  # Our own format, with a mistake in it.
        return False
    return bool({"timestamp", "hash_ids", "delay", "session_id", "text_input"} & record.keys())


def _read(reading: Reading) -> Iterator[TraceRequest]:
    first, rows = look_ahead(_rows(reading))
    block_tokens = reading.block_tokens or _block_tokens(reading, first)
    starts_with_stamps = any(row.stamp is not None for row in first)
    closed = any(row.session_id is not None and (row.stamp is None or row.delay_s is not None) for row in first)
    if not starts_with_stamps and first:
        reading.note("no timestamps in the file: all arrive at 0 unless a rate spreads them")
    if not closed and any(row.session_id is not None for row in first):
        reading.note("open loop: turns of a session have timestamps of their own and do not wait for each other")
    sessions: dict[str, _Session] = {}
    whole = new = unused = 0
    for row in rows:
        request_id = f"r{row.number}"
        before = sessions.get(row.session_id) if closed and row.session_id is not None else None
        if before is None and starts_with_stamps and row.stamp is None:
            reading.bad_rows.add(row.source.error(row.number, "timestamp", "is missing, where other rows have one"))
            continue
        content: Content = _content(row, request_id, block_tokens)
        turn, input_length = 0, row.input_length
        if before is not None:
            turn = before.turn + 1
            unused += row.stamp is not None
            if _is_whole(row, before, block_tokens):
                whole += 1
            else:
                new += 1
                input_length += before.end
                content = continued(before.content, before.end, input_length, request_id)
        if closed and row.session_id is not None:
            if not isinstance(content, Synthetic):
                fault = row.source.error(
                    row.number, row.prompt_field, "text in a session is not read: give input_length"
                )
                reading.bad_rows.add(fault)
                continue
            sessions[row.session_id] = _Session(
                turn,
                input_length,
                input_length + row.output_length,
                None if content.inherited else row.ids,
                content,
            )
        yield TraceRequest(
            request_id=request_id,
            arrival_s=None if turn else row.stamp or 0.0,
            input_length=input_length,
            output_length=row.output_length,
            session_id=row.session_id if closed else None,
            turn=turn,
            think_time_s=(row.delay_s or 0.0) if turn else 0.0,
            content=content,
            line=row.source.line(row.number),
        )
    if new:
        reading.note(
            f"later turns that give the lengths of what is new: {new} (their prompts begin with all that was said before)"
        )
    if whole:
        reading.note(
            f"later turns that give whole prompts: {whole} (their hash ids go on from those of the turn before)"
        )
    if unused:
        reading.note(
            f"later turns whose timestamps are not used: {unused} (a turn waits for the one before it and its delay)"
        )


def _rows(reading: Reading) -> Iterator[_Row]:
    times = reading.times("timestamp")
    # Timestamps may turn out to be seconds; a delay is in milliseconds unless the user says otherwise.
    delay_unit = UNITS["ms" if reading.asked_unit == "auto" else reading.asked_unit]

    def make(source: Source, line: int, record: dict[str, Any]) -> _Row:
        prompt, prompt_field = None, next((name for name in ("text_input", "messages") if record.get(name)), "")
        if prompt_field:
            prompt = prompt_ids(reading, source, line, prompt_field, record[prompt_field])
        mode = record.get("context_mode")
        if mode is not None and mode != WHOLE and mode not in NEW:
            raise source.error(line, "context_mode", f"'{mode}' is not one of {', '.join((WHOLE, *NEW))}")
        return _Row(
            source=source,
            number=line,
            stamp=times.read(source, line, record["timestamp"]) if record.get("timestamp") is not None else None,
            delay_s=seconds(source, line, "delay", record["delay"]) / delay_unit
            if record.get("delay") is not None
            else None,
            input_length=len(prompt)
            if prompt is not None
            else length(source, line, "input_length", record.get("input_length", MISSING)),
            prompt=prompt,
            prompt_field=prompt_field,
            output_length=reading.output_length(source, line, "output_length", record.get("output_length", MISSING)),
            ids=id_array(source, line, "hash_ids", record["hash_ids"], np.int64)
            if record.get("hash_ids") is not None
            else None,
            session_id=text(source, line, "session_id", record["session_id"])
            if record.get("session_id") is not None
            else None,
            mode=mode,
        )

    return reading.json(make)


def _content(row: _Row, request_id: str, block_tokens: int) -> Content:
    if row.prompt is not None:
        return TokenIds(row.prompt, None, str(row.source.path), prompt_field=row.source.field(row.prompt_field))
    blocks = Blocks(row.ids, block_tokens) if row.ids is not None else None
    return Synthetic(spans=((0, request_id),), blocks=blocks)


def _is_whole(row: _Row, before: _Session, block_tokens: int) -> bool:
    """Tell whether a later turn's lengths are those of its whole prompt, and not of what it adds to the session."""
    if row.mode is not None:
        return row.mode == WHOLE
    if row.ids is None or before.ids is None or row.input_length < before.input_length:
        return False
    full = max(1, min(before.input_length // block_tokens, len(before.ids)))
    return len(row.ids) >= full and bool(np.array_equal(row.ids[:full], before.ids[:full]))


def _block_tokens(reading: Reading, rows: list[_Row]) -> int:
    """512, unless the numbers of ids fit another block size and not that one."""
    known = [row for row in rows if row.ids is not None and len(row.ids) > 1]

    def fits(size: int) -> bool:
        fitting = sum(
            row.input_length // size <= len(row.ids) <= -(-(row.input_length + row.output_length) // size)
            for row in known
            if row.ids is not None
        )
        return fitting >= FITTING * len(known)

    if not known or fits(BLOCK_TOKENS):
        return BLOCK_TOKENS
    found = next((size for size in OTHER_BLOCK_TOKENS if fits(size)), BLOCK_TOKENS)
    if found != BLOCK_TOKENS:
        reading.note(
            f"blocks of {found} tokens: as many as the hash ids of a prompt are (--block-tokens says otherwise)"
        )
    return found


FORMAT = Format(
    name="mooncake",
    about="Mooncake, JSON lines with hash ids of 512-token blocks",
    sniff=_sniff,
    read=_read,
    closed_loop=None,
    ids_from_file=False,
    needs=("timestamp", "input_length", "output_length", "hash_ids"),
    time_unit="ms",
    time_unit_is_sure=False,
    logged=True,
    draws_output=True,
    has_blocks=True,
)
