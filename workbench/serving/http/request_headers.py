"""What routers say of a request in headers: its objectives, beside those in its body, and where its other half is."""

from __future__ import annotations

from collections.abc import Mapping

from workbench.scheduler.config import Role
from workbench.serving.http.bodies import Asked
from workbench.serving.refusals import bad_value
from workbench.serving.requests import ROOM_BITS, Shared, check_address, check_objective, is_plain

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


ROOM, PEER, ROUTER = PAIR = ("x-workbench-room", "x-workbench-peer", "x-workbench-router")
MOST_ROOM = 1 << 47


def shared_of(role: Role, headers: Mapping[str, str]) -> Shared | None:
    """Return where the other half of a request is; None on an instance that serves whole requests. Raises Refusal where the
    headers do not go with the role, or cannot be read."""
    given = [name for name in PAIR if name in headers]
    if role == "both":
        if given:
            raise bad_value(given[0], "this instance serves whole requests; it is neither half of a pair")
        return None
    if len(given) < len(PAIR):
        missing = next(name for name in PAIR if name not in headers)
        raise bad_value(
            missing,
            f"is missing: this instance has role {role}, and a router sends each request to one of either role",
            "missing_required_parameter",
        )
    room, peer, router = (headers[name] for name in PAIR)
    if not (room.isascii() and room.isdigit() and len(room) < 20 and int(room) < MOST_ROOM):
        raise bad_value(ROOM, f"{room[:40]!r} is not a whole number below 2**47")
    if not is_plain(router):
        raise bad_value(ROUTER, "must have between 1 and 200 printable ASCII characters and no space")
    return Shared(router, int(room) << ROOM_BITS, check_address(PEER, peer))
