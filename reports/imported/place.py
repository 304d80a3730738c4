"""Values in a file of another tool, each checked where it stands.

What is wrong becomes one line with file, place and field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ground.json_file import json_phrase
from reports.record.errors import RecordError

LARGEST = 9e18
"""No number in a result is larger: nanoseconds since 1970 are less than 2e18."""
_SHOWN = 40
"""Characters of a wrong value that a line repeats."""


@dataclass(frozen=True, slots=True)
class Place:
    """An object in a file; `where` says which, such as ``line 3`` or ``benchmarks[0].config``, "" for the whole file."""

    path: Path
    where: str
    values: Mapping[str, Any]

    def error(self, field: str, problem: str) -> RecordError:
        """The error to raise for a field."""
        return RecordError(": ".join(part for part in (str(self.path), self.where, field, problem) if part))

    def get(self, field: str) -> Any:
        """Whatever is in the field; None where it is missing."""
        return self.values.get(field)

    def text(self, field: str) -> str | None:
        """A text, or None where there is none."""
        value = self.values.get(field)
        return value if isinstance(value, str) and value else None

    def inner(self, field: str) -> Place:
        """The object in a field. Raises RecordError if there is none."""
        value = self.values.get(field)
        if not isinstance(value, Mapping):
            raise self.error(field, _problem(value, "an object"))
        return Place(self.path, f"{self.where}.{field}".lstrip("."), value)

    def inner_or_empty(self, field: str) -> Place:
        """The object in a field that need not be there."""
        return self.inner(field) if isinstance(self.values.get(field), Mapping) else Place(self.path, field, {})

    def items(self, field: str) -> list[Any]:
        """The list in a field. Raises RecordError if there is none."""
        value = self.values.get(field)
        if not isinstance(value, list):
            raise self.error(field, _problem(value, "a list"))
        return value

    def objects(self, field: str) -> list[Place]:
        """The objects in the list of a field. Raises RecordError if it is none, or holds anything else."""
        return [
            Place(self.path, f"{self.where}.{field}[{i}]".lstrip("."), self._object(f"{field}[{i}]", value))
            for i, value in enumerate(self.items(field))
        ]

    def number(self, field: str) -> float:
        """A finite number of 0 or more. Raises RecordError."""
        return self.checked(field, self.values.get(field))

    def number_or_nan(self, field: str) -> float:
        """The same of a field that need not be there: NaN then."""
        return math.nan if self.values.get(field) is None else self.number(field)

    def whole(self, field: str) -> int:
        """A whole number of 0 or more. Raises RecordError."""
        return self.checked_whole(field, self.values.get(field))

    def checked(self, field: str, value: Any) -> float:
        """``value``, which stands in ``field``, as a finite number of 0 or more. Raises RecordError."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.error(field, _problem(value, "a number of 0 or more"))
        if value > LARGEST:
            raise self.error(field, _problem(value, f"a number up to {LARGEST:g}"))
        return float(value)

    def checked_whole(self, field: str, value: Any) -> int:
        """The same as a whole number."""
        number = self.checked(field, value)
        if number != int(number):
            raise self.error(field, _problem(value, "a whole number"))
        return int(value)

    def numbers(self, field: str, values: Any) -> np.ndarray:
        """The list ``values``, which stands in ``field``, as finite numbers of 0 or more. Raises RecordError."""
        if not isinstance(values, list):
            raise self.error(field, _problem(values, "a list"))
        try:
            found = np.asarray(values)
        except ValueError:  # lists in it, of different lengths
            found = np.empty(0, object)
        if not values or (
            found.dtype.kind in "if" and found.ndim == 1 and (found >= 0).all() and (found <= LARGEST).all()
        ):
            return found.astype(np.float64)
        return np.array([self.checked(f"{field}[{i}]", value) for i, value in enumerate(values)])

    def _object(self, field: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(field, _problem(value, "an object"))
        return value


def _problem(value: Any, wanted: str) -> str:
    if value is None:
        return "missing"
    try:
        shown = json_phrase(value)
    except (TypeError, ValueError):  # YAML knows dates
        shown = str(value)
    return f"{shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + '...'} is not {wanted}"
