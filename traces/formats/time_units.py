"""The unit of times that are plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ground.errors import InputError
from traces.files.look_ahead import look_ahead
from traces.requests.trace_request import TraceRequest

if TYPE_CHECKING:
    from traces.formats.base import Reading

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
"""Number of each unit in a second."""
CHOICES = ("auto", *UNITS)
DENSE = 10.0
"""Times with fractions that are closer together on average than so many are seconds: as milliseconds they would be more
than a hundred requests a second, timed to parts of a millisecond."""
_EPOCH_S = (1e9, 4.1e9)
"""Seconds since 1970, from 2001 to 2099. Larger numbers are such dates in a smaller unit."""


def check_unit(unit: str) -> None:
    """Check a unit. Raises InputError for one that is none."""
    if unit not in CHOICES:
        raise InputError(f"time unit '{unit}' is not one of {', '.join(CHOICES)}")


def in_seconds(reading: Reading, requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """Requests whose arrivals are numbers of the file's unit, with arrivals in seconds.

    The unit is what the user says or, with `auto`, that of the format or, where a format leaves it open, of the field's
    name, the numbers' size (dates) or their distances.
    """
    asked = reading.asked_unit
    first, stream = look_ahead(requests, 1)  # By then the reader knows what it has found.
    if reading.dates:
        if asked != "auto":
            raise InputError(f"--time-unit {asked}: the times of {reading.source.path} are dates")
        yield from stream
        return
    unit = asked
    if asked == "auto":
        if not reading.unit_is_sure:
            first, stream = look_ahead(stream)
        unit = _unit(reading, [request.arrival_s for request in first if request.arrival_s is not None])
    divisor = UNITS[unit]
    for request in stream:
        if request.arrival_s is not None and divisor != 1.0:
            request.arrival_s /= divisor
        yield request


def _unit(reading: Reading, times: list[float]) -> str:
    """The unit of the first times of a file, with a note where it is not the format's."""
    assert reading.unit is not None
    if not times or reading.unit_is_sure:
        return reading.unit
    for unit, per_second in UNITS.items():
        low, high = (bound * per_second for bound in _EPOCH_S)
        if unit != reading.unit and low <= times[0] <= high:
            reading.note(f"times are read as {unit} since 1970 (--time-unit says otherwise)")
            return unit
    close = len(times) > 1 and (max(times) - min(times)) / (len(times) - 1) < DENSE
    if reading.unit == "ms" and close and any(time % 1 for time in times):
        reading.note("times have fractions and are close together: read as seconds (--time-unit ms otherwise)")
        return "s"
    return reading.unit
