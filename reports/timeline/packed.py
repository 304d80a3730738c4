"""Columns of whole numbers as a few bytes a value, for the scripts of the page.

Each column is turned into differences that are mostly small (see `differences`), zigzagged so that none is negative,
cut into planes of one byte each, lowest first, and all planes deflated together: runs repeat themselves, and the planes
lay bare where. core.js undoes this.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_LEVEL = 6
"""Level of deflate: 9 takes ten times as long for seven percent less."""
MOST = 1 << 52
"""The largest number whose zigzag, twice as large, JavaScript holds exactly."""


def packed(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`{"rows": n, "columns": [[name, planes], ...], "data": base64}`; the columns are stored as they are given.

    Raises `ValueError` for a number beyond :data:`MOST`.
    """
    rows = len(next(iter(columns.values()))) if columns else 0
    layout, planes = [], []
    for name, values in columns.items():
        whole = np.asarray(values).astype(np.int64)
        unsigned = ((whole << 1) ^ (whole >> 63)).astype("<u8")
        largest = int(unsigned.max(initial=0))
        needed = (largest.bit_length() + 7) // 8
        if largest > 2 * MOST:
            raise ValueError(f"column {name}: {largest} is too large to pack")
        layout.append([name, needed])
        # (rows, 8) bytes: a column of them is a plane
        in_bytes = unsigned.view(np.uint8).reshape(rows, 8)
        planes += [np.ascontiguousarray(in_bytes[:, plane]) for plane in range(needed)]
    raw = b"".join(plane.tobytes() for plane in planes)
    return {"rows": rows, "columns": layout, "data": text_of(raw)}


def tick_s_of(span_s: float, finest_s: float = 1e-9) -> float:
    """The unit, a power of ten from `finest_s` up, in which all differences of moments that lie `span_s` apart can be
    packed, with room to spare: a nanosecond for 26 days, 10 of them for the best part of a year."""
    tick_s = finest_s
    while span_s / tick_s > MOST / 2:
        tick_s = float(f"{tick_s * 10:.0e}")
    return tick_s


def packed_floats(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Columns of the same length as 32-bit floats (seven digits; NaN stays): `{"rows", "names", "data"}`."""
    rows = len(next(iter(columns.values()))) if columns else 0
    planes = []
    for values in columns.values():
        in_bytes = np.asarray(values, dtype="<f4").view(np.uint8).reshape(rows, 4)
        planes += [np.ascontiguousarray(in_bytes[:, plane]).tobytes() for plane in range(4)]
    return {"rows": rows, "names": list(columns), "data": text_of(b"".join(planes))}


def packed_text(lines: list[str]) -> dict[str, Any]:
    """Strings without line breaks, deflated: `{"rows", "data"}`."""
    return {"rows": len(lines), "data": text_of("\n".join(line.replace("\n", " ") for line in lines).encode())}


def text_of(raw: bytes) -> str:
    """Bytes, deflated, as text."""
    return base64.b64encode(zlib.compress(raw, _LEVEL)).decode()


def differences(values: np.ndarray) -> np.ndarray:
    """Each value less the one before; the first as it is."""
    return np.diff(values, prepend=0) if len(values) else values
