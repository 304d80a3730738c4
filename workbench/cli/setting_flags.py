"""The flags of `simulate` that are settings of a run, for other commands that make runs."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from workbench.cli import simulate
from workbench.cli.trace_flags import NAMES

NOT_SETTINGS = NAMES | {"trace", "out", "force", "as_json", "decisions", "config", "like"}
"""Parameters of `simulate` that say what to do with a run, not what it is."""


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose last parameter is `settings: dict`, with a flag for every setting in that parameter's place.

    One vocabulary for every command: flags, help and panels are those of `simulate`, whatever they are.
    """
    theirs = inspect.signature(simulate.simulate).parameters
    hints = typing.get_type_hints(simulate.simulate, include_extras=True)
    own = inspect.signature(command).parameters
    own_hints = typing.get_type_hints(command, include_extras=True)
    names = [name for name in theirs if name not in NOT_SETTINGS and name not in own]
    mine = [parameter for name, parameter in own.items() if name != "settings"]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        settings = {name: given.pop(name) for name in names}
        command(**given, settings=settings)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword, annotation=own_hints[parameter.name]) for parameter in mine]
    parameters += [theirs[name].replace(kind=keyword, annotation=hints[name]) for name in names]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapped.__wrapped__  # type: ignore[attr-defined]  # or its signature would be taken for this one's
    return wrapped
