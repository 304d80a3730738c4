"""Whose front end a simulated run has: an engine's by name, or one that was measured, in a file (``--front-end``)."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ground.value_file import read_toml
from workbench.scheduler.config import ConfigError

if TYPE_CHECKING:
    from backends.simulated.front_end import FrontEndModel

FRONT_ENDS = ("none", "vllm", "sglang", "workbench")


def is_file(said: str) -> bool:
    """Tell whether a front end is said by a file."""
    return said not in FRONT_ENDS


def front_end_said(written: Any) -> str:
    """Check the form of what ``--front-end`` says; the file is looked at where it is used. Raises ConfigError."""
    if isinstance(written, str) and (written in FRONT_ENDS or written.endswith(".toml")):
        return written
    raise ConfigError(f"front_end: {written!r} is not one of {', '.join(FRONT_ENDS)}, nor a FILE.toml")


def read_front_end(file: str) -> FrontEndModel:
    """The front end that a file describes, in seconds, under the names of the tables of engines.toml.

    Raises ConfigError in one line that names file and key.
    """
    from backends.simulated.front_end import FrontEndModel  # only a simulated run has one

    path, keys = Path(file), [field.name for field in fields(FrontEndModel)]
    found: dict[str, float] = {}
    for name, value in read_toml(path, ConfigError).items():
        if name not in keys:
            raise ConfigError(f"{path}: {name}: no such key of a front end; there are {', '.join(keys)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"{path}: {name}: {value!r} is not a number of seconds")
        found[name] = float(value)
    if missing := [name for name in keys if name not in found]:
        raise ConfigError(f"{path}: {missing[0]}: is missing; a front end has {', '.join(keys)}")
    return FrontEndModel(**found)
