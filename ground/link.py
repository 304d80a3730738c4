"""Links between two places, and rates and times written with their units."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ground.errors import InputError

RATES: Mapping[str, float] = {
    **{f"{prefix}B/s": float(factor) for prefix, factor in (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))},
    **{f"{prefix}iB/s": float(2**power) for prefix, power in (("K", 10), ("M", 20), ("G", 30), ("T", 40))},
    **{f"{prefix}bit/s": factor / 8 for prefix, factor in (("M", 1e6), ("G", 1e9), ("T", 1e12))},
}
"""Bytes/s of one of each unit."""
TIMES: Mapping[str, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "ns": 1e9}
"""How many of each unit are a second."""
SLOWEST, LONGEST_S = 1e3, 60.0
"""The least bandwidth, bytes/s, and the longest latency that are taken for a link's: beyond is a slip of the pen."""
_QUANTITY = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(.*)")


@dataclass(frozen=True)
class Link:
    """What a transfer over a link takes: its latency, and its bytes at the bandwidth."""

    bandwidth: float
    """Bytes/s in one direction, as transfers achieve it."""
    latency_s: float

    def seconds(self, message_bytes: float) -> float:
        """Seconds of one transfer."""
        return self.latency_s + message_bytes / self.bandwidth

    def __str__(self) -> str:
        return f"{written_rate(self.bandwidth)} and {written_time(self.latency_s)}"


def parse_rate(written: object) -> float:
    """Bytes/s of a text such as ``16GB/s``, ``12.5 GiB/s`` or ``400Gbit/s``.

    Raises InputError where it is none, has no unit, or is not above 0, or slower than any link.
    """
    number, unit = _quantity(written, RATES, "16GB/s or 400Gbit/s")
    if not number > 0:
        raise InputError(f"{written!r} is not above 0")
    if number * RATES[unit] < SLOWEST:
        raise InputError(f"{written!r} is less than {written_rate(SLOWEST)}")
    return number * RATES[unit]


def parse_time(written: object) -> float:
    """Seconds of a text such as ``20us`` or ``1.5ms``. Raises InputError where it is none or has no unit."""
    number, unit = _quantity(written, TIMES, "20us or 1.5ms")
    return number / TIMES[unit]


def parse_latency(written: object) -> float:
    """Seconds of a text such as ``20us``, as a link may take. Raises InputError as :func:`parse_time`, and for more."""
    seconds = parse_time(written)
    if seconds > LONGEST_S:
        raise InputError(f"{written!r} is more than {written_time(LONGEST_S)}")
    return seconds


def written_rate(bandwidth: float) -> str:
    """Bytes/s as :func:`parse_rate` takes them, four digits long."""
    unit = next((unit for unit in ("TB/s", "GB/s", "MB/s", "kB/s") if bandwidth >= RATES[unit]), "B/s")
    return f"{bandwidth / RATES[unit]:.4g}{unit}"


def written_time(seconds: float) -> str:
    """Seconds as :func:`parse_time` takes them, four digits long."""
    unit = next((unit for unit in ("s", "ms", "us") if seconds * TIMES[unit] >= 1), "us")
    return f"{seconds * TIMES[unit]:.4g}{unit}"


def _quantity(written: object, units: Mapping[str, float], example: str) -> tuple[float, str]:
    """(number, unit) of a text."""
    text = written.strip() if isinstance(written, str) else f"{written}"
    matched = _QUANTITY.fullmatch(text)
    if matched is None or isinstance(written, bool):
        raise InputError(f"{written!r} is not a number with its unit, as in {example}")
    number, unit = float(matched[1]), matched[2].strip()
    if not unit:
        raise InputError(f"{written!r} has no unit: {example}")
    if unit not in units:
        raise InputError(
            f"{written!r}: {unit!r} is none of the units {', '.join(each for each in units if each != 'µs')}"
        )
    if not math.isfinite(number):
        raise InputError(f"{written!r} is not finite")
    return number, unit
