"""Sampling parameters of a request, and the checks before any of them reaches the scheduler."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from workbench.scheduler.request import SamplingParams
from workbench.serving.refusals import bad_value
from workbench.serving.requests import Limits, check_token

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_LOGPROBS = 20


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that all ways to ask for tokens share. None means: not given."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None


class Count(NamedTuple):
    """A number of tokens, and the name under which the client gave it."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Counts:
    """Numbers of a request that have different names at different endpoints."""

    max_tokens: Count
    min_tokens: Count
    logprobs: Count | None
    """Likely tokens to report with the log probability of each that is sampled; None: nothing is reported."""


def count(default: int, **given: int | None) -> Count:
    """Return a number by whichever of its names it was given.

    Raises Refusal where two of them differ, or for one that counts nothing.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if len(set(found.values())) > 1:
        name, other = list(found)[:2]
        raise bad_value(name, f"is another name of {other}, and they differ ({found[name]} and {found[other]})")
    for name, value in found.items():
        if not 0 <= value < 1 << 31:
            raise bad_value(name, f"{value} is {'less than 0' if value < 0 else 'too large'}")
    return Count(*next(iter(found.items()), (next(iter(given)), default)))


def sampling_params(given: Sampling, counts: Counts, limits: Limits) -> SamplingParams:
    """Return the scheduler's parameters: values checked, and filled in where they were not given. Raises Refusal."""
    temperature = _number("temperature", given.temperature, 1.0, 0, 100)
    top_k = given.top_k if given.top_k is not None else 0
    if top_k < -1:
        raise bad_value("top_k", f"{top_k} is less than 1 (0 or -1: all tokens)")
    most, least, logprobs = counts.max_tokens, counts.min_tokens, counts.logprobs
    if least.tokens > most.tokens:
        raise bad_value(least.name, f"{least.tokens} is not between 0 and {most.name} ({most.tokens})")
    if given.seed is not None and not -(1 << 63) <= given.seed < 1 << 63:
        raise bad_value("seed", f"{given.seed} does not fit 64 bits")
    stop_token_ids = tuple(given.stop_token_ids or ())
    for token in stop_token_ids:
        check_token("stop_token_ids", token, limits)
    if logprobs is not None:
        if logprobs.tokens > MAX_LOGPROBS:
            raise bad_value(logprobs.name, f"{logprobs.tokens} is not between 0 and {MAX_LOGPROBS}")
        if not limits.logprobs:
            raise bad_value(
                logprobs.name,
                f"the {limits.backend} backend has no probabilities to report",
                "unsupported_parameter",
            )
    return SamplingParams(
        max_new_tokens=most.tokens,
        ignore_eos=limits.ignore_eos if given.ignore_eos is None else given.ignore_eos,
        stop_token_ids=stop_token_ids,
        min_new_tokens=least.tokens,
        temperature=temperature,
        top_k=min(max(top_k, 0), limits.vocab),
        top_p=_number("top_p", given.top_p, 1.0, 0, 1, above=True),
        min_p=_number("min_p", given.min_p, 0.0, 0, 1),
        repetition_penalty=_number("repetition_penalty", given.repetition_penalty, 1.0, 0, 100, above=True),
        presence_penalty=_number("presence_penalty", given.presence_penalty, 0.0, -2, 2),
        frequency_penalty=_number("frequency_penalty", given.frequency_penalty, 0.0, -2, 2),
        logit_bias=_logit_bias(given.logit_bias, limits),
        seed=given.seed,
        logprobs=None if logprobs is None else logprobs.tokens,
    )


def _number(name: str, value: float | None, default: float, low: float, high: float, *, above: bool = False) -> float:
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise bad_value(
            name, f"{value:g} is not {'above' if above else 'between'} {low:g} and {'at most ' * above}{high:g}"
        )
    return float(value)


def _logit_bias(given: dict[str, float] | None, limits: Limits) -> tuple[tuple[int, float], ...]:
    biases = []
    for key, value in (given or {}).items():
        if not re.fullmatch(r"[0-9]{1,19}(\.0*)?", key):
            raise bad_value("logit_bias", f"{key!r} is not a token id")
        token = int(key.partition(".")[0])
        check_token("logit_bias", token, limits)
        biases.append((token, _number("logit_bias", value, 0.0, -100, 100)))
    return tuple(biases)


def stop_strings(given: str | list[str] | None) -> tuple[str, ...]:
    """Return stop strings as a tuple. Raises Refusal for what can be none."""
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MAX_STOPS:
        raise bad_value("stop", f"{len(stops)} strings are more than {MAX_STOPS}")
    for stop in stops:
        if not stop:
            raise bad_value("stop", "an empty string would stop at once")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise bad_value("stop", f"a string of {len(stop)} characters is longer than {MAX_STOP_CHARACTERS}")
    return stops
