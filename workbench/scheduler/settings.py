"""Declarations of settings: each once, as a field of a dataclass that says everything there is to know about it.

Flags, their help, names in files, checks, records and what may change while serving are made from these fields: one more
field is one more setting everywhere.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType, NoneType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

RUN, SCHEDULER, HARDWARE, TRACE, RULES = GROUPS = (
    "Run",
    "Scheduler",
    "Model and hardware",
    "Trace",
    "Rules of engines",
)
"""Groups of settings, in the order of ``--help``."""
Place = Literal["real", "live", "served", "replayed"]
"""Where a run may be another than a simulation's: on a real device, in real time, on a server, a trace on a real model."""
_DECLARED = "setting"
UNRECORDED = "unrecorded"
"""In the metadata of a field that is no setting and stands in no record."""
_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ConfigError(ValueError):
    """A setting that cannot work, in one line that names it."""


def is_own(spec: str) -> bool:
    """Tell whether a text has the form ``module:Name``, with dots in both for what lies deeper: code of one's own."""
    return _OWN.fullmatch(spec) is not None


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting, by its field. Its value is an int, a float, a str, a bool, or another type that only a
    command line gives; ``None`` where :attr:`optional`.
    """

    name: str
    """Of the field, in files and in records; with dashes for underscores, of the flag."""
    kind: type
    optional: bool
    default: Any
    help: str
    """One line for ``--help``; in it ``{default}`` and ``{choices}`` stand for what they are."""
    group: str = SCHEDULER
    """The panel of ``--help``."""
    first: bool = False
    """Whether it leads its group there."""
    flag: str = ""
    """The flag, where it is not called as the field is."""
    envvar: str | None = None
    """The environment variable that stands for the flag, if any does."""
    no_flag: bool = False
    """Whether ``--no-FLAG`` is left out: for what is off unless asked for."""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    unit: str = ""
    """What is counted, where a bound is given in words."""
    choices: tuple[str, ...] = ()
    own: str = ""
    """What one's own may be beside the choices, if anything: ``module:Class`` or ``module:function``."""
    zero_is_none: bool = False
    """Whether 0 on a command line or in a file stands for ``None``."""
    live: bool = False
    """Whether it may change while the scheduler runs: no memory is laid out for it and no queued request depends on it."""
    needs: str = ""
    """What it takes to have an effect, in words, if it does not always have one."""
    acts: Callable[[Any, str], bool] = lambda settings, loop: True
    """Whether it has one, beside all these settings and under a loop."""
    idle: Mapping[Place, str] = field(default_factory=dict)
    """Where it never has one, with why. No flag says it there, unless another backend of the command heeds it."""
    aliases: tuple[str, ...] = ()
    """Names that it had: they go on working for a version, with a note."""
    read: Callable[[Any], Any] | None = None
    """Makes a value of what is written, where that may be several things. Raises ConfigError for what it cannot be."""

    @property
    def option(self) -> str:
        """The flag, with its dashes."""
        return "--" + (self.flag or self.name.replace("_", "-"))

    @property
    def described(self) -> str:
        """The help text, with the default and the choices in their places."""
        default = {True: "on", False: "off"}[self.default] if isinstance(self.default, bool) else self.default
        default = f"{default:g}" if isinstance(default, float) else default
        return self.help.format(default=default, choices=" | ".join([*self.choices, *filter(None, [self.own])]))

    @property
    def type_name(self) -> str:
        """Name of its values' type, for messages about one that is another."""
        return self.kind.__name__ + (" or null" if self.optional else "")

    def fits(self, value: object) -> bool:
        """Tell whether a value is of the setting's type."""
        if value is None:
            return self.optional
        if self.read is not None:
            return True  # it says itself what is wrong
        if isinstance(value, bool):
            return self.kind is bool
        return isinstance(value, int | float if self.kind is float else self.kind)

    def meant(self, value: Any) -> Any:
        """What a value on a command line or in a file stands for."""
        if self.read is not None and value is not None:
            return self.read(value)
        return None if self.zero_is_none and value == 0 and not isinstance(value, bool) else value

    def written(self, value: Any) -> list[str]:
        """A value as words of a command line; none where no flag says it."""
        if isinstance(value, bool):
            return [self.option if value else f"--no-{self.option[2:]}"]
        if value is None:
            return [self.option, "0"] if self.zero_is_none else []
        if isinstance(value, list | tuple):
            return [word for each in value for word in (self.option, str(each))]
        return [self.option, str(value)]

    def parse(self, text: str) -> Any:
        """The value that a text stands for; ``none`` where the setting may be unset. Raises ConfigError."""
        return None if self.optional and text.lower() == "none" else self.meant(self.parse_plain(text))

    def parse_plain(self, text: str) -> Any:
        """The number, truth value or text that a text says, whatever it then stands for. Raises ConfigError."""
        try:
            if self.kind is int:
                return int(text)
            if self.kind is float:
                number = float(text)
                if not math.isfinite(number):
                    raise ValueError
                return number
            if self.kind is bool:
                if text.lower() not in (*_TRUE, *_FALSE):
                    raise ValueError
                return text.lower() in _TRUE
        except ValueError:
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}[self.kind]
            raise ConfigError(f"{self.name}: {text!r} is not {wanted}") from None
        if not text:
            raise ConfigError(f"{self.name}: an empty value")
        return text

    def check(self, value: Any) -> None:
        """Raise ConfigError for a value out of bounds."""
        if value is None and self.optional:
            return
        if self.choices and value not in self.choices and not (self.own and is_own(str(value))):
            nor = f", nor {self.own}" if self.own else ""
            raise ConfigError(f"{self.said}: {value!r} is not one of {', '.join(self.choices)}{nor}")
        if (wrong := self._out_of_bounds(value)) is not None:
            raise ConfigError(f"{self.said}: {value} {wrong}")

    @property
    def said(self) -> str:
        """The name of the setting in errors."""
        return self.option[2:].replace("-", "_")

    def _out_of_bounds(self, value: Any) -> str | None:
        """Return what is wrong with a number. NaN is within no bounds."""
        least, above, most = self.least, self.above, self.most
        if above is not None and most is not None:
            return None if above < value <= most else f"is not between {above:g} and {most:g}"
        if least is not None and most is not None and not self.unit:
            return None if least <= value <= most else f"is not between {least:g} and {most:g}"
        if above is not None:
            return None if above < value < math.inf else "is not positive and finite"
        if least is not None and self.kind is float:
            return None if least <= value < math.inf else "is negative or not finite"
        if least is not None and value < least:
            return f"is less than {least:g}"
        if most is not None and value > most:
            return f"is more than {most:g} {self.unit}".rstrip()
        return None


def setting(default: Any, *, help: str, **declared: Any) -> Any:
    """A field of a dataclass that is a setting; ``declared`` are fields of :class:`Setting`, choices those of a ``Literal``
    unless given."""
    return field(default=default, metadata={_DECLARED: MappingProxyType({"help": help, **declared})})


@cache
def settings_of(owner: type) -> Mapping[str, Setting]:
    """The settings of a dataclass by name, in their order; fields that are none are left out."""
    hints: dict[str, Any] = {}
    for base in reversed(owner.__mro__):
        hints |= _own_hints(base)
    found = {}
    for declared in fields(owner):
        if _DECLARED not in declared.metadata:
            continue
        kinds = [kind for kind in get_args(hints[declared.name]) if kind is not NoneType]
        optional = NoneType in get_args(hints[declared.name])
        kind = kinds[0] if optional else hints[declared.name]
        more = dict(declared.metadata[_DECLARED])
        if get_origin(kind) is Literal:
            more.setdefault("choices", get_args(kind))
            kind = str
        found[declared.name] = Setting(declared.name, kind, optional, declared.default, **more)
    return MappingProxyType(found)


@cache
def _own_hints(owner: type) -> Mapping[str, Any]:
    """Types of the fields that a class itself declares, worked out once for all that inherit it."""
    declared = SimpleNamespace(__annotations__=vars(owner).get("__annotations__", {}))
    return get_type_hints(declared, vars(sys.modules[owner.__module__]))


def check_settings(values: object) -> None:
    """Raise ConfigError for the first setting of a dataclass's instance that is out of bounds."""
    for name, declared in settings_of(type(values)).items():  # type: ignore[arg-type]  # a class can be hashed
        declared.check(getattr(values, name))
