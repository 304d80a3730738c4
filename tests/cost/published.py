"""A package of operator tables in the published form, for tests, whose times a reader can work out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from backends.simulated.cost.tables.table_kinds import KINDS

WIDTHS, DEPTHS, TOKENS = (512, 1024, 4096, 6144, 65536), (512, 1024, 2048, 3072), (1, 64, 256, 2048)
LENGTHS, DECODES, STEPS = (16, 512, 2048, 4096), (1, 64, 256), (15, 1023, 4095)
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
"""Of Qwen3-0.6B, whose shapes lie on the axes above."""


def product_ms(m: float, n: float, k: float) -> float:
    """Milliseconds; a power of each side, so that logarithms are straight lines."""
    return 1e-9 * n * k * (1 + m / 100)


def prompt_ms(length: float) -> float:
    return 1e-3 + 1e-7 * length * (length + 1) / 2


def decode_ms(requests: float, context: float) -> float:
    return 2e-3 + 1e-6 * requests * context


def reduce_ms(elements: float) -> float:
    return 4e-3 + 1e-8 * elements


def experts_ms(tokens: float) -> float:
    return 50e-3 + 1e-3 * tokens


def delta_ms(tokens: float) -> float:
    return 3e-3 + 1e-5 * tokens


def absorbed_ms(tokens: float) -> float:
    return 1e-3 + 1e-5 * tokens


def gather_ms(elements: float) -> float:
    return 6e-3 + 2e-8 * elements


def rows_of(kind: str, **fixed: Any) -> list[dict[str, Any]]:
    """Rows of a table; ``fixed`` takes the place of columns that all rows share."""
    shape = {"num_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "window_size": 0}
    kv = {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    experts = {
        "hidden_size": 2048,
        "inter_size": 768,
        "topk": 8,
        "num_experts": 128,
        "moe_tp_size": 1,
        "moe_ep_size": 1,
    }
    module = {
        "model": "deepseek-ai/DeepSeek-V3.2",
        "kv_cache_dtype": "bfloat16",
        "gemm_type": "bfloat16",
        "num_heads": 128,
    }
    found: Iterable[dict[str, Any]] = {
        "gemm": (
            {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": product_ms(m, n, k)}
            for m in TOKENS
            for n in WIDTHS
            for k in DEPTHS
        ),
        "context_attention": (
            {"batch_size": 1, "isl": n, **shape, **kv, "step": 0, "latency": prompt_ms(n)} for n in LENGTHS
        ),
        "generation_attention": (
            {"batch_size": b, "isl": 1, "step": s, **shape, **kv, "latency": decode_ms(b, s + 1)}
            for b in DECODES
            for s in STEPS
        ),
        "context_mla": (
            {"mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": 16, "batch_size": b, "isl": n}
            | {"latency": b * prompt_ms(n)}
            for b in (1, 4)
            for n in LENGTHS
        ),
        "generation_mla": (
            {"mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": 16, "batch_size": b, "step": s}
            | {"latency": decode_ms(b, s + 1)}
            for b in DECODES
            for s in STEPS
        ),
        "mla_bmm": (
            {"op_name": f"mla_gen_{side}", "bmm_dtype": "bfloat16", "num_tokens": n, "num_heads": 16}
            | {"latency": absorbed_ms(n)}
            for side in ("pre", "post")
            for n in TOKENS
        ),
        "dsa_context_module": (
            {**module, "op_name": "dsa_context_module", "batch_size": 1, "isl": n, "step": before}
            | {"latency": 1.0 + prompt_ms(n) + 1e-5 * before}
            for n in LENGTHS
            for before in (0, 1024, 4096)
        ),
        "dsa_generation_module": (
            {**module, "op_name": "dsa_generation_module", "batch_size": b, "step": s + 1}
            | {"latency": 1.0 + decode_ms(b, s + 1)}
            for b in DECODES
            for s in STEPS
        ),
        "mla_context_module": (
            {**module, "model": "deepseek-ai/DeepSeek-V3", "op_name": "mla_context_module", "batch_size": 1, "isl": n}
            | {"step": 0, "latency": 1.0 + prompt_ms(n) + 1e-3 * n}
            for n in (1, *LENGTHS)
        ),
        "mla_generation_module": (
            {**module, "model": "deepseek-ai/DeepSeek-V3", "op_name": "mla_generation_module", "batch_size": b}
            | {"step": s + 1, "latency": 1.0 + decode_ms(b, s + 1)}
            for b in DECODES
            for s in STEPS
        ),
        "gdn": (
            {
                "phase": phase,
                "kernel_source": kernel,
                "batch_size": b,
                "seq_len": n,
                "d_model": 2048,
                "d_conv": 4,
                "num_k_heads": 16,
                "head_k_dim": 128,
                "num_v_heads": 32,
                "head_v_dim": 128,
                "latency": delta_ms(b * n) * share,
            }
            for kernel, share in (("causal_conv1d", 0.25), ("delta_rule", 0.75))
            for b in DECODES
            for phase, lengths in (("context", LENGTHS), ("generation", (1,)))
            for n in lengths
        ),
        "nccl": (
            {"nccl_dtype": "half", "op_name": name, "num_gpus": 2, "message_size": size, "latency": gather_ms(size)}
            for name in ("all_gather", "reduce_scatter")
            for size in (1024, 2**20, 2**28)
        ),
        "custom_allreduce": (
            {
                "num_gpus": 2,
                "message_size": size,
                "kernel_source": f"vLLM_custom_{how}",
                "latency": reduce_ms(size) * factor,
            }
            for size in (128, 2**20, 2**28)
            for how, factor in (("graph", 1), ("eager", 5))
        ),
        "moe": (
            {
                **experts,
                "moe_dtype": "bfloat16",
                "distribution": how,
                "num_tokens": n,
                "latency": experts_ms(n) * factor,
            }
            for n in (1, 64, 2048)
            for how, factor in (("power_law_1.01", 1), ("balanced", 0.5))
        ),
    }[kind]
    return [{**row, **fixed} for row in found]


def write_table(
    root: Path, kind: str, version: str = "0.24.0", system: str = "h100_sxm", engine: str = "vllm", **fixed: Any
) -> Path:
    """Write a table into the package under ``root`` and return its file."""
    package = root / "aiconfigurator_core"
    file = (
        package
        / "systems/data"
        / system
        / KINDS[kind].family
        / (KINDS[kind].source or engine)
        / version
        / f"{kind}_perf.parquet"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    parquet.write_table(pyarrow.Table.from_pylist(rows_of(kind, **fixed)), file)
    return file


def write_package(root: Path) -> Path:
    """Write every kind of table for one GPU and engine and return ``root``, which is to be on the path of imports."""
    for kind in ("gemm", "context_attention", "generation_attention", "moe", "custom_allreduce"):
        write_table(root, kind)
    return root
