"""How unevenly tokens fall on experts: a power law, as published tables of operators were measured with.

Of ``tokens`` that choose ``per_token`` of ``count`` experts each, the loads of the experts are the quantiles of a density
of ``load ** -skew`` between 1 and 0.8 of the tokens (between 0.01 and 2 where there are fewer choices than experts), brought
to the sum of all choices: what AIConfigurator's collector draws at random (``power_law_logits`` of its ``collect_moe.py``).
Rounded to tokens they say how many experts have some, and the times of its tables follow that number.
A skew of 0 is none: every expert is as likely as any other.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np

MOST = 0.8
"""Share of the tokens that the most loaded expert may have, before loads are brought to the sum of the choices."""


@lru_cache(maxsize=4096)
def expert_shares(count: int, per_token: int, tokens: int, skew: float) -> np.ndarray:
    """Share of all choices that falls on each expert, float[count], from the least to the most loaded."""
    if not skew:
        return np.full(count, 1 / count)
    least, most = (1.0, MOST * tokens) if tokens * per_token > count else (0.01, 2.0)
    at = (np.arange(count) + 0.5) / count
    if abs(skew - 1) < 1e-9:
        loads = least * (most / least) ** at
    else:
        low, high = least ** (1 - skew), most ** (1 - skew)
        loads = (low + at * (high - low)) ** (1 / (1 - skew))
    found: np.ndarray = loads / loads.sum()
    return found


def tokens_of_experts(count: int, per_token: int, tokens: int, skew: float) -> np.ndarray:
    """Tokens of each expert, int[count], from the least to the most loaded: their shares of all choices, rounded. What is
    lost by rounding goes to those with the fewest, what is gained is taken from those with the most."""
    choices = tokens * per_token
    found = np.rint(expert_shares(count, per_token, tokens, skew) * choices).astype(np.int64).clip(max=tokens)
    while (lost := choices - int(found.sum())) > 0:
        found[np.flatnonzero(found < tokens)[:lost]] += 1
    while (gained := int(found.sum()) - choices) > 0:
        found[np.flatnonzero(found)[-gained:]] -= 1
    found.sort()
    return found


@lru_cache(maxsize=4096)
def distinct_experts(count: int, per_token: int, tokens: int, skew: float = 0.0) -> float:
    """Experts that any of the tokens chooses: without skew as expected of choices at random, else as the law has it."""
    if not skew:
        return count * (1 - (1 - per_token / count) ** tokens)
    return float(np.count_nonzero(tokens_of_experts(count, per_token, tokens, skew)))


@lru_cache(maxsize=4096)
def imbalance(count: int, per_token: int, tokens: int, skew: float, parts: int) -> float:
    """By how much more than its even share of the choices the most loaded of equal parts of the experts has, as expected
    where experts are dealt to parts at random: 1 is even."""
    if not skew or parts == 1:
        return 1.0
    shares = expert_shares(count, per_token, tokens, skew)
    each = count // parts
    # The sum of `each` drawn without replacement; the largest of `parts` normal values that sum up to nothing (Blom, 1958).
    spread = float(shares.std()) * (each * (count - each) / max(count - 1, 1)) ** 0.5
    largest = NormalDist().inv_cdf((parts - 0.375) / (parts + 0.25)) * (parts / (parts - 1)) ** 0.5
    return max(float(shares[-1]) * parts, 1.0 + spread * largest * parts)
