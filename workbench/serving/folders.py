"""Paths that clients name: below a folder that whoever started the server has named, and nowhere else."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from workbench.scheduler.config import ConfigError
from workbench.serving.refusals import bad_value
from workbench.serving.serve_settings import ServeSettings


def with_folders(settings: ServeSettings) -> ServeSettings:
    """Return the settings with absolute folders, which exist. Raises ConfigError for one that cannot be had."""
    found: dict[str, Any] = {}
    if settings.profile_dir is not None:
        found["profile_dir"] = _prepare(settings.profile_dir)
    if settings.weights_dir is not None:
        if not settings.weights_dir.is_dir():
            raise ConfigError(f"weights_dir: {settings.weights_dir}: not a folder")
        found["weights_dir"] = settings.weights_dir.resolve()
    return dataclasses.replace(settings, **found)


def profile_folder(profile_dir: Path | None, given: str) -> str:
    """Return where a profile goes for which a client has asked. Raises Refusal."""
    if profile_dir is None:
        raise bad_value(
            "output_dir",
            "this server writes no profiles; --profile-dir FOLDER, at its start, lets it",
            "unsupported_parameter",
        )
    return _below(profile_dir, given, "output_dir")


def weights_folder(weights_dir: Path | None, given: str) -> str:
    """Return where a client's weights are; None: wherever it says. Raises Refusal."""
    return given if weights_dir is None else _below(weights_dir, given, "model_path")


def _prepare(folder: Path) -> Path:
    """Make the folder if need be, and return where it is. Raises ConfigError, in one line, when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        where = folder.resolve(strict=True)
    except OSError as error:
        raise ConfigError(f"profile_dir: {folder}: cannot be made: {error.strerror or error}") from error
    if not os.access(where, os.W_OK | os.X_OK):
        raise ConfigError(f"profile_dir: {folder}: cannot be written: Permission denied")
    return where


def _below(root: Path, given: str, param: str) -> str:
    """Return the path that ``given`` names in ``root``, links followed. Raises Refusal for one that would leave it.

    ``root`` has to be absolute and without links; what is named need not exist.
    """
    if not given or "\0" in given:
        raise bad_value(param, "is empty" if not given else "has a zero byte in it")
    if Path(given).is_absolute():
        raise bad_value(param, f"{given[:200]!r} is not relative to the folder that the server was started with")
    if ".." in Path(given).parts:
        raise bad_value(param, f"{given[:200]!r} leaves the folder that the server was started with")
    try:
        path = (root / given).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, or names that no file system takes
        raise bad_value(
            param, f"{given[:200]!r} is no path: {getattr(error, 'strerror', None) or 'links in a loop'}"
        ) from None
    if not path.is_relative_to(root):
        raise bad_value(param, f"{given[:200]!r} leads out of the folder that the server was started with")
    return str(path)
