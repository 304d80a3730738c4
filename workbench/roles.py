"""Roles of instances."""

from __future__ import annotations

from typing import Literal

from workbench.scheduler.settings import ConfigError

Role = Literal["both", "prefill", "decode"]
ROLES: tuple[Role, ...] = ("both", "prefill", "decode")
"""What an instance may be there for: whole requests, their prompts, or what follows them."""
BUILT_ROLES: tuple[Role, ...] = ("both",)


def check_role(role: str) -> Role:
    """A role that instances can have. Raises ConfigError for one that is not known, or not built yet."""
    for known in ROLES:
        if role == known and known in BUILT_ROLES:
            return known
    if role in ROLES:
        raise ConfigError(f"role: {role!r} does not exist yet; instances run whole requests: {', '.join(BUILT_ROLES)}")
    raise ConfigError(f"role: {role!r} is not one of {', '.join(ROLES)}")
