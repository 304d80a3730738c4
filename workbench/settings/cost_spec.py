"""The value of ``--cost``: the kind of a cost model and the file it is read from."""

from __future__ import annotations

from pathlib import Path

from workbench.scheduler.config import ConfigError
from workbench.scheduler.settings import is_own

OWN = "module:Class"
KINDS = ("roofline", "measured", "profile:PATH", "fitted:PATH", OWN)


def split(spec: str) -> tuple[str, Path | None]:
    """(kind, path) of what follows ``--cost``; the kind is :data:`OWN` for a class of one's own. Raises ConfigError."""
    kind, colon, path = spec.partition(":")
    if kind in ("roofline", "measured") and not colon:
        return kind, None
    if kind in ("roofline", "measured"):
        raise ConfigError(f"cost: {kind} takes nothing after it, not {path!r}; a file is profile:PATH or fitted:PATH")
    if kind in ("profile", "fitted") and path:
        return kind, Path(path)
    if is_own(spec):
        return OWN, None
    raise ConfigError(f"cost: {spec!r} is not one of {', '.join(KINDS)}")


def identity(spec: str) -> dict[str, str]:
    """The model, GPU and dtype that a profile is of; nothing where no file is named. Raises ProfileError."""
    kind, path = split(spec)
    if path is None:
        return {}
    from backends.simulated.cost.tables.profiles import identity as profile_identity  # only a modelled run names a file

    return profile_identity(path, kind)
