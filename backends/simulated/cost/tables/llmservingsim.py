"""Profile folders of LLMServingSim 2 (kernel times inside vLLM, one layer, microseconds).

A folder holds ``meta.yaml`` and one ``tp<N>/`` a tensor-parallel size, each with ``dense``, ``per_sequence`` and
``attention`` tables, and ``skew`` and ``moe`` where they were measured; tables are CSV, plain or gzip. A ``skew`` table that
``meta.yaml`` says is not this profile's (``skew_profile``, ``enabled: false``) is not read, with a note.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from backends.simulated.catalogue.model_specs import ModelSpec
from backends.simulated.cost.models.attention_table import attention_table
from backends.simulated.cost.models.operator_tables import (
    AttentionTable,
    Curve,
    Grid,
    OperatorTables,
    ProfileError,
    Provenance,
    grid_from_points,
)
from backends.simulated.cost.tables.csv_table import find_table, read_table, size_folder
from ground.value_file import read_yaml

MICROSECOND = 1e-6
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""Operators whose time is a staircase over tokens."""
CALLS = {"layernorm": 2, "qk_norm": 2}
"""Number of times an operator runs in a layer, where it is not once. The tables hold the time of one call, averaged over
calls of the same class: the two norms around attention, and the norms of queries and of keys."""
ONCE = ("embedding", "final_layernorm")
"""Operators that run once a step."""
ATTENTION_KERNELS = 2
"""Writing the new KV, and attention."""
EXPERT_KERNELS = 6
"""Router, choice, alignment, two grouped products and the activation between them."""


def is_llmservingsim(path: Path) -> bool:
    """Tell whether a folder looks like one of these profiles."""
    return (path / "meta.yaml").is_file()


def read_meta(path: Path) -> dict[str, Any]:
    """The facts of ``meta.yaml``. Raises :class:`ProfileError`."""
    file = path / "meta.yaml"
    meta = read_yaml(file, ProfileError)
    for name in ("model", "hardware"):
        if not isinstance(meta.get(name), str):
            raise ProfileError(f"{file}: {name}: missing")
    return meta


def skew_enabled(path: Path) -> bool:
    """Whether a profile counts its measurements of decodes of unequal length in, where it has any. Raises
    :class:`ProfileError`."""
    skew = read_meta(path).get("skew_profile", {})
    enabled = skew.get("enabled", True) if isinstance(skew, dict) else None
    if not isinstance(enabled, bool):
        raise ProfileError(f"{path / 'meta.yaml'}: skew_profile.enabled: not true or false")
    return enabled


def provenance(path: Path, tp: int) -> Provenance:
    """Describe the origin of the profile of one size."""
    meta = read_meta(path)
    return Provenance(
        path,
        "llmservingsim",
        meta["hardware"],
        str(meta.get("variant", "bf16")).split("-")[0],
        meta["model"],
        f"vLLM {meta['vllm_version']}" if "vllm_version" in meta else "",
        str(meta.get("profiled_at", "")),
        tp,
    )


def read(path: Path, tp: int, model: ModelSpec) -> OperatorTables:
    """The tables of one tensor-parallel size. Raises :class:`ProfileError` for what is missing or cannot be read."""
    folder = size_folder(path, tp)
    layer, once = _dense(path, folder, tp)
    needed = ["qkv_proj", "o_proj"]
    if not all(model.moe_layers):
        needed += ["gate_up_proj", "down_proj"]
    for name in needed:
        if name not in layer:
            raise ProfileError(f"{find_table(folder, 'dense')}: no rows of operator {name!r}")
    missing = []
    for name in ("layernorm", "rotary_emb", *(("act_fn",) if not all(model.moe_layers) else ())):
        if name not in layer:
            missing.append(f"{name}: taken as free")
    experts = None
    if any(model.moe_layers):
        experts = _experts(path, folder)
    head = _curves(folder, "per_sequence", "sequences")
    repetitions = read_meta(path).get("measurement_iterations", 1)
    skew = find_table(folder, "skew", missing_ok=True)
    notes = []
    if skew is not None and not skew_enabled(path):
        skew = None
        notes.append(f"{path}: decodes of unequal length count as long as their mean: meta.yaml turns skew_profile off")
    if "lm_head" not in head:
        raise ProfileError(f"{find_table(folder, 'per_sequence')}: no rows of operator 'lm_head'")
    kernels = sum(CALLS.get(name, 1) for name in layer) + ATTENTION_KERNELS + EXPERT_KERNELS * (experts is not None)
    return OperatorTables(
        provenance(path, tp),
        layer,
        once,
        head,
        _attention(folder, skew, max(int(repetitions), 1)),
        experts,
        notes=notes,
        missing=missing,
        kernels_per_layer=kernels,
        layers_timed=True,
    )


def _dense(path: Path, folder: Path, tp: int) -> tuple[dict[str, Curve], dict[str, Curve]]:
    curves = _curves(folder, "dense", "tokens")
    if tp > 1 and "qk_norm" in curves and find_table(path / "tp1", "dense", missing_ok=True) is not None:
        single = _curves(path / "tp1", "dense", "tokens").get("qk_norm")
        if single is not None and np.array_equal(single.seconds, curves["qk_norm"].seconds):
            # Copied from one GPU, not measured: each GPU normalises its own heads, so it has 1/tp of the rows.
            curves["qk_norm"] = Curve(single.counts, [single.at(count / tp) for count in single.counts])
    layer = {name: curve for name, curve in curves.items() if name not in ONCE}
    for name, calls in CALLS.items():
        if name in layer:
            layer[name] = layer[name].times(calls)
    return layer, {name: curve for name, curve in curves.items() if name in ONCE}


def _curves(folder: Path, table: str, count: str) -> dict[str, Curve]:
    columns = read_table(find_table(folder, table), ("layer",), (count, "time_us"))
    names = np.array(columns["layer"])
    curves = {}
    for name in dict.fromkeys(columns["layer"]):
        of = names == name
        curves[str(name)] = Curve(columns[count][of], columns["time_us"][of] * MICROSECOND, staircase=name in MATRICES)
    return curves


def _attention(folder: Path, skew: Path | None, repetitions: int = 1) -> AttentionTable:
    file = find_table(folder, "attention")
    columns = read_table(file, (), ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"))
    points = np.stack([columns[name] for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")], axis=1)
    seconds = columns["time_us"] * MICROSECOND
    equal = attention_table(points, seconds, file)
    if skew is None:
        return equal
    rows = read_table(skew, (), ("n", "pc", "kp", "kv_big", "kv_mean", "t_max_us", "t_skew_us"))
    # This table holds sums over the repetitions of a measurement where the others hold means. Its own batches of equal
    # length (all at the longest) tell which of the two it is.
    looked_up = np.array(
        [
            equal.mixed.at(pc, kp, n, kv) if pc else equal.decode.at(n, kv)
            for pc, kp, n, kv in zip(rows["pc"], rows["kp"], rows["n"], rows["kv_big"], strict=True)
        ]
    )
    ratio = float(np.median(rows["t_max_us"] * MICROSECOND / looked_up))
    summed = min((1, repetitions), key=lambda count: abs(np.log(ratio / count)))
    uneven = {
        "prefill": rows["pc"],
        "cached": rows["kp"],
        "decodes": rows["n"],
        "longest": rows["kv_big"],
        "mean": rows["kv_mean"],
        "seconds": rows["t_skew_us"] * MICROSECOND / summed,
    }
    return attention_table(points, seconds, file, uneven)


def _experts(path: Path, folder: Path) -> Grid:
    # An expert's weights are the same however attention is split: measured once, with all experts on one GPU.
    file = find_table(folder, "moe", missing_ok=True) or find_table(path / "tp1", "moe", missing_ok=True)
    if file is None:
        raise ProfileError(f"{path}: no table 'moe' in tp1, and the model has experts")
    columns = read_table(file, (), ("tokens", "activated_experts", "time_us"))
    points = np.stack((columns["tokens"], columns["activated_experts"]), axis=1)
    return grid_from_points(points, columns["time_us"] * MICROSECOND, (1, 0))
