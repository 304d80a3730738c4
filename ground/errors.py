"""The base of every error of bad input."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used. ``str()`` is one line, ready for a user: which file, where in it, which field, and why.

    Only the scheduler, which stands on nothing of the project, has another, ``ConfigError``; it is a ``ValueError``, too.
    """

    hint: str = ""
    """The flag that would help; no part of the line."""
