"""Roles of instances."""

from __future__ import annotations

from typing import get_args

from workbench.scheduler.config import Role
from workbench.scheduler.settings import ConfigError

ROLES: tuple[Role, ...] = get_args(Role)


def check_role(role: str) -> Role:
    """A role that instances can have. Raises ConfigError for one that is not known."""
    for known in ROLES:
        if role == known:
            return known
    raise ConfigError(f"role: {role!r} is not one of {', '.join(ROLES)}")
