"""The values of ``--fail`` and ``--autoscale``: which instances are lost and when, and how many a pool has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args

from ground.link import parse_time
from workbench.scheduler.settings import ConfigError

Signal = Literal["queue", "kv", "slo"]
FAIL_GRAMMAR = "POOL.N:at=TIME[,for=TIME]"
AUTOSCALE_GRAMMAR = (
    "POOL:max=N[,min=N][,signal=queue|kv|slo][,target=X][,every=TIME][,start=TIME][,drain=TIME][,cool-down=TIME]"
)
TARGETS: Mapping[Signal, float] = {"queue": 4.0, "kv": 0.8, "slo": 0.05}
"""Above which instances are added: requests that wait for each instance, share of its KV in use, share of requests that miss
their objective."""
_INSTANCE = re.compile(r"(?P<pool>[A-Za-z0-9_-]+)\.(?P<place>\d+)")


@dataclass(frozen=True)
class Failure:
    """An instance that is lost at a moment, with all it holds."""

    pool: str
    place: int
    """Of the instance in its pool, from 0."""
    at_s: float
    for_s: float = inf
    """How long it is gone."""


@dataclass(frozen=True)
class Scaling:
    """How many instances a pool has: from ``least`` to ``most`` of them, by a signal that is looked at again and again."""

    pool: str
    most: int
    least: int = 1
    signal: Signal = "queue"
    target: float = TARGETS["queue"]
    every_s: float = 5.0
    start_s: float = 60.0
    """From the decision on until it takes requests."""
    drain_s: float = inf
    """Most that it may take one that gets nothing new to be done with what it has."""
    cool_down_s: float = 60.0
    """From a change to the next one that takes an instance away."""


def parse_failures(texts: Sequence[str]) -> list[Failure]:
    """Failures from their texts. Raises ConfigError, in one line that names the instance."""
    return [_failure(text) for text in texts]


def parse_scalings(texts: Sequence[str]) -> list[Scaling]:
    """Scalings from their texts. Raises ConfigError, in one line that names the pool."""
    found = [_scaling(text) for text in texts]
    for scaling in found:
        if sum(other.pool == scaling.pool for other in found) > 1:
            raise ConfigError(f"autoscale: {scaling.pool}: given twice")
    return found


def _failure(text: str) -> Failure:
    head, _, rest = text.partition(":")
    matched = _INSTANCE.fullmatch(head.strip())
    if matched is None:
        raise ConfigError(f"fail: {text!r} is not {FAIL_GRAMMAR}")
    said = f"fail: {head.strip()}"
    given = _given(said, rest, {"at": parse_time, "for": parse_time}, FAIL_GRAMMAR)
    if "at" not in given:
        raise ConfigError(f"{said}: at is missing; when is it lost?")
    if given.get("for", 1.0) <= 0:
        raise ConfigError(f"{said}: for: is not above 0")
    return Failure(matched["pool"], int(matched["place"]), given["at"], given.get("for", inf))


def _scaling(text: str) -> Scaling:
    pool, _, rest = text.partition(":")
    pool = pool.strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]+", pool):
        raise ConfigError(f"autoscale: {text!r} is not {AUTOSCALE_GRAMMAR}")
    said = f"autoscale: {pool}"
    readers: dict[str, Callable[[str], Any]] = {
        "min": _count,
        "max": _count,
        "signal": _signal,
        "target": _above_zero,
        **dict.fromkeys(("every", "start", "drain", "cool-down"), parse_time),
    }
    given = _given(said, rest, readers, AUTOSCALE_GRAMMAR)
    if "max" not in given:
        raise ConfigError(f"{said}: max is missing; how many may there be?")
    least, most = given.get("min", 1), given["max"]
    if least > most:
        raise ConfigError(f"{said}: min: {least} is more than max {most}")
    if given.get("every", 1.0) <= 0:
        raise ConfigError(f"{said}: every: is not above 0")
    signal: Signal = given.get("signal", "queue")
    target = given.get("target", TARGETS[signal])
    if signal != "queue" and target > 1:
        raise ConfigError(f"{said}: target: {target:g} is no share between 0 and 1, as signal {signal} is")
    times = {
        name: given[key]
        for name, key in (
            ("every_s", "every"),
            ("start_s", "start"),
            ("drain_s", "drain"),
            ("cool_down_s", "cool-down"),
        )
        if key in given
    }
    return Scaling(pool, most, least, signal, target, **times)


def _given(said: str, text: str, readers: Mapping[str, Callable[[str], Any]], grammar: str) -> dict[str, Any]:
    """The values of ``key=value,...`` by key. Raises ConfigError."""
    found: dict[str, Any] = {}
    for part in text.split(",") if text.strip() else []:
        key, equals, value = (each.strip() for each in part.partition("="))
        key = key.replace("_", "-")
        if not equals or not value:
            raise ConfigError(f"{said}: {part.strip()!r} is not key=value, as in {grammar}")
        if key not in readers:
            raise ConfigError(f"{said}: {key}: no such key; there are {', '.join(readers)}")
        if key in found:
            raise ConfigError(f"{said}: {key}: given twice")
        try:
            found[key] = readers[key](value)
        except ValueError as error:
            raise ConfigError(f"{said}: {key}: {error}") from None
    return found


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number above 0")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < inf:
        raise ValueError(f"{text!r} is not a number above 0")
    return number


def _signal(text: str) -> str:
    if text not in get_args(Signal):
        raise ValueError(f"{text!r} is not one of {', '.join(get_args(Signal))}")
    return text


def texts_of(name: str, parse: Callable[[Sequence[str]], object]) -> Callable[[object], tuple[str, ...]]:
    """A reader of a setting that is a list of such texts, each as the flag takes it."""

    def read(written: object) -> tuple[str, ...]:
        given = [written] if isinstance(written, str) else written
        if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
            raise ConfigError(f"{name}: {written!r} is not a list of texts")
        parse(given)
        return tuple(given)

    return read


def check_fleet(
    failures: Iterable[Failure], scalings: Sequence[Scaling], counts: Mapping[str, int], slo: Mapping[str, bool]
) -> None:
    """Raise ConfigError for pools and instances that there are not, by the number of instances that each pool begins with.
    ``slo`` says for each pool whether there is an objective that its signal would be of."""
    most = dict(counts)
    for scaling in scalings:
        said = f"autoscale: {scaling.pool}"
        if scaling.pool not in counts:
            raise ConfigError(f"{said}: no such pool; there are {', '.join(counts)}")
        begins = counts[scaling.pool]
        if not scaling.least <= begins <= scaling.most:
            raise ConfigError(
                f"{said}: the pool begins with {begins}, which is not between min {scaling.least} and max {scaling.most}"
            )
        if scaling.signal == "slo" and not slo[scaling.pool]:
            raise ConfigError(f"{said}: signal: slo needs slo_ttft, or for a pool that decodes slo_tpot")
        most[scaling.pool] = scaling.most
    for failure in failures:
        said = f"fail: {failure.pool}.{failure.place}"
        if failure.pool not in most:
            raise ConfigError(f"{said}: no such pool; there are {', '.join(most)}")
        if failure.place >= most[failure.pool]:
            raise ConfigError(f"{said}: the pool has instances 0 to {most[failure.pool] - 1}")
