"""The kinds of operators that are fitted: the rows of each in the tables, and the form of its time in the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.cost.models.expert_loads import distinct_experts
from backends.simulated.cost.models.roofline import OVERLAP
from backends.simulated.cost.tables.measured_operators import MEASURED_SKEW
from backends.simulated.cost.tables.operator_rows import LOADS
from benchmarks.board.operator_fit import Fit, Model, fit
from benchmarks.board.table_rows import ENGINES, Measured, Tables, engine_rows

CACHE_BYTES = {
    "a100": 40e6,
    "h100": 50e6,
    "h200": 50e6,
    "b200": 126e6,
    "b300": 126e6,
    "gb200": 126e6,
    "gb300": 126e6,
    "l40s": 96e6,
    "rtx-pro-6000": 128e6,
}
"""Second-level cache, as the vendor's whitepapers and tuning guides have it."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
"""Tokens of the products that are fitted: some tables have one more than many of these, too, which would count twice."""
FROM_HOST_S = 30e-6
"""A table whose shortest product takes longer was measured with launches from the host, and says nothing of the kernel."""


@dataclass(frozen=True)
class Form:
    """How the weights of products are held and multiplied."""

    words: str
    prefix: str
    """Of the fields of a GPU."""
    computes: str
    bytes: float
    """Of a weight."""


BF16 = Form("16 bits", "", "bf16", 2)
FP8 = Form("8 bits", "fp8_", "fp8", 1)
INT8 = Form("8 bits", "fp8_", "int8", 1)
BLOCKS = Form("8 bits by block", "block_", "fp8", 1)
FP4 = Form("fp4", "fp4_", "fp4", 0.5625)
W4 = Form("16 bits, weights in 4", "w4_", "bf16", 0.53125)


def products(tables: Tables, gpu: GPU, form: Form, dtype: str, engines: Sequence[str] = ENGINES) -> Fit | None:
    """Matrix products in a form of weights."""
    rows = tables.rows(
        "gemm",
        lambda t: t.gemm_dtype.eq(dtype) & t.m.isin(COUNTS) & t.n.between(1024, 70_000) & t.k.between(1024, 17_000),
        ["m", "n", "k"],
        engines,
    )
    if rows is None:
        return None
    slow = [name for name, of in engine_rows(rows.rows) if rows.rows[of].seconds.min() > FROM_HOST_S]
    rows = rows.part((~rows.rows.engine.isin(slow) & (rows.rows.n * rows.rows.k).ge(2**21)).to_numpy())
    if rows.rows.empty:
        return None
    peak, size = gpu.flops_for(form.computes), form.bytes

    def model(at: Measured) -> Model:
        work = 2 * at.m * at.n * at.k / peak
        traffic = (at.n * at.k * size + 2 * at.m * (at.n + at.k)) / gpu.memory_bandwidth
        return lambda c, b, o, d: ((work / c) ** OVERLAP + (traffic / b) ** OVERLAP) ** (1 / OVERLAP) + o + at.k * d

    prefix = form.prefix
    first = ("efficiency", "memory_efficiency", "overhead_s", "depth_s")
    plain = ("compute_efficiency", "memory_efficiency", "product_overhead_s", "product_depth_s")
    fields = [prefix + name for name in first] if prefix else list(plain)
    return fit(f"products in {form.words}", rows, fields, gpu, model)


def experts(tables: Tables, gpu: GPU, form: Form, dtype: str) -> Fit | None:
    """Routed experts in a form of weights, at the mildest uneven load measured."""
    rows = tables.rows(
        "moe",
        lambda t: (
            t.moe_dtype.eq(dtype)
            & t.distribution.eq(LOADS[MEASURED_SKEW])
            & t.moe_ep_size.eq(1)
            & t.topk.between(2, 10)
            & t.num_experts.le(512)
            & (t.inter_size / t.moe_tp_size).ge(128)
        ),
        ["num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size"],
    )
    if rows is None:
        return None
    peak, size = gpu.flops_for(form.computes), form.bytes

    def model(at: Measured) -> Model:
        inner = at.inter_size / at.moe_tp_size
        drawn = zip(at.num_experts, at.topk, at.num_tokens, strict=True)
        touched = np.array([distinct_experts(*map(int, each), MEASURED_SKEW) for each in drawn], float)
        draws, parameters = at.num_tokens * at.topk, 3 * at.hidden_size * inner
        work, weights = 2 * draws * parameters / peak, touched * parameters * size / gpu.memory_bandwidth
        moved = draws * (2 * at.hidden_size + 3 * inner) * 2 / gpu.memory_bandwidth
        depth = at.hidden_size + inner
        return lambda c, b, a, o, d, e: work / c + weights / b + moved / a + o + depth * d + touched * e

    names = ("efficiency", "memory_efficiency", "activation_efficiency", "overhead_s", "depth_s", "each_overhead_s")
    fields = [f"{form.prefix}expert_{name}" for name in names]
    return fit(f"experts in {form.words}", rows, fields, gpu, model)


def decodes(tables: Tables, gpu: GPU, grouped: bool, kv: str) -> Fit | None:
    """Attention of decodes. Those of a KV head for each head, or of 8 bits, have a share of their own only."""
    rows = tables.rows(
        "generation_attention",
        lambda t: (
            _attention(t, grouped, kv) & t.step.between(127, 20_000) & t.batch_size.le(512) & t.head_dim.isin((64, 128))
        ),
        ["batch_size", "step", "num_heads", "num_key_value_heads", "head_dim"],
    )
    if rows is None:
        return None
    size = 2 if kv == "bfloat16" else 1
    # What stays in the cache from one run to the next would not in an engine, whose other layers come between.
    read = rows.batch_size * (rows.step + 1) * rows.num_key_value_heads * 2 * rows.head_dim * size
    cache = CACHE_BYTES[gpu.name]
    rows = rows.part((read < cache / 8) | (read > cache))

    def model(at: Measured) -> Model:
        seen = at.batch_size * (at.step + 1) * at.num_key_value_heads * 2 * at.head_dim * size / gpu.memory_bandwidth
        out = at.batch_size * at.num_heads * 2 * at.head_dim * 2 / gpu.memory_bandwidth
        blocks = at.batch_size * at.num_key_value_heads
        fixed = gpu.attention_overhead_s if size == 2 else gpu.kv8_overhead_s
        return lambda k, o=fixed, u=gpu.attention_head_overhead_s: (seen + out) / k + o + blocks * u

    share = {(True, 2): "kv", (True, 1): "kv8", (False, 2): "mha", (False, 1): "mha8"}[grouped, size] + "_efficiency"
    overheads = {
        "kv_efficiency": ["attention_overhead_s", "attention_head_overhead_s"],
        "kv8_efficiency": ["kv8_overhead_s"],
    }.get(share, [])
    return fit(f"decodes, {_kind(grouped)}, KV in {8 * size} bits", rows, [share, *overheads], gpu, model)


def prompts(tables: Tables, gpu: GPU, grouped: bool) -> Fit | None:
    """Attention of prompts that nothing comes before."""
    rows = tables.rows(
        "context_attention",
        lambda t: (
            _attention(t, grouped, "bfloat16")
            & t.attn_dtype.eq("bfloat16")
            & t.isl.ge(64)
            & (t.batch_size * t.isl).le(32_768)
            & t.num_heads.ge(4)
            & t.head_dim.isin((64, 128))
        ),
        ["batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim"],
    )
    if rows is None:
        return None

    def model(at: Measured) -> Model:
        work = 4 * at.num_heads * at.head_dim * at.batch_size * at.isl * (at.isl + 1) / 2 / gpu.bf16_flops
        heads = at.num_heads + at.num_key_value_heads
        moved = at.batch_size * at.isl * heads * 2 * at.head_dim * 2 / gpu.memory_bandwidth
        return lambda a, m, o=gpu.prompt_overhead_s: work / a + moved / m + o

    fields = ["attention_efficiency", "prompt_memory_efficiency", "prompt_overhead_s"]
    if not grouped:
        fields = ["mha_attention_efficiency", "mha_prompt_memory_efficiency"]
    return fit(f"prompts, {_kind(grouped)}", rows, fields, gpu, model)


def _attention(table: pd.DataFrame, grouped: bool, kv: str) -> pd.Series:
    """Rows of attention that sees every token."""
    group = table.num_heads / table.num_key_value_heads
    whole = table.window_size.eq(0) & table.kv_cache_dtype.eq(kv)
    heads = group.gt(1.5) & table.num_key_value_heads.le(16) if grouped else group.eq(1) & table.num_heads.ge(8)
    return whole & heads


def _kind(grouped: bool) -> str:
    return "grouped queries" if grouped else "a KV head a head"


def latent_decodes(tables: Tables, gpu: GPU) -> Fit | None:
    """Latent attention of decodes, as DeepSeek-V3 has it."""
    rows = tables.rows(
        "generation_mla",
        lambda t: (
            t.kv_cache_dtype.eq("bfloat16") & t.step.between(127, 20_000) & t.batch_size.le(512) & t.num_heads.ge(8)
        ),
        ["batch_size", "step", "num_heads"],
        (*ENGINES, "trtllm"),
    )
    if rows is None:
        return None

    def model(at: Measured) -> Model:
        tokens, peak = at.batch_size * (at.step + 1), gpu.bf16_flops
        read, work = tokens * 576 * 2 / gpu.memory_bandwidth, 2 * tokens * at.num_heads * (576 + 512) / peak
        out = at.batch_size * at.num_heads * (576 + 512) * 2 / gpu.memory_bandwidth
        blocks = at.batch_size * gpu.attention_head_overhead_s
        return lambda k, c, o: np.maximum(read / k, work / c) + out / k + o + blocks

    fields = ["latent_efficiency", "latent_flops_efficiency", "latent_overhead_s"]
    return fit("decodes, latent", rows, fields, gpu, model)


def latent_prompts(tables: Tables, gpu: GPU) -> Fit | None:
    """Latent attention of prompts with heads of their own: the tables of TensorRT-LLM, as SGLang's are of absorbed ones on
    some GPUs."""
    rows = tables.rows(
        "context_mla",
        lambda t: (
            t.kv_cache_dtype.eq("bfloat16") & t.isl.ge(64) & (t.batch_size * t.isl).le(32_768) & t.num_heads.ge(8)
        ),
        ["batch_size", "isl", "num_heads"],
        ("trtllm",),
    )
    if rows is None:
        return None

    def model(at: Measured) -> Model:
        work = 2 * at.num_heads * (192 + 128) * at.batch_size * at.isl * (at.isl + 1) / 2 / gpu.bf16_flops
        moved = at.batch_size * at.isl * 2 * at.num_heads * (192 + 128) * 2 / gpu.memory_bandwidth
        return lambda a, m: work / a + moved / m + gpu.prompt_overhead_s

    return fit("prompts, latent", rows, ["latent_attention_efficiency", "latent_prompt_memory_efficiency"], gpu, model)
