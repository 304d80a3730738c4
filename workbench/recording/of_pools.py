"""What a record of several pools says of all of them, and what of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def common(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all of these have, and the same."""
    first, *others = each
    return {name: value for name, value in first.items() if all(name in one and one[name] == value for one in others)}


def settings_of_all(found: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of a run as far as its pools use the same: ``found`` by each in the end, ``given`` to each alone.

    A setting that every pool has of its own, and not the same, is None: that of the run had no effect.
    """
    used = common(found)
    for name in given[0]:
        if all(name in own for own in given):
            used.setdefault(name, given[0][name] if len({own[name] for own in given}) == 1 else None)
    return used


def gpus_in_words(gpus: Mapping[str, int]) -> str:
    """The name of the GPU; of several, how many there are of each."""
    if len(gpus) == 1:
        return next(iter(gpus))
    return f"GPUs ({', '.join(f'{number} {name}' for name, number in gpus.items())})"
