"""The raw fields of one configuration, with getters whose errors name the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeVar

from ground.errors import InputError

T = TypeVar("T", int, float, str, bool)


class UnsupportedModel(InputError):
    """The model asks for something that is not computed or modelled here, or its configuration is not whole."""


class Fields:
    """The fields of a config.json.

    A field that is absent has the value that transformers' own class assumes for it, ``defaults``; null is no value.
    """

    def __init__(self, values: Mapping[str, Any], source: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.values, self.source, self.defaults = values, source, dict(defaults or {})

    def with_defaults(self, **defaults: Any) -> Self:
        """Return these fields with other values assumed where the file has none."""
        return type(self)(self.values, self.source, {**self.defaults, **defaults})

    def over(self, values: Mapping[str, Any]) -> Self:
        """Return these fields with other values for some."""
        return type(self)({**self.values, **values}, self.source, self.defaults)

    def error(self, field: str, why: str) -> UnsupportedModel:
        """The one line that is said about a field."""
        return UnsupportedModel(f"{self.source}: {field}: {why}")

    def raw(self, field: str) -> Any:
        """The field, of whatever type, or what its absence means."""
        return self.values[field] if field in self.values else self.defaults.get(field)

    def get(self, field: str, kind: type[T], default: T | None = None) -> T | None:
        """The field, or ``default`` where it is absent or null. Raises UnsupportedModel if it has another type."""
        value = self.raw(field)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.error(field, f"{value!r} is not {_a(kind)}")
        return value

    def need(self, field: str, kind: type[T]) -> T:
        """The field. Raises UnsupportedModel where it is absent, null or of another type."""
        value = self.get(field, kind)
        if value is None:
            raise self.error(field, "missing")
        return value

    def size(self, field: str, default: int | None = None) -> int:
        """A whole number above zero. Raises UnsupportedModel for anything else."""
        value = self.need(field, int) if default is None else self.get(field, int, default)
        assert value is not None
        if value < 1:
            raise self.error(field, f"{value} is less than 1")
        return value

    def count(self, field: str) -> int:
        """A whole number of 0 or more, 0 if there is none. Raises UnsupportedModel for anything else."""
        value = self.get(field, int, 0)
        assert value is not None
        if value < 0:
            raise self.error(field, f"{value} is less than 0")
        return value

    def flag(self, field: str) -> bool:
        """True or false; false if it is absent or null. Raises UnsupportedModel for anything else."""
        return bool(self.get(field, bool))

    def object(self, field: str) -> Mapping[str, Any]:
        """An object; an empty one if it is absent or null. Raises UnsupportedModel for anything else."""
        value = self.raw(field)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(field, f"{value!r} is not an object")
        return value or {}

    def inner(self, field: str) -> Inner:
        """The fields in a field, none if it is absent or null. Raises UnsupportedModel."""
        return Inner(self.object(field), self.source, field)

    def objects(self, field: str) -> list[Inner]:
        """The fields of each object in a list. Raises UnsupportedModel for anything else."""
        value = self.raw(field)
        if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
            raise self.error(field, "missing" if value is None else "not a list of objects")
        return [Inner(each, self.source, f"{field}[{at}]") for at, each in enumerate(value)]

    def texts(self, *names: str) -> list[str]:
        """The first of these fields that is a list of texts; empty if all are absent. Raises UnsupportedModel."""
        for field in names:
            value = self.raw(field)
            if value is None:
                continue
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise self.error(field, f"{value!r} is not a list of texts")
            return value
        return []

    def must_be(self, field: str, *allowed: Any) -> None:
        """Refuse any other value than these (the first is what absence means)."""
        value = self.raw(field)
        if value is not None and value not in allowed:
            raise self.error(field, f"{value!r} is not supported; supported: {', '.join(map(str, allowed))}")

    def token_ids(self, field: str) -> tuple[int, ...]:
        """One id or a list of them, as a tuple. Raises UnsupportedModel for anything else."""
        value = self.values.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(field, f"{value!r} is not a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def dtype_name(self) -> str | None:
        """Read what the weights were saved in; None where the file does not say. Raises UnsupportedModel."""
        field = "dtype" if "dtype" in self.values else "torch_dtype"
        name = self.get(field, str)
        if name is None:
            return None
        name = name.removeprefix("torch.")
        if name not in DTYPES:
            raise self.error(field, f"{name!r} is not supported; supported: {', '.join(DTYPES)}")
        return name


class Inner(Fields):
    """Fields inside a field."""

    def __init__(self, values: Mapping[str, Any], source: str, outer: str) -> None:
        super().__init__(values, source)
        self.outer = outer

    def error(self, field: str, why: str) -> UnsupportedModel:
        return super().error(f"{self.outer}.{field}", why)

    def over(self, values: Mapping[str, Any]) -> Self:
        """Return these fields with other values for some."""
        return type(self)({**self.values, **values}, self.source, self.outer)

    def inner(self, field: str) -> Inner:
        """The object in a field, empty if there is none. Raises UnsupportedModel."""
        return Inner(self.object(field), self.source, f"{self.outer}.{field}")


DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Dtypes that unquantised weights may be saved in, and our words for them."""


def _a(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
