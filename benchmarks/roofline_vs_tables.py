"""The roofline against measured operator times: the same steps by both cost models.

    python benchmarks/roofline_vs_tables.py [DATA]

Prints, for every GPU that has tables and a few models, how much longer the roofline says a step takes than its measured
operators add up to. The achievable shares in ``gpus.toml`` were fitted to single operators of these tables
(``roofline_fit.py``), not to steps of these models. DATA is ../shared/data.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from profile_lookup import batch

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.operator_tables import ProfileError
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.models.roofline import RooflineCost
from backends.simulated.cost.tables.profiles import read_profile
from workbench.scheduler.batch import ModelWorkerBatch

MODELS = {
    "Qwen/Qwen3-0.6B": (1,),
    "meta-llama/Llama-3.1-8B": (1, 2, 4),
    "Qwen/Qwen3-14B": (1,),
    "Qwen/Qwen3-32B": (1, 2, 4),
    "meta-llama/Llama-3.1-70B": (4, 8),
    "Qwen/Qwen3-30B-A3B": (1, 2),
}
"""Tensor-parallel sizes of each."""
RTX_MODELS = {"meta-llama/Llama-3.1-8B": (1, 2), "Qwen/Qwen3-32B": (1, 2), "Qwen/Qwen3-30B-A3B-Instruct-2507": (1, 2)}


def steps() -> dict[str, ModelWorkerBatch]:
    """Decodes by number and context, prompts by length."""
    decodes = {(n, 1024) for n in (1, 16, 64, 128, 256)} | {(16, 4096), (64, 4096)}
    found = {
        f"{n} at {kv // 1024}k": batch(np.full(n, kv, np.int64)) for n, kv in sorted(decodes, key=lambda d: d[::-1])
    }
    for n in (256, 512, 1024, 2048, 4096, 8192):
        found[f"prompt {n}"] = batch(np.array([n], np.int64), (n,))
    return found


def main() -> None:
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "shared/data"
    tables = data / "profiles"
    if not tables.is_dir():
        sys.exit(f"error: {tables}: the operator tables are not here")
    cases = [
        (gpu, tables / "aiconfigurator", model, tp, dtype)
        for gpu, dtypes in (("a100", ("bf16",)), ("h100", ("bf16", "fp8")), ("h200", ("bf16", "fp8")))
        for (model, tps), dtype in itertools.product(MODELS.items(), dtypes)
        for tp in tps
    ]
    cases += [
        ("rtx-pro-6000", tables / "llmservingsim/RTXPRO6000" / model / "bf16", model, tp, "bf16")
        for model, tps in RTX_MODELS.items()
        for tp in tps
    ]
    named = steps()
    print(f"{'':46}" + "".join(f"{name:>12}" for name in named))
    groups: dict[str, list[list[float]]] = defaultdict(list)
    for card, path, name, tp, dtype in cases:
        model, gpu = load_model(name), load_gpu(card)
        try:
            measured = ProfileCost(read_profile(path, tp, model, gpu, dtype), model, gpu, dtype=dtype, tp=tp)
        except ProfileError as error:
            print(f"{card}: {name}: left out: {error}")
            continue
        modelled = RooflineCost(model, gpu, dtype=dtype, tp=tp, capture_sizes=[])
        errors = [modelled.forward(step) / measured.forward(step) - 1 for step in named.values()]
        kind = "experts" if model.experts else "dense"
        groups[f"{card}, {kind}, {dtype}"].append(errors)
        print(f"{card:13}{name.split('/')[1]:24}tp {tp} {dtype:5}" + "".join(f"{error:+12.0%}" for error in errors))
    print("\nmean of the absolute errors: of decodes, of prompts")
    decodes = sum(not step.num_prefill for step in named.values())
    for kind, rows in groups.items():
        found = np.abs(rows)
        print(f"{kind:28}{found[:, :decodes].mean():8.1%}{found[:, decodes:].mean():8.1%}")


if __name__ == "__main__":
    main()
