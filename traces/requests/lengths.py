"""Distributions of lengths, by the words the command line has for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

HELP = "N, A-B, lognormal:mean=M,sigma=S or lognormal:median=M,sigma=S (,max=N cuts its tail)"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers of at least 1: `low` alone, evenly in [low, high], or log-normal about a median."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int = 1
    high: int = 1
    """Largest value; of a log-normal, where its tail is cut."""
    median: float = 1.0
    sigma: float = 0.0
    """Standard deviation of the logarithm."""

    def draw(self, rng: np.random.Generator) -> int:
        """One value."""
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return int(rng.integers(self.low, self.high + 1))
        return max(1, min(self.high, round(float(rng.lognormal(math.log(self.median), self.sigma)))))


def parse_lengths(text: str) -> Lengths:
    """Read `512`, `100-900`, `lognormal:mean=600,sigma=0.8` or `lognormal:median=600,sigma=0.8,max=8000`.

    Raises ValueError for anything else.
    """
    wrong = ValueError(f"'{text}' is not a length: give {HELP}")
    try:
        if text.startswith("lognormal:"):
            values = dict(part.split("=", 1) for part in text.removeprefix("lognormal:").split(","))
            sigma = float(values.pop("sigma"))
            high = int(values.pop("max", "1000000"))
            if "mean" in values:
                median = float(values.pop("mean")) / math.exp(sigma * sigma / 2)
            else:
                median = float(values.pop("median"))
            if values or not (0 <= sigma < 10 and 0 < median < math.inf and high >= 1):
                raise wrong
            return Lengths("lognormal", high=high, median=median, sigma=sigma)
        low, dash, high_text = text.partition("-")
        first = int(low)
        last = int(high_text) if dash else first
    except (ValueError, KeyError):
        raise wrong from None
    if not 1 <= first <= last:
        raise wrong
    return Lengths("uniform" if dash else "fixed", low=first, high=last)
