"""The cost model that ``--cost`` names."""

from __future__ import annotations

from pathlib import Path

from backends.simulated.cost import CostModel
from backends.simulated.cost.cost_request import CostError, CostRequest
from backends.simulated.cost.models.roofline import RooflineCost

KINDS = ("roofline", "profile:PATH", "fitted:PATH")


def split(spec: str) -> tuple[str, Path | None]:
    """(kind, path) of what follows ``--cost``. Raises :class:`CostError`."""
    kind, colon, path = spec.partition(":")
    if kind == "roofline" and not colon:
        return kind, None
    if kind in ("profile", "fitted") and path:
        return kind, Path(path)
    raise CostError(f"cost: {spec!r} is not one of {', '.join(KINDS)}")


def build_cost(spec: str, want: CostRequest) -> CostModel:
    """The cost model for a run. Raises :class:`CostError` or ``ProfileError`` with one line."""
    kind, path = split(spec)
    if path is None:
        return RooflineCost(
            want.model,
            want.gpu,
            dtype=want.weights,
            kv_dtype=want.kv_dtype,
            tp=want.tp,
            pp=want.pp,
            ep=want.ep,
            capture_sizes=want.capture_sizes,
        )
    if kind == "fitted":
        from backends.simulated.cost.models.fitted import load_fitted

        return load_fitted(path, want)
    from backends.simulated.cost.models.profile import ProfileCost
    from backends.simulated.cost.tables.profiles import read_profile

    tables = read_profile(path, want.tp, want.model, want.gpu, want.dtype)
    return ProfileCost(
        tables,
        want.model,
        want.gpu,
        dtype=want.weights,
        kv_dtype=want.kv_dtype,
        tp=want.tp,
        pp=want.pp,
        ep=want.ep,
        capture_sizes=want.capture_sizes,
        mixed_capture_sizes=want.mixed_capture_sizes,
        step_s=want.step_s,
        request_s=want.request_s,
    )
