"""Azure LLM inference traces of 2023 and 2024: TIMESTAMP, ContextTokens, GeneratedTokens."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from traces.fields import length
from traces.files import Source
from traces.formats.base import Format, Head, Reading
from traces.formats.table import rows
from traces.request import TraceRequest

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MINUTE = len("2023-11-16 18:17")


def _sniff(head: Head) -> bool:
    return set(_COLUMNS) <= set(head.columns)


def _read(reading: Reading) -> Iterator[TraceRequest]:
    source = reading.source
    minute, minute_s = "", 0.0
    origin_s: float | None = (
        None  # The first minute: seconds since 1970 would leave a float no room for seven decimals.
    )
    first_s: float | None = None
    for line, (stamp, context, generated) in rows(source, *_COLUMNS):
        if not stamp.startswith(minute) or not minute:
            since_epoch_s = _minute_s(source, line, stamp)
            origin_s = since_epoch_s if origin_s is None else origin_s
            minute_s = since_epoch_s - origin_s
            minute = stamp[:_MINUTE]
        arrival_s = minute_s + _second_s(source, line, stamp)
        if first_s is None:
            first_s = arrival_s
        yield TraceRequest(
            request_id=f"r{line}",
            arrival_s=round(arrival_s - first_s, 7),  # The file's own resolution; more digits are float noise.
            input_length=length(source, line, "ContextTokens", context),
            output_length=length(source, line, "GeneratedTokens", generated),
            line=line,
        )


def _minute_s(source: Source, line: int, stamp: str) -> float:
    """Seconds from the epoch to the stamp's minute, its zone taken as UTC: only differences are used."""
    try:
        return datetime.strptime(stamp[:_MINUTE] + "+0000", "%Y-%m-%d %H:%M%z").timestamp()
    except ValueError:
        raise source.error(line, "TIMESTAMP", f"'{stamp}' is not a date like 2023-11-16 18:17:03.9799600") from None


def _second_s(source: Source, line: int, stamp: str) -> float:
    """The stamp's seconds: by hand, for `datetime` has six decimals where the file has seven."""
    text = stamp[_MINUTE + 1 :].split("+")[0].removesuffix("Z")
    try:
        second_s = float(text)
    except ValueError:
        second_s = -1.0
    if not 0 <= second_s < 61 or stamp[_MINUTE : _MINUTE + 1] != ":":
        raise source.error(line, "TIMESTAMP", f"'{stamp}' is not a date like 2023-11-16 18:17:03.9799600")
    return second_s


FORMAT = Format(
    name="azure",
    about="Azure LLM inference trace, CSV",
    sniff=_sniff,
    read=_read,
    closed_loop=False,
    ids_from_file=False,
)
