"""The roofline against measured operator times of Llama-3.1-8B on an RTX PRO 6000 (LLMServingSim's tables of vLLM 0.19).

    python benchmarks/roofline_vs_tables.py

Sums the measured operators of a step and prints the roofline's difference. Nothing in the roofline was fitted to them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from backends.simulated.cost.roofline import RooflineCost
from backends.simulated.hardware import load_gpu
from backends.simulated.models import load_model
from workbench.scheduler.batch import ModelWorkerBatch

TABLES = Path(__file__).resolve().parents[2] / (
    "shared/data/profiles/llmservingsim/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16/tp1"
)
ONCE_A_LAYER = ("qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")


def nearest(table: pd.DataFrame, **wanted: int) -> float:
    """Microseconds of the row whose columns are closest to what is wanted."""
    distance = sum((table[name] / max(value, 1) - value / max(value, 1)).abs() for name, value in wanted.items())
    return float(table.loc[distance.idxmin(), "time_us"])


def measured_s(prompt: int, decodes: int, context: int) -> float:
    """Seconds of a step of one prompt of ``prompt`` tokens, or of ``decodes`` requests at ``context`` tokens."""
    dense, heads, attention = (
        pd.read_csv(TABLES / f"{name}.csv.gz") for name in ("dense", "per_sequence", "attention")
    )
    tokens, sequences = prompt + decodes, max(decodes, 1)

    def layer(name: str) -> float:
        rows = dense[dense.layer == name]
        return float(np.interp(tokens, rows.tokens, rows.time_us))

    attended = nearest(
        attention, prefill_chunk=prompt, kv_prefill=0, n_decode=decodes, kv_decode=context if decodes else 0
    )
    each = sum(layer(name) for name in ONCE_A_LAYER) + 2 * layer("layernorm") + attended
    ends = sum(nearest(heads[heads.layer == name], sequences=sequences) for name in ("lm_head", "sampler"))
    return (32 * each + layer("embedding") + layer("final_layernorm") + ends) * 1e-6


def roofline_s(cost: RooflineCost, prompt: int, decodes: int, context: int) -> float:
    lens = np.array([prompt] if prompt else [context] * decodes, np.int64)
    batch = ModelWorkerBatch(
        0, "prefill" if prompt else "decode", np.arange(len(lens)), lens, lens if prompt else None, 1 if prompt else 0,
        len(lens), prompt, decodes, int(lens.sum()), None, None, (), None, None, (), 0, 0, 0,
    )  # fmt: skip
    return cost.forward(batch)


def main() -> None:
    if not TABLES.is_dir():
        sys.exit(f"error: {TABLES}: the reference tables are not here")
    cost = RooflineCost(load_model("meta-llama/Llama-3.1-8B"), load_gpu("rtx-pro-6000"))
    print(f"{'step':28}{'measured ms':>12}{'roofline ms':>12}{'difference':>12}")
    for prompt, decodes, context in [(0, n, 1024) for n in (1, 16, 64, 128)] + [
        (n, 0, 0) for n in (256, 512, 1024, 2048)
    ]:
        name = f"prefill of {prompt}" if prompt else f"decode of {decodes} at {context}"
        measured, modelled = measured_s(prompt, decodes, context), roofline_s(cost, prompt, decodes, context)
        print(f"{name:28}{measured * 1e3:12.2f}{modelled * 1e3:12.2f}{modelled / measured - 1:+12.1%}")


if __name__ == "__main__":
    main()
