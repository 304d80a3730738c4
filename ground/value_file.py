"""Files that hold named values, whatever their notation: the values, or one line about why they cannot be read."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ground.errors import InputError


def read_toml(path: Path, error: type[Exception] = InputError) -> dict[str, Any]:
    """Read the tables of a TOML file. Raises ``error`` with one line."""
    # In UTF-8 whatever the locale says, with the mark that some editors put before it or without.
    return read_values(path, error, lambda content: tomllib.loads(content.decode("utf-8-sig")), "TOML")


def read_yaml(path: Path, error: type[Exception] = InputError) -> dict[str, Any]:
    """Read the mapping in a YAML file. Raises ``error`` with one line."""
    import yaml

    def parsed(content: bytes) -> Any:
        try:
            return yaml.safe_load(content)
        except yaml.YAMLError as problem:  # no ValueError, and in several lines
            raise ValueError(" ".join(str(problem).split())) from problem

    return read_values(path, error, parsed, "a mapping")


def read_values(path: Path, error: type[Exception], parse: Callable[[bytes], Any], wanted: str) -> dict[str, Any]:
    """Read the mapping that ``parse`` finds in a file; ``wanted`` is what such a file is called.

    Raises ``error`` with one line: file, place where the notation's parser says it, problem.
    """
    try:
        content = parse(path.read_bytes())
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: {fault(problem)}") from problem
    if not isinstance(content, dict):
        raise error(f"{path}: not {wanted}")
    return content


def fault(problem: Exception) -> str:
    """Say in words for a user why a text could not be parsed."""
    if isinstance(problem, RecursionError):
        return "is nested too deeply"
    if isinstance(problem, json.JSONDecodeError):
        return f"line {problem.lineno}, column {problem.colno}: {problem.msg}"
    return "is not UTF-8 text" if isinstance(problem, UnicodeDecodeError) else str(problem)
