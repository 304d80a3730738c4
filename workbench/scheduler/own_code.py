"""Code of one's own, named as ``module:Name`` where a name of ours would stand.

One place loads it, whatever it is: an order of the queue, a cost model, a loop, a router, a trace format. Who starts a run
names it; a message to a running scheduler cannot (:class:`workbench.scheduler.messages.SetState`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from workbench.scheduler.settings import ConfigError, is_own

_files: set[str] = set()
"""Files of the modules that were loaded."""


def name_of(setting: str, found: Any) -> str:
    """Name a class or function ``module:Name``, under which :func:`load_own` finds it. Raises ConfigError for one that has
    no such name, for it was made inside a function."""
    name = f"{getattr(found, '__module__', '')}:{getattr(found, '__qualname__', '')}"
    if not is_own(name):
        raise ConfigError(
            f"{setting}: {found!r} has no name that a record could hold: define it at the top of a module"
        )
    return name


def load_own(setting: str, spec: str) -> Any:
    """Load what ``module:Name`` names; modules are looked for in the current folder first, as ``python -m`` does.

    Raises ConfigError, which names the setting it is for and, where the module itself fails, its line.
    """
    if not is_own(spec):
        raise ConfigError(f"{setting}: {spec!r} is not of the form module:Name")
    module_name, _, path = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
        _files.add(getattr(module, "__file__", None) or module_name)
        return functools.reduce(getattr, path.split("."), module)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: cannot load {spec!r}: {error}{_inside(error)}") from error
    except SyntaxError as error:
        raise ConfigError(
            f"{setting}: cannot load {spec!r}: {error.filename}, line {error.lineno}: {error.msg}"
        ) from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{setting}: cannot load {spec!r}: {_why(error)}{_inside(error)}") from error


def make_own(setting: str, spec: str, methods: Mapping[str, tuple[str, ...]], **arguments: Any) -> Any:
    """Make an object of the class ``module:Name`` with ``arguments`` in their order; it has to have ``methods`` (each with
    the names of its arguments).

    Raises ConfigError for what cannot be loaded, is no class, or lacks one of the methods.
    """
    cls = load_own(setting, spec)
    if not isinstance(cls, type):
        raise ConfigError(f"{setting}: {spec!r} is no class")
    if not takes(cls, tuple(arguments)):
        raise ConfigError(f"{setting}: {spec!r} cannot be made: it has to take ({', '.join(arguments)})")
    made = cls(*arguments.values())
    check_methods(setting, spec, made, methods)
    return made


def check_methods(setting: str, spec: str, made: object, methods: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ConfigError where ``made`` lacks one of ``methods``, or has it with other arguments."""
    for name, arguments in methods.items():
        method = getattr(made, name, None)
        if not callable(method):
            raise ConfigError(f"{setting}: {spec!r} has no {name}({', '.join(arguments)})")
        if not takes(method, arguments):
            raise ConfigError(f"{setting}: {spec!r} has a {name} that does not take ({', '.join(arguments)})")


def takes(function: Any, arguments: tuple[str, ...]) -> bool:
    """Tell whether something can be called with so many arguments in a row."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # Of what is written in C, it may not be known.
        return True
    return True


def failure(error: BaseException) -> str | None:
    """Say in one line what went wrong in code of one's own, and in which line of it; None where it was not there."""
    at: BaseException | None = error
    while at is not None:  # whoever passes an error on may have left its frames behind
        for frame in reversed(traceback.extract_tb(at.__traceback__)):
            if frame.filename in _files:
                return f"{_why(at)} ({frame.filename}, line {frame.lineno})"
        at = at.__cause__ or at.__context__
    return None


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _inside(error: BaseException) -> str:
    """Say where in the loaded code an error comes from, if it comes from there."""
    frames = traceback.extract_tb(error.__traceback__)
    # What lies before the module's own lines are this function's and those of the import system.
    own = [
        frame for frame in frames[1:] if not frame.filename.startswith("<frozen") and "importlib" not in frame.filename
    ]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
