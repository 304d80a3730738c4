"""Where the achievable shares and overheads of ``gpus.toml`` come from: fitted to public operator tables, one GPU at a time.

    python benchmarks/roofline_fit.py [DATA]

For each kind of operator the two or three numbers with the least mean error (of logarithms) over a grid of candidates:
products, attention of decodes, attention of prompts, routed experts, all-reduce. The model of each is the roofline's.
Shapes are those that language models have. Whole steps are compared by ``whole_steps.py``. DATA is ../shared/data.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from backends.simulated.catalogue.gpu_specs import GPU, load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.roofline import EXPERT_TILE_ROWS, GEMM_TILE_ROWS

SETS = {"a100": "a100_sxm_sglang-0.5.10", "h100": "h100_sxm_sglang-0.5.14", "h200": "h200_sxm_sglang-0.5.14"}
SHARES = np.arange(0.2, 0.96, 0.025)
OVERHEADS_S = np.arange(1, 33) * 1e-6
GPUS_IN_A_GROUP = (2, 4, 8)
RTX_MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B")


def fit(measured_s: np.ndarray, modelled: Callable[..., np.ndarray], *candidates: Iterable[float]) -> str:
    """The candidates that come nearest, and how near."""

    def error(values: tuple[float, ...]) -> float:
        return float(np.abs(np.log(modelled(*values) / measured_s)).mean())

    best = min(itertools.product(*candidates), key=error)
    shares = [f"{value:.3g}" if value > 1e-3 else f"{value * 1e6:.0f} us" for value in best]
    return f"{', '.join(shares):32} off by {error(best):.1%} on average, {len(measured_s):,} points"


def rtx_tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """LLMServingSim's tables of two models, as products, attention of decodes and attention of prompts in the columns of
    the others."""
    dense, attention = [], []
    for name in RTX_MODELS:
        model = load_model(name)
        width = model.head_dim
        for tp in (1, 2):
            heads, kv_heads = model.heads // tp, model.kv_heads // tp
            shapes = {
                "qkv_proj": ((heads + 2 * kv_heads) * width, model.hidden),
                "o_proj": (model.hidden, heads * width),
                "gate_up_proj": (2 * model.intermediate // tp, model.hidden),
                "down_proj": (model.hidden, model.intermediate // tp),
            }
            table = pd.read_csv(folder / name / "bf16" / f"tp{tp}" / "dense.csv.gz")
            table = table[table.tokens.le(16) | table.tokens.mod(64).eq(0)].assign(dtype="bfloat16")
            for layer, (n, k) in shapes.items():
                dense.append(table[table.layer.eq(layer)].assign(n=n, k=k))
            table = pd.read_csv(folder / name / "bf16" / f"tp{tp}" / "attention.csv.gz")
            attention.append(table.assign(num_heads=heads, num_key_value_heads=kv_heads))
    gemm, both = pd.concat(dense).rename(columns={"tokens": "m"}), pd.concat(attention)
    for table in (gemm, both):
        table["latency"] = table.time_us * 1e-3
    decodes = both[both.prefill_chunk.eq(0)].rename(columns={"n_decode": "batch_size", "kv_decode": "step"})
    prompts = both[both.n_decode.eq(0) & both.kv_prefill.eq(0)].assign(batch_size=1)
    return gemm, decodes, prompts.rename(columns={"prefill_chunk": "isl"})


def products(table: pd.DataFrame, gpu: GPU, dtype: str) -> str:
    """Share of the matrix rate, share of the bandwidth, overhead."""
    of = table[
        table.dtype.eq(dtype) & table.m.le(16384) & table.n.between(1024, 20_000) & table.k.between(1024, 20_000)
    ]
    of = of.groupby(["m", "n", "k"], as_index=False).latency.min()
    width, peak = (2, gpu.bf16_flops) if dtype == "bfloat16" else (1, gpu.fp8_flops)
    work = 2 * np.ceil(of.m / GEMM_TILE_ROWS) * GEMM_TILE_ROWS * of.n * of.k / peak
    traffic = (of.n * of.k * width + 2 * of.m * (of.n + of.k)) / gpu.memory_bandwidth
    return fit(
        of.latency * 1e-3, lambda c, m, o: np.maximum(work / c, traffic / m) + o, SHARES, SHARES, OVERHEADS_S[:8]
    )


def decode_attention(table: pd.DataFrame, gpu: GPU) -> str:
    """Share of the bandwidth, overhead."""
    group = table.num_heads / table.num_key_value_heads
    of = table[
        table.step.between(255, 16383)
        & table.batch_size.between(8, 256)
        & table.num_key_value_heads.isin((2, 4, 8))
        & group.between(2, 8)
    ]
    read = of.batch_size * (of.step + 1) * of.num_key_value_heads * 128 * 4 / gpu.memory_bandwidth
    return fit(of.latency * 1e-3, lambda k, o: read / k + o, SHARES, OVERHEADS_S)


def prompt_attention(table: pd.DataFrame, gpu: GPU) -> str:
    """Share of the bf16 rate, overhead."""
    of = table[
        table.isl.ge(128)
        & (table.batch_size * table.isl).le(32768)
        & table.num_heads.ge(4)
        & table.num_key_value_heads.isin((1, 2, 4, 8))
    ]
    work = 4 * of.num_heads * 128 * of.batch_size * of.isl * (of.isl + 1) / 2 / gpu.bf16_flops
    return fit(of.latency * 1e-3, lambda a, o: work / a + o, SHARES, OVERHEADS_S)


def experts(table: pd.DataFrame, gpu: GPU, dtype: str, memory_share: float) -> str:
    """Share of the matrix rate, overhead."""
    of = table[
        table.moe_dtype.eq(dtype)
        & table.distribution.eq("power_law_1.01")
        & table.moe_ep_size.eq(1)
        & table.moe_tp_size.le(4)
        & table.topk.ge(2)
        & table.num_experts.le(256)
    ]
    keys = ["num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size"]
    of = of.groupby(keys, as_index=False).latency.min()
    width, peak = (2, gpu.bf16_flops) if dtype == "bfloat16" else (1, gpu.fp8_flops)
    drawn = of.num_tokens * of.topk
    touched = of.num_experts * (1 - (1 - of.topk / of.num_experts) ** of.num_tokens)
    weights = 3 * of.hidden_size * of.inter_size / of.moe_tp_size
    rows = touched * np.ceil(drawn / np.maximum(touched, 1) / EXPERT_TILE_ROWS) * EXPERT_TILE_ROWS
    moved = drawn * (2 * of.hidden_size + 3 * of.inter_size / of.moe_tp_size) * 2
    work, traffic = 2 * rows * weights / peak, (touched * weights * width + moved) / gpu.memory_bandwidth / memory_share
    return fit(of.latency * 1e-3, lambda e, o: np.maximum(work / e, traffic) + o, SHARES, OVERHEADS_S)


def all_reduce(table: pd.DataFrame, gpu: GPU) -> str:
    """Share of the link's bandwidth, latency."""
    of = table[
        table.backend.str.endswith("graph") & table.num_gpus.isin(GPUS_IN_A_GROUP) & table.message_size.le(2**25)
    ]
    sent = 2 * (of.num_gpus - 1) / of.num_gpus * of.message_size * 2 / gpu.link_bandwidth
    return fit(of.latency * 1e-3, lambda e, o: sent / e + o, SHARES, OVERHEADS_S[:12])


def attention_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Those of bf16, heads of 128, no sliding window; the fastest kernel of each."""
    of = table.head_dim.eq(128) & table.kv_cache_dtype.eq("bfloat16") & table.attn_dtype.eq("bfloat16")
    if "window_size" in table:
        of &= table.window_size.eq(0)
    keys = ["batch_size", "isl", "step", "num_heads", "num_key_value_heads"]
    return table[of].groupby(keys, as_index=False).latency.min()


def main() -> None:
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "shared/data"
    base = data / "profiles/aiconfigurator"
    if not base.is_dir():
        sys.exit(f"error: {base}: the operator tables are not here")
    for name, prefix in SETS.items():
        gpu = load_gpu(name)
        gemm, moe, reduce, decode, prompts = (
            pd.read_csv(base / f"{prefix}_{kind}.csv.gz")
            for kind in ("gemm", "moe", "custom_allreduce", "generation_attention", "context_attention")
        )
        gemm = gemm.rename(columns={"gemm_dtype": "dtype"})
        print(f"{name}: {prefix}")
        for dtype in gemm.dtype.unique():
            print(f"  products, {dtype:21} {products(gemm, gpu, dtype)}")
        print(f"  attention of decodes            {decode_attention(attention_rows(decode), gpu)}")
        print(f"  attention of prompts            {prompt_attention(attention_rows(prompts), gpu)}")
        for dtype in ("bfloat16", "fp8_block"):
            if moe.moe_dtype.eq(dtype).any():
                print(f"  experts, {dtype:22} {experts(moe, gpu, dtype, gpu.memory_efficiency)}")
        print(f"  all-reduce                      {all_reduce(reduce, gpu)}")
    gpu = load_gpu("rtx-pro-6000")
    gemm, decode, prompts = rtx_tables(data / "profiles/llmservingsim/RTXPRO6000")
    print(f"rtx-pro-6000: vLLM 0.19, {', '.join(RTX_MODELS)}")
    print(f"  products, bfloat16              {products(gemm, gpu, 'bfloat16')}")
    print(f"  attention of decodes            {decode_attention(decode, gpu)}")
    print(f"  attention of prompts            {prompt_attention(prompts, gpu)}")


if __name__ == "__main__":
    main()
