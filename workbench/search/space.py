"""The space of a search: which settings vary, and over what."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ground.errors import InputError
from workbench.settings.loading import FORMER, SETTINGS, renamed
from workbench.settings.no_such import no_such_setting
from workbench.settings.pool_keys import declared, split_name

Point = dict[str, Any]
"""One value for every varied setting."""

_RANGE = re.compile(r"(?P<low>[^,:/]+?)\.\.(?P<high>[^,:/]+)(/(?P<count>\d+))?(?P<log>:log)?")
NOT_VARIED = {
    "pool": "vary the settings of one, as in NAME.gpu=h100,h200 or NAME.instances=1..4",
    "fail": "commas join what it says of an instance",
    "autoscale": "commas join what it says of a pool",
    "slo_ttft": "it changes how runs are judged, not the runs",
    "slo_tpot": "it changes how runs are judged, not the runs",
}


class SpaceError(InputError):
    """A search space that makes no sense, in one line that names the setting."""


@dataclass(frozen=True)
class Dimension:
    """One varied setting: a list of values, or a range of numbers."""

    name: str
    values: tuple[Any, ...] = ()
    """What it may be, in order; empty for a range."""
    low: float = 0.0
    high: float = 0.0
    count: int | None = None
    """Steps of a range in a grid; None: every whole number, or with `log` the powers of two times `low`."""
    log: bool = False
    whole: bool = False
    """Whether a range holds whole numbers only."""

    def grid(self) -> tuple[Any, ...]:
        """The values of a grid search. Raises SpaceError for a range of fractions without a count."""
        if self.values:
            return self.values
        if self.count is not None:
            spaced = np.geomspace if self.log else np.linspace
            steps = spaced(self.low, self.high, self.count).tolist()
            return tuple(dict.fromkeys(round(step) if self.whole else _short(step) for step in steps))
        if not self.whole:
            raise SpaceError(
                f"{self.name}: a grid needs to know how many steps {self.low:g}..{self.high:g} has: write "
                f"{self.low:g}..{self.high:g}/5"
            )
        if not self.log:
            return tuple(range(int(self.low), int(self.high) + 1))
        doublings = int(math.log2(self.high / self.low) + 1e-9)
        return tuple(int(self.low) * 2**power for power in range(doublings + 1))

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value; of a logarithmic range every factor is as likely as any other."""
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        if self.whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return round(value) if self.whole else _short(value)

    @property
    def size(self) -> float:
        """Number of values; infinite for a range of fractions."""
        if self.values:
            return len(self.values)
        return self.high - self.low + 1 if self.whole else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Give the dimension as JSON has it, for the manifest of a search."""
        if self.values:
            return {"name": self.name, "values": list(self.values)}
        return {"name": self.name, "low": self.low, "high": self.high, "count": self.count, "log": self.log}


def _short(value: float) -> float:
    """Six digits are enough to set anything, and can be read and typed again."""
    return float(f"{value:.6g}")


def parse_vary(texts: list[str]) -> list[Dimension]:
    """Dimensions from `key=v1,v2`, `key=low..high`, `key=low..high/count`, each range with `:log` or without.

    Raises SpaceError, in one line, for an unknown or repeated setting and for values that are not of its kind.
    """
    if not texts:
        raise SpaceError("vary: nothing varies; give --vary key=v1,v2 at least once")
    dimensions = [_parse(text) for text in texts]
    names = [dimension.name for dimension in dimensions]
    for name in names:
        if names.count(name) > 1:
            raise SpaceError(f"{name}: varied twice; give all its values in one --vary")
    return dimensions


def renamed_in_vary(texts: list[str]) -> list[str]:
    """Notes on the settings of `--vary` that are called otherwise now."""
    return renamed((_name(text.partition("=")[0]) for text in texts), "vary: ")


def _name(key: str) -> str:
    """The name of a setting as settings have it: of a pool's, the pool's own name is left as it is."""
    pool, dot, own = key.strip().removeprefix("--").rpartition(".")
    name = own.replace("-", "_")
    return f"{pool}{dot}{FORMER.get(name, name)}" if dot else name


def _parse(text: str) -> Dimension:
    key, equals, rest = text.partition("=")
    name = FORMER.get(_name(key), _name(key))
    of_pool = split_name(name)
    if of_pool is not None:
        _said(declared, name, of_pool[0])
    elif name not in SETTINGS:
        raise SpaceError(no_such_setting(key.strip() or text, SETTINGS))
    if name in NOT_VARIED:
        raise SpaceError(f"{name}: cannot be varied: {NOT_VARIED[name]}")
    if not equals or not rest.strip():
        raise SpaceError(f"{name}: no values; write {name}=v1,v2 or, for numbers, {name}=low..high")
    if found := _RANGE.fullmatch(rest.strip()):
        return _range(name, found)
    setting = declared(name)
    values = tuple(_said(setting.parse, part.strip(), of_pool and of_pool[0]) for part in rest.split(","))
    for value in values:
        if of_pool is not None:
            _said(setting.check, value, of_pool[0])
        if values.count(value) > 1:
            raise SpaceError(f"{name}: {value} is given twice")
    return Dimension(name, values)


def _range(name: str, found: re.Match[str]) -> Dimension:
    setting, of_pool = declared(name), split_name(name)
    kind, pool = setting.kind, of_pool and of_pool[0]
    if kind not in (int, float):
        raise SpaceError(f"{name}: {found[0]!r}: a range needs a setting that is a number")
    low, high = (_said(setting.parse_plain, found[end].strip(), pool) for end in ("low", "high"))
    if pool is not None:
        _said(setting.check, low, pool)
    if not low < high:
        raise SpaceError(f"{name}: {found[0]!r}: the range does not rise")
    log = found["log"] is not None
    if log and low <= 0:
        raise SpaceError(f"{name}: {found[0]!r}: a logarithmic range starts above 0")
    count = int(found["count"]) if found["count"] else None
    if count is not None and count < 2:
        raise SpaceError(f"{name}: {found[0]!r}: a range has 2 steps or more")
    return Dimension(name, (), low, high, count, log, kind is int)


def _said(parse: Callable[[Any], Any], text: Any, pool: str | None = None) -> Any:
    """The value that `text` stands for in a setting, of a `pool` if that is given. Raises SpaceError when it is not of its
    kind."""
    try:
        return parse(text)
    except ValueError as error:  # in one line that names the setting
        raise SpaceError(f"{pool}.{error}" if pool else str(error)) from None


def grid_points(space: list[Dimension]) -> Iterator[Point]:
    """Every combination, the last dimension changing fastest."""
    names = [dimension.name for dimension in space]
    for values in itertools.product(*(dimension.grid() for dimension in space)):
        yield dict(zip(names, values, strict=True))


def grid_size(space: list[Dimension]) -> int:
    """Count the combinations of a grid."""
    return math.prod(len(dimension.grid()) for dimension in space)


def random_points(space: list[Dimension], number: int, seed: int) -> list[Point]:
    """Draw so many different points; fewer where the space has no more."""
    if math.prod(dimension.size for dimension in space) <= number:
        return list(grid_points([dataclasses.replace(d, count=None, log=False) for d in space]))
    rng = np.random.default_rng(seed)
    found: dict[tuple[Any, ...], Point] = {}
    while len(found) < number:
        point = {dimension.name: dimension.draw(rng) for dimension in space}
        found.setdefault(tuple(point.values()), point)
    return list(found.values())
