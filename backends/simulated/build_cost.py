"""The cost model of a run, by its kind."""

from __future__ import annotations

from pathlib import Path

from backends.simulated.cost import CostModel
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.links import LINKS


def build_cost(kind: str, path: Path | None, want: CostRequest) -> CostModel:
    """The cost model for a run: ``roofline``, ``measured``, or a ``profile`` or ``fitted`` one out of the file ``path``.

    Raises ``CostError`` or ``ProfileError`` with one line.
    """
    if kind == "roofline":
        return RooflineCost(
            want.model,
            want.gpu,
            dtype=want.weights,
            kv_dtype=want.kv_dtype,
            tp=want.tp,
            pp=want.pp,
            ep=want.ep,
            capture_sizes=want.capture_sizes,
            mixed_capture_sizes=want.mixed_capture_sizes,
            exchange=want.exchange,
            expert_skew=want.expert_skew or 0.0,
        )
    if kind == "fitted":
        assert path is not None
        from backends.simulated.cost.tables.fitted_file import load_fitted

        return load_fitted(path, want)
    from backends.simulated.cost.models.profile import ProfileCost

    if kind == "measured":
        from backends.simulated.cost.tables.measured_operators import read_measured

        tables = read_measured(want)
    else:
        from backends.simulated.cost.tables.profiles import read_profile

        assert path is not None
        tables = read_profile(path, want.tp, want.model, want.gpu, want.dtype, want.kv_dtype, want.ep)
    apart = max(want.tp, want.ep) > want.gpu.gpus_per_node
    if (want.links_said or apart) and (tables.all_reduce or tables.gather or tables.scatter):
        tables.all_reduce = tables.gather = tables.scatter = None
        why = "as they were said" if want.links_said else "those between nodes, too"
        tables.notes.append(f"{LINKS}{why}, in place of the measured collectives of another machine")
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
        exchange=want.exchange,
        # Tables of experts by load were measured on the most loaded GPU.
        expert_skew=(want.expert_skew or 0.0) if kind != "measured" else 0.0,
    )
