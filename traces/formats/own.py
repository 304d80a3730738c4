"""Our own format: JSON lines, one request a line. docs/traces.md describes it; `traces.write` is the other direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

from traces.files.source import Source
from traces.files.values import MISSING, MOST, count, flag, id_array, integer, length, seconds, text
from traces.formats.base import Format, Head, Reading
from traces.requests.content import Blocks, Content, Synthetic, TokenIds, continued, unique
from traces.requests.text import encode, render_messages
from traces.requests.trace_request import TraceRequest

PROMPT_FIELDS = ("prompt_token_ids", "prompt", "messages", "input_length")
"""Exactly one of these says what the prompt is."""
FIELDS = (
    "request_id",
    "arrival_s",
    *PROMPT_FIELDS,
    "hash_ids",
    "block_size",
    "hash_scope",
    "output_length",
    "output_token_ids",
    "max_tokens",
    "session_id",
    "turn",
    "think_time_s",
    "priority",
    "adapter",
    "slo_ttft_s",
    "slo_tpot_s",
    "constrained",
)
_KNOWN = frozenset(FIELDS)


@dataclass(slots=True)
class _Session:
    """The turn of a session before the next one."""

    turn: int
    end: int
    """Tokens of its prompt and output."""
    content: Synthetic | None
    """None when its tokens are given by id or as text."""


def _sniff(head: Head) -> bool:
    return head.record is not None and any(field in head.record for field in (*FIELDS[:6], "output_length"))


def _read(reading: Reading) -> Iterator[TraceRequest]:
    return reading.json(partial(_request, reading, {}))


def _request(
    reading: Reading, sessions: dict[str, _Session], source: Source, line: int, record: dict[str, Any]
) -> TraceRequest:
    if None in record.values():  # Many writers say null for what they leave out.
        record = {field: value for field, value in record.items() if value is not None}
    if not record.keys() <= _KNOWN:
        _refuse_unknown(source, line, record)
    request_id = text(source, line, "request_id", record["request_id"]) if "request_id" in record else f"r{line}"
    session_id = text(source, line, "session_id", record["session_id"]) if "session_id" in record else None
    before = sessions.get(session_id) if session_id is not None else None
    turn = _turn(source, line, record, session_id, before)
    given = [field for field in PROMPT_FIELDS if field in record]
    if len(given) != 1:
        raise source.error(
            line, "", f"needs exactly one of {', '.join(PROMPT_FIELDS)}; has {' and '.join(given) or 'none'}"
        )
    output_length, output = _output(reading, source, line, record)
    content: Content
    if given[0] == "input_length":
        input_length = length(source, line, "input_length", record["input_length"])
        if output is not None:
            raise source.error(line, "output_token_ids", "needs the prompt as token ids or text, not only its length")
        content = _lengths_only(source, line, record, request_id, before, input_length)
    else:
        prompt = prompt_ids(reading, source, line, given[0], record[given[0]])
        input_length = len(prompt)
        for field in ("hash_ids", "block_size", "hash_scope"):
            if field in record:
                raise source.error(line, field, f"goes with input_length, not with {given[0]}")
        content = TokenIds(
            prompt,
            output,
            str(source.path),
            prompt_field=source.field(given[0]),
            output_field=source.field("output_token_ids"),
        )
    request = TraceRequest(
        request_id,
        None if turn else seconds(source, line, "arrival_s", record.get("arrival_s", MISSING)),
        input_length,
        output_length,
        length(source, line, "max_tokens", record["max_tokens"], MOST) if "max_tokens" in record else None,
        session_id,
        turn,
        seconds(source, line, "think_time_s", record["think_time_s"]) if "think_time_s" in record else 0.0,
        integer(source, line, "priority", record["priority"]) if "priority" in record else 0,
        text(source, line, "adapter", record["adapter"]) if "adapter" in record else None,
        seconds(source, line, "slo_ttft_s", record["slo_ttft_s"]) if "slo_ttft_s" in record else None,
        seconds(source, line, "slo_tpot_s", record["slo_tpot_s"]) if "slo_tpot_s" in record else None,
        content,
        source.line(line),
        flag(source, line, "constrained", record["constrained"]) if "constrained" in record else False,
    )
    if session_id is not None:  # Of a row that is as it should be; one that is left out never was.
        kept = content if isinstance(content, Synthetic) else None
        sessions[session_id] = _Session(turn, input_length + output_length, kept)
    return request


def _refuse_unknown(source: Source, line: int, record: dict[str, Any]) -> None:
    field = next(field for field in record if field not in _KNOWN)
    near = get_close_matches(field, FIELDS, n=1, cutoff=0.5)
    raise source.error(line, field, "unknown field" + (f"; did you mean '{near[0]}'?" if near else ""))


def _turn(source: Source, line: int, record: dict[str, Any], session_id: str | None, before: _Session | None) -> int:
    """The turn's number, checked against its session; left out, it is the next one."""
    if session_id is None:
        for field in ("turn", "think_time_s"):
            if field in record:
                raise source.error(line, field, "needs a session_id")
        return 0
    expected = before.turn + 1 if before else 0
    turn = count(source, line, "turn", record["turn"]) if "turn" in record else expected
    if turn != expected:
        if before is None:
            raise source.error(line, "turn", f"session '{session_id}' has turn {turn} but no turn 0 before it")
        raise source.error(line, "turn", f"session '{session_id}' has turn {turn} after turn {before.turn}")
    if turn and "arrival_s" in record:
        raise source.error(line, "arrival_s", "a later turn has none: it starts when the turn before has finished")
    if not turn and record.get("think_time_s"):
        raise source.error(line, "think_time_s", "a session's first turn has none: it starts at arrival_s")
    return turn


def _output(reading: Reading, source: Source, line: int, record: dict[str, Any]) -> tuple[int, np.ndarray | None]:
    if "output_token_ids" not in record:
        return reading.output_length(source, line, "output_length", record.get("output_length", MISSING)), None
    ids = id_array(source, line, "output_token_ids", record["output_token_ids"], np.int32)
    if not len(ids):
        raise source.error(line, "output_token_ids", "is empty; a request has at least 1 token")
    if "output_length" in record and length(source, line, "output_length", record["output_length"]) != len(ids):
        raise source.error(line, "output_length", f"is {record['output_length']} where output_token_ids has {len(ids)}")
    return len(ids), ids


def prompt_ids(reading: Reading, source: Source, line: int, field: str, value: Any) -> np.ndarray:
    """Token ids of a prompt given as ids, `messages` or text: int32.

    Raises TraceError when it is none or empty.
    """
    if field == "prompt_token_ids":
        prompt = id_array(source, line, field, value, np.int32)
    elif field == "messages":
        prompt = encode(reading.tokenizer, source, line, field, render_messages(source, line, field, value))
    else:
        prompt = encode(reading.tokenizer, source, line, field, value)
    if not len(prompt):
        raise source.error(line, field, "is empty; a request has at least 1 token")
    return prompt


def _lengths_only(
    source: Source,
    line: int,
    record: dict[str, Any],
    request_id: str,
    before: _Session | None,
    input_length: int,
) -> Synthetic:
    """Content of a request without tokens: its own blocks, or what the session has said so far, or nothing shared."""
    if "hash_ids" in record:
        ids = id_array(source, line, "hash_ids", record["hash_ids"], np.int64)
        size = length(source, line, "block_size", record.get("block_size", MISSING))
        scope = text(source, line, "hash_scope", record["hash_scope"]) if "hash_scope" in record else ""
        return Synthetic(spans=((0, request_id),), blocks=Blocks(ids, size, scope))
    for field in ("block_size", "hash_scope"):
        if field in record:
            raise source.error(line, field, "needs hash_ids")
    if before is None:
        return unique(request_id)
    if before.content is None:
        raise source.error(
            line, "input_length", "the session's turn before gives its tokens, so this one must give its own too"
        )
    return continued(before.content, before.end, input_length, request_id)


FORMAT = Format(
    name="workbench",
    about="our own, JSON lines",
    sniff=_sniff,
    read=_read,
    closed_loop=None,
    ids_from_file=True,
    needs=("arrival_s", "input_length", "output_length"),
    draws_output=True,
    session_mark=b'"session_id"',
)
