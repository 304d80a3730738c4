"""LMCache agent traces: one call a line, a session's calls next to each other; as block ids, or as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from traces.files.source import Source
from traces.files.values import MISSING, count, runs, seconds, text
from traces.formats.base import Format, Reading
from traces.formats.chains import Call, sequence_ids
from traces.requests.content import Blocks, Content, Synthetic, TokenIds
from traces.requests.text import encode
from traces.requests.trace_request import TraceRequest

BLOCK_TOKENS = 16
_TRACE_FIELDS = ("session", "turn", "hash_rle")
_TEXT_FIELDS = ("session", "turn", "input", "output")
_START_NOTE = "times are relative to each session's start: all sessions arrive at 0 unless a rate spreads them"
_THINK_NOTE = (
    "think times are not recorded: each is the gap between two calls' starts less the earlier call's output at the "
    "session's fastest seconds per token"
)


@dataclass(slots=True)
class _Line:
    line: int
    """Numbers it; `place` is what errors say, 0 in an array."""
    place: int
    session_id: str
    started_s: float
    input_length: int
    output_length: int
    ids: np.ndarray | None
    """Ids of blocks; None for text."""
    tokens: tuple[np.ndarray, np.ndarray] | None
    """Prompt and output; None for block ids."""


def _read_trace(reading: Reading) -> Iterator[TraceRequest]:
    def parse(source: Source, line: int, record: dict[str, Any]) -> _Line:
        return _Line(
            line=line,
            place=source.line(line),
            session_id=text(source, line, "session", record.get("session", MISSING)),
            started_s=seconds(source, line, "t_s", record.get("t_s", MISSING)),
            input_length=count(source, line, "input_length", record.get("input_length", MISSING)),
            output_length=count(source, line, "output_length", record.get("output_length", MISSING)),
            ids=runs(source, line, "hash_rle", record.get("hash_rle", MISSING)),
            tokens=None,
        )

    return _read(reading, parse)


def _read_text(reading: Reading) -> Iterator[TraceRequest]:
    def parse(source: Source, line: int, record: dict[str, Any]) -> _Line:
        prompt = encode(reading.tokenizer, source, line, "input", record.get("input", MISSING))
        output = encode(reading.tokenizer, source, line, "output", record.get("output", MISSING))
        return _Line(
            line=line,
            place=source.line(line),
            session_id=text(source, line, "session", record.get("session", MISSING)),
            started_s=seconds(source, line, "t_s", record.get("t_s", MISSING)),
            input_length=len(prompt),
            output_length=len(output),
            ids=None,
            tokens=(prompt, output),
        )

    return _read(reading, parse)


def _read(reading: Reading, parse: Callable[[Source, int, dict[str, Any]], _Line]) -> Iterator[TraceRequest]:
    no_output = 0
    seen: set[str] = set()
    last: _Line | None = None

    def make(source: Source, line: int, record: dict[str, Any]) -> _Line:
        nonlocal last
        call = parse(source, line, record)
        if last is None or call.session_id != last.session_id:
            if call.session_id in seen:
                raise source.error(line, "session", f"'{call.session_id}' continues after another session began")
        elif call.started_s < last.started_s:
            raise source.error(line, "t_s", f"'{call.started_s}' is before '{last.started_s}' on line {last.line}")
        seen.add(call.session_id)
        last = call
        return call

    session: list[_Line] = []
    for call in reading.json(make):
        if session and call.session_id != session[-1].session_id:
            yield from _session(reading, session)
            session = []
        if call.input_length == 0:
            reading.skip("call", "empty prompt")
            continue
        if call.output_length == 0:
            # A tool call: the trace has only the text beside it, but a model cannot answer with nothing.
            no_output += 1
            call.output_length = 1
        session.append(call)
    yield from _session(reading, session)
    if no_output:
        reading.note(f"tool calls, which have no output text, that were given an output of 1 token: {no_output}")


def _session(reading: Reading, lines: list[_Line]) -> Iterator[TraceRequest]:
    if not lines:
        return
    thinks_s = think_times_s([line.started_s for line in lines], [line.output_length for line in lines])
    contents = _contents(reading, lines)
    for turn, (line, think_s, content) in enumerate(zip(lines, thinks_s, contents, strict=True)):
        yield TraceRequest(
            request_id=f"{line.session_id}/{turn}",
            arrival_s=None if turn else 0.0,
            input_length=line.input_length,
            output_length=line.output_length,
            session_id=line.session_id,
            turn=turn,
            think_time_s=think_s,
            content=content,
            line=line.place,
        )


def _contents(reading: Reading, lines: list[_Line]) -> list[Content]:
    calls = [
        Call(line.ids, line.input_length, line.output_length, tail_id=-line.line)
        for line in lines
        if line.ids is not None
    ]
    if len(calls) == len(lines):
        return [
            Synthetic(spans=((0, f"{line.session_id}/{turn}"),), blocks=Blocks(ids, BLOCK_TOKENS))
            for turn, (line, ids) in enumerate(zip(lines, sequence_ids(calls, BLOCK_TOKENS), strict=True))
        ]
    path = str(reading.source.path)
    return [
        # An output given 1 token for want of text has no ids to give.
        TokenIds(prompt, output if len(output) else None, path, prompt_field="input", output_field="output")
        for prompt, output in (line.tokens for line in lines if line.tokens is not None)
    ]


def think_times_s(starts_s: list[float], output_lengths: list[int]) -> list[float]:
    """Think time before each call, from when the calls started and how many tokens each gave.

    The gap between two starts is the service of the first and then the think time; the trace does not say where one ends.
    A call is charged its output tokens at the session's fastest pace (the least gap per output token), so that the call
    with that pace has no think time after it and no think time is made negative. It overstates the think time of a call
    that was served slower than the fastest.
    """
    gaps = [
        (after - before, tokens) for (before, after), tokens in zip(pairwise(starts_s), output_lengths, strict=False)
    ]
    pace_s = min((gap_s / tokens for gap_s, tokens in gaps), default=0.0)
    return [0.0, *(round(max(0.0, gap_s - pace_s * tokens), 6) for gap_s, tokens in gaps)]


TRACE_FORMAT = Format(
    name="lmcache",
    about="LMCache agent trace, JSON lines with hash ids of 16-token blocks",
    sniff=lambda head: head.has(*_TRACE_FIELDS),
    needs=_TRACE_FIELDS,
    read=_read_trace,
    closed_loop=True,
    ids_from_file=True,
    notes=(_START_NOTE, _THINK_NOTE),
)

TEXT_FORMAT = Format(
    name="lmcache-text",
    about="LMCache agent trace, JSON lines with text (needs a tokenizer)",
    sniff=lambda head: head.has(*_TEXT_FIELDS),
    needs=_TEXT_FIELDS,
    read=_read_text,
    closed_loop=True,
    ids_from_file=True,
    notes=(_START_NOTE, _THINK_NOTE),
)
