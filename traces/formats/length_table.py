"""Tables of lengths, as CSV or JSON lines, whatever their columns are called: with or without arrivals, sessions, turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from traces.files.look_ahead import look_ahead
from traces.files.source import Source
from traces.files.values import MISSING, count, length, seconds, text
from traces.formats import own
from traces.formats.base import Format, Head, Reading
from traces.formats.length_columns import Column, find_columns
from traces.formats.time_units import UNITS
from traces.requests.content import Synthetic, continued, unique
from traces.requests.lengths import HELP
from traces.requests.trace_request import TraceRequest


@dataclass(slots=True)
class _Row:
    source: Source
    number: int
    arrival: float | None
    input_length: int
    output_length: int
    session_id: str | None
    think_s: float


@dataclass(slots=True)
class _Session:
    turn: int
    end: int
    content: Synthetic


def _sniff(head: Head) -> bool:
    found, _ = find_columns(head.names)
    if head.record is None:
        return "input" in found
    if "input" not in found or not found.keys() & {"output", "arrival"}:
        return False
    # Our own names belong to our own format, which says what is missing.
    return any(found[what].name not in own.FIELDS for what in ("input", "output", "arrival") if what in found)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    columns, others = find_columns(reading.head.names)
    for what in ("input", "output"):
        if what not in columns and (what == "input" or reading.output is None):
            fault = reading.source.error(
                0, "", f"has no column of {what} lengths, such as {what}_tokens, among {', '.join(reading.head.names)}"
            )
            fault.hint = f"--output draws them ({HELP})" if what == "output" else ""
            raise fault
    _note_columns(reading, columns, others)
    closed = "session" in columns and ("arrival" not in columns or "think" in columns)
    if "arrival" not in columns:
        reading.note("no times in the file: all arrive at 0 unless a rate spreads them")
    first, rows = look_ahead(_rows(reading, columns))
    closed = closed or any(row.session_id is not None and row.arrival is None for row in first)
    if not closed:
        if "session" in columns:
            reading.note("open loop: turns of a session keep their times, do not wait for each other and share nothing")
        return (_request(row, 0, row.input_length, unique(_id(row)), closed=False) for row in rows)
    return _turns(reading, first, rows, columns["arrival"].name if "arrival" in columns else "")


def _turns(reading: Reading, first: list[_Row], rows: Iterator[_Row], arrival: str) -> Iterator[TraceRequest]:
    """`arrival` is the column of arrivals, empty where there is none."""
    new = _later_turns_are_new(first)
    sessions: dict[str, _Session] = {}
    later = unused = 0
    for row in rows:
        before = sessions.get(row.session_id) if row.session_id is not None else None
        if before is None and row.arrival is None and arrival:
            reading.bad_rows.add(row.source.error(row.number, arrival, "is missing"))
            continue
        input_length = row.input_length + (before.end if before is not None and new else 0)
        turn, content = 0, unique(_id(row))
        if before is not None:
            later += 1
            unused += row.arrival is not None
            turn, content = before.turn + 1, continued(before.content, before.end, input_length, _id(row))
        if row.session_id is not None:
            sessions[row.session_id] = _Session(turn, input_length + row.output_length, content)
        yield _request(row, turn, input_length, content, closed=True)
    if unused:
        reading.note(f"later turns whose times are not used: {unused} (a turn waits for the one before it)")
    if later:
        reading.note(
            "later turns give the lengths of what is new: their prompts begin with all that was said before"
            if new
            else "later turns give the lengths of whole prompts, which begin with all that was said before"
        )


def _later_turns_are_new(rows: list[_Row]) -> bool:
    """Tell whether later turns count what they add: some are too short to hold what was said before."""
    ends: dict[str, int] = {}
    for row in rows:
        if row.session_id is not None:
            if row.input_length < ends.get(row.session_id, 0):
                return True
            ends[row.session_id] = row.input_length + row.output_length
    return False


def _id(row: _Row) -> str:
    return f"r{row.number}"


def _request(row: _Row, turn: int, input_length: int, content: Synthetic, *, closed: bool) -> TraceRequest:
    return TraceRequest(
        request_id=_id(row),
        arrival_s=None if turn else row.arrival or 0.0,
        input_length=input_length,
        output_length=row.output_length,
        session_id=row.session_id if closed else None,
        turn=turn,
        think_time_s=row.think_s if turn else 0.0,
        content=content,
        line=row.source.line(row.number),
    )


def _note_columns(reading: Reading, columns: dict[str, Column], others: list[str]) -> None:
    names = ", ".join(f"{meaning} {column.name!r}" for meaning, column in columns.items())
    reading.note(f"columns read: {names}" + (f"; not read: {', '.join(others)}" if others else ""))
    arrival = columns.get("arrival")
    if arrival is not None and arrival.unit is not None and reading.asked_unit == "auto":
        reading.unit, reading.unit_is_sure = arrival.unit, True


def _rows(reading: Reading, columns: dict[str, Column]) -> Iterator[_Row]:
    names = {meaning: column.name for meaning, column in columns.items()}
    times = reading.times(names.get("arrival", ""))
    turns: dict[str, int] = {}
    think_unit = UNITS[(columns["think"].unit or "s") if "think" in columns else "s"]
    output_name = names.get("output", "output_length")

    def make(source: Source, line: int, value: Callable[[str], Any]) -> _Row:
        session = value("session")
        session_id = None if session in (MISSING, None, "") else text(source, line, names["session"], session)
        arrival = None
        if "arrival" in names and not (session_id is not None and value("arrival") in (MISSING, None, "")):
            arrival = times.read(source, line, value("arrival"))
        think = value("think")
        row = _Row(
            source,
            line,
            arrival,
            length(source, line, names["input"], value("input")),
            reading.output_length(source, line, output_name, value("output")),
            session_id,
            0.0 if think in (MISSING, None, "") else seconds(source, line, names["think"], think) / think_unit,
        )
        if session_id is not None and "turn" in names:
            turn = count(source, line, names["turn"], value("turn"))
            if session_id not in turns and turn > 1:
                raise source.error(line, names["turn"], f"session '{session_id}' has turn {turn} but none before it")
            if session_id in turns and turn != turns[session_id] + 1:
                message = f"session '{session_id}' has turn {turn} after turn {turns[session_id]}"
                raise source.error(line, names["turn"], message)
            turns[session_id] = turn
        return row

    if reading.head.record is not None:

        def of_record(source: Source, line: int, record: dict[str, Any]) -> _Row:
            return make(source, line, lambda what: record.get(names[what], MISSING) if what in names else MISSING)

        return reading.json(of_record)
    places = {meaning: place for place, meaning in enumerate(names)}

    def of_cells(source: Source, line: int, cells: list[str]) -> _Row:
        return make(source, line, lambda what: cells[places[what]] if what in places else MISSING)

    return reading.csv(tuple(names.values()), of_cells)


FORMAT = Format(
    name="lengths",
    about="lengths under the usual names, CSV or JSON lines, with or without times and sessions",
    sniff=_sniff,
    read=_read,
    closed_loop=None,
    ids_from_file=False,
    needs=("input_tokens", "output_tokens"),
    time_unit="s",
    time_unit_is_sure=False,
    logged=True,
    draws_output=True,
)
