"""Objectives of a request as headers, which routers set, beside those in its body."""

from __future__ import annotations

from collections.abc import Mapping

from workbench.serving.http.bodies import Asked
from workbench.serving.refusals import bad_value
from workbench.serving.requests import check_objective

HEADERS = {
    "slo_ttft_s": (("x-slo-ttft-s", 1.0), ("x-slo-ttft-ms", 1e-3)),
    "slo_tpot_s": (("x-slo-tpot-s", 1.0), ("x-slo-tpot-ms", 1e-3)),
}
"""For each objective the headers that set it, and their unit in seconds: those in milliseconds are what routers send."""


def objective_of(name: str, asked: Asked, headers: Mapping[str, str]) -> float | None:
    """Return seconds of the objective ``name`` of a request: from its body, else from a header, else None.

    Raises Refusal for a header that is no positive number.
    """
    value: float | None = getattr(asked, name)
    if value is not None:
        return value
    for header, unit_s in HEADERS[name]:
        if (text := headers.get(header)) is not None:
            try:
                given = float(text)
            except ValueError:
                raise bad_value(header, f"{text[:40]!r} is not a number") from None
            return check_objective(header, given) * unit_s
    return None
