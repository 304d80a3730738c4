"""The value of ``--pool``: the instances of one kind behind the router, and what is different about them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.roles import check_role
from workbench.scheduler.config import Role
from workbench.scheduler.settings import ConfigError

GRAMMAR = "[NAME=]ROLE:N[,key=value...]"
_HEAD = re.compile(r"(?:(?P<name>[A-Za-z0-9_-]+)=)?(?P<role>[A-Za-z_-]+):(?P<count>\d+)")


@dataclass(frozen=True)
class PoolSpec:
    """One pool as it was said: its settings are still texts."""

    name: str
    role: Role
    count: int
    given: tuple[tuple[str, str], ...] = ()
    """Settings of its instances, by name with underscores."""

    @property
    def text(self) -> str:
        """Write the pool as ``--pool`` takes it."""
        keys = "".join(f",{key.replace('_', '-')}={value}" for key, value in self.given)
        name = "" if self.name == self.role else f"{self.name}="
        return f"{name}{self.role}:{self.count}{keys}"


def parse_pools(texts: Sequence[str]) -> list[PoolSpec]:
    """The pools of a cluster; one without a name is called as its role, then role-2, and so on.

    Raises ConfigError, in one line that names the pool, for a text that is none, a role that does not exist, a pool
    without instances, a name or a key given twice.
    """
    found = [_parsed(text) for text in texts]
    names = [name for name, _ in found if name]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"pool {name}: named twice")
    pools = []
    for name, pool in found:
        own = name or next(free for free in _names(pool.role) if free not in names)
        names.append(own)
        pools.append(PoolSpec(own, pool.role, pool.count, pool.given))
    return pools


def _names(role: str) -> Iterable[str]:
    yield role
    number = 2
    while True:
        yield f"{role}-{number}"
        number += 1


def _parsed(text: str) -> tuple[str, PoolSpec]:
    """(the name that was given, or nothing; the pool)."""
    head, *keys = [part.strip() for part in text.split(",")]
    matched = _HEAD.fullmatch(head)
    if matched is None:
        raise ConfigError(f"pool: {text!r} is not {GRAMMAR}")
    said = f"pool {matched['name'] or matched['role']}"
    try:
        role = check_role(matched["role"])
    except ConfigError as error:
        raise ConfigError(f"{said}: {error}") from None
    if (count := int(matched["count"])) < 1:
        raise ConfigError(f"{said}: {count} instances; there is at least one in a pool")
    given: dict[str, str] = {}
    for key in keys:
        name, equals, value = key.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name or not value.strip():
            raise ConfigError(f"{said}: {key!r} is not key=value")
        if name in given:
            raise ConfigError(f"{said}: {name}: given twice")
        given[name] = value.strip()
    return matched["name"] or "", PoolSpec("", role, count, tuple(given.items()))


def _texts(written: object) -> tuple[str, ...]:
    """Pools of a file, a record or a command line, each as ``--pool`` takes it: texts, or tables with ``role`` (default
    both), ``count`` (default 1), ``name`` and settings.

    Raises ConfigError.
    """
    if isinstance(written, str):
        written = [written]
    if not isinstance(written, list | tuple):
        raise ConfigError(f"pool: {written!r} is not a list of pools")
    return tuple(_text_of(each) for each in written)


def read_pools(written: object) -> tuple[str, ...]:
    """Pools as they are kept, each as ``--pool`` takes it. Raises ConfigError for what is no pool."""
    texts = _texts(written)
    if not texts:
        raise ConfigError("pool: there is none in the list")
    parse_pools(texts)
    return texts


def _text_of(pool: object) -> str:
    if isinstance(pool, str):
        return pool
    if not isinstance(pool, Mapping):
        raise ConfigError(f"pool: {pool!r} is no table, and no {GRAMMAR}")
    values: dict[str, Any] = dict(pool)
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"pool: {key!r} is not text, as names of settings are")
    name, role, count = values.pop("name", ""), values.pop("role", "both"), values.pop("count", 1)
    for key, text in (("name", name), ("role", role)):
        if not isinstance(text, str):
            raise ConfigError(f"pool: {key}: {text!r} is not text")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"pool {name or role}: count: {count!r} is not a whole number above 0")
    head = f"{name}={role}:{count}" if name else f"{role}:{count}"
    return ",".join([head, *(f"{key}={_plain(name or role, key, value)}" for key, value in values.items())])


def _plain(pool: object, key: str, value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, list | Mapping) or "," in text:
        raise ConfigError(f"pool {pool}: {key}: {value!r} is not one plain value without a comma")
    return text
