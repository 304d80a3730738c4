"""Columns to CSV text without Arrow: the same bytes as `csv_text` writes, in about four times as long.

Arrow is a dependency and nearly always there. A simulation runs without it all the same: on a machine for which there is
no wheel, or in an image that leaves out what is large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from reports.record.schema import MODES, Kind

_PLAIN_TO = 1e10
"""Arrow writes larger floats with an exponent,"""
_PLAIN_FROM = 1e-6
"""and smaller ones."""


def plain_lines(columns: Mapping[str, Any], kinds: Mapping[str, Kind]) -> bytes:
    """The lines of `columns`, all of one length and of the kinds given."""
    texts = [_TEXTS[kinds[name]](values) for name, values in columns.items()]
    return "".join(",".join(row) + "\n" for row in zip(*texts, strict=True)).encode()


def _quoted(values: list[str]) -> list[str]:
    return ['"' + text.replace('"', '""') + '"' if any(mark in text for mark in '",\r\n') else text for text in values]


def _modes(codes: np.ndarray) -> list[str]:
    return [MODES[code] for code in codes.tolist()]


def _numbers(values: np.ndarray) -> list[str]:
    return [_number(value) if isinstance(value, float) else str(value) for value in values.tolist()]


def _seconds(values_s: np.ndarray) -> list[str]:
    return [
        f"{value_s:.9f}".rstrip("0") if 0 < abs(value_s) < 1e-5 else _number(value_s) for value_s in values_s.tolist()
    ]


def _number(value: float) -> str:
    """The fewest digits that read back to the same float; nothing for NaN."""
    if value != value:
        return ""
    if value == 0 or 1e-4 <= abs(value) < _PLAIN_TO:
        return repr(value).removesuffix(".0")
    if abs(value) == float("inf"):
        return repr(value)
    shortest = Decimal(repr(value)).normalize()
    if _PLAIN_FROM <= abs(value) < _PLAIN_TO:
        return f"{shortest:f}"
    return f"{shortest:e}"


_TEXTS: dict[Kind, Callable[[Any], list[str]]] = {
    Kind.TEXT: _quoted,
    Kind.MODE: _modes,
    Kind.INT: _numbers,
    Kind.NUMBER: _numbers,
    Kind.TIME: _seconds,
}
