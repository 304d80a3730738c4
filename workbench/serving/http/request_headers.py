"""What a request may say beside its prompt and its sampling: when its tokens are due, and with whom it shares prefixes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from workbench.serving.http.protocol import Asked, bad_value

MAX_SALT_CHARACTERS = 1000
HEADERS = {
    "slo_ttft_s": (("x-slo-ttft-s", 1.0), ("x-slo-ttft-ms", 1e-3)),
    "slo_tpot_s": (("x-slo-tpot-s", 1.0), ("x-slo-tpot-ms", 1e-3)),
}
"""For each objective the headers that set it, and their unit in seconds: those in milliseconds are what routers send."""


def objective(name: str, asked: Asked, headers: Mapping[str, str]) -> float | None:
    """Seconds of the objective ``name`` of a request: from its body, else from a header, else None.

    Raises ApiError 400 for what is no positive number.
    """
    value: float | None = getattr(asked, name)
    if value is not None:
        return _positive(name, value)
    for header, unit_s in HEADERS[name]:
        if (text := headers.get(header)) is not None:
            try:
                given = float(text)
            except ValueError:
                raise bad_value(header, f"{text[:40]!r} is not a number") from None
            return _positive(header, given) * unit_s
    return None


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise bad_value(name, f"{value:g} is not positive and finite")
    return float(value)


def cache_salt(asked: Asked) -> str:
    """The salt of a request, "" for none. Raises ApiError 400 for an empty or an overlong one."""
    salt = asked.cache_salt
    if salt is None:
        return ""
    if not 0 < len(salt) <= MAX_SALT_CHARACTERS:
        raise bad_value("cache_salt", f"must have between 1 and {MAX_SALT_CHARACTERS} characters")
    return salt
