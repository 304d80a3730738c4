"""The times of a column: numbers, or dates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from traces.files.source import Source
from traces.files.values import MISSING, seconds

_DATE = re.compile(
    r"(?P<minute>(?P<day>[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2})(?:[T ]\s*(?P<clock>[0-9]{1,2}:[0-9]{2}))?)"
    r"(?::(?P<second>[0-9]{2}(?:[.,][0-9]+)?))?"
    r"\s*(?P<zone>Z|z|UTC|GMT|[+-][0-9]{2}(?::?[0-9]{2})?)?",
    re.ASCII,
)
EXAMPLE = "2023-11-16 18:17:03.9799600"


@dataclass(slots=True)
class Times:
    """Reader of a column of times in one pass: what its first value is, all must be.

    Numbers stay as they are. Dates become seconds since the first date's minute, with all the decimals they have; without
    an offset they are taken as UTC, which makes no difference to the gaps between them.
    """

    field: str
    dates: bool | None = None
    """None before the first value."""
    zoned: bool = False
    first_line: int = 0
    _origin_s: int | None = None
    _minute: str = ""
    _minute_s: int = 0

    def read(self, source: Source, line: int, value: object) -> float:
        """The time in seconds or, if it is a number, in the file's unit.

        Raises TraceError when it is missing, is neither a number nor a date, or not what the values before it were.
        """
        found = _DATE.fullmatch(value.strip()) if isinstance(value, str) and _may_be_date(value) else None
        if self.dates is None:
            if found is None and isinstance(value, str) and value.strip() and not _numeric(value):
                raise source.error(line, self.field, f"'{value}' is not a number and not a date like {EXAMPLE}")
        elif self.dates and found is None and value is not MISSING and value not in (None, ""):
            raise source.error(line, self.field, f"'{value}' is not a date like {EXAMPLE}")
        elif not self.dates and found is not None:
            raise source.error(line, self.field, f"'{value}' is a date where line {self.first_line} has a number")
        if found is None:
            number = seconds(source, line, self.field, value)
            if self.dates is None:
                self.dates, self.first_line = False, line
            return number
        return self._date(source, line, str(value), found)

    def _date(self, source: Source, line: int, value: str, found: re.Match[str]) -> float:
        zone = found["zone"]
        minute = found["minute"]
        if minute != self._minute:
            self._minute_s = _since_epoch_s(source, line, self.field, value, found)
            self._minute = minute
        second_s = float((found["second"] or "0").replace(",", "."))
        if second_s >= 61 or (zone and zone[0] in "+-" and int(zone[1:3]) > 23):
            raise source.error(line, self.field, f"'{value}' is not a date like {EXAMPLE}")
        if self.dates is None:
            self.dates, self.zoned, self.first_line = True, bool(zone), line
        elif self.zoned != bool(zone):
            has, had = ("an", "none") if zone else ("no", "one")
            raise source.error(line, self.field, f"'{value}' has {has} offset where line {self.first_line} has {had}")
        minute_s = self._minute_s - _offset_s(zone)
        if self._origin_s is None:
            self._origin_s = minute_s  # Seconds since 1970 would leave a float no room for seven decimals.
        return minute_s - self._origin_s + second_s


def _may_be_date(value: str) -> bool:
    """Tell whether a text has the separators of dates, which few numbers have: a full look takes longer."""
    return "-" in value or "/" in value


def _numeric(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _since_epoch_s(source: Source, line: int, field: str, value: str, found: re.Match[str]) -> int:
    """Seconds from the epoch to the date's minute, its offset left aside."""
    year, month, day = (int(part) for part in re.split("[-/]", found["day"]))
    hour, minute = (int(part) for part in (found["clock"] or "0:0").split(":"))
    try:
        return int(datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp())
    except ValueError:
        raise source.error(line, field, f"'{value}' is not a date like {EXAMPLE}") from None


def _offset_s(zone: str | None) -> int:
    if not zone or zone[0] not in "+-":
        return 0
    digits = zone[1:].replace(":", "")
    offset_s = int(digits[:2]) * 3600 + int(digits[2:] or 0) * 60
    return -offset_s if zone[0] == "-" else offset_s
