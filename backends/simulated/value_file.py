"""What a file of JSON, TOML or YAML holds, or one line about why it cannot be read."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_json(path: Path, error: type[Exception]) -> dict[str, Any]:
    """The object in a JSON file. Raises ``error`` with one line."""
    return _read(path, error, json.loads, "a JSON object")


def read_toml(path: Path, error: type[Exception]) -> dict[str, Any]:
    """The tables of a TOML file. Raises ``error`` with one line."""
    # In UTF-8 whatever the locale says, with the mark that some editors put before it or without.
    return _read(path, error, lambda content: tomllib.loads(content.decode("utf-8-sig")), "TOML")


def read_yaml(path: Path, error: type[Exception]) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ``error`` with one line."""
    import yaml

    def parsed(content: bytes) -> Any:
        try:
            return yaml.safe_load(content)
        except yaml.YAMLError as problem:  # the one of the three that is no ValueError, and in several lines
            raise ValueError(" ".join(str(problem).split())) from problem

    return _read(path, error, parsed, "a mapping")


def _read(path: Path, error: type[Exception], parse: Callable[[bytes], Any], wanted: str) -> dict[str, Any]:
    try:
        content = parse(path.read_bytes())
    except OSError as problem:
        raise error(f"{path}: {problem.strerror}") from problem
    except RecursionError as problem:
        raise error(f"{path}: is nested too deeply") from problem
    except ValueError as problem:
        raise error(f"{path}: {problem}") from problem
    if not isinstance(content, dict):
        raise error(f"{path}: not {wanted}")
    return content
