"""Compile every kernel for GPUs this machine need not have, and print what came out as one JSON line a kernel.

Run as ``python -m tests.kernels.compile_kernels 90`` in a process where TRITON_INTERPRET is unset.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from backends.torch.kernels import (
    activation,
    fp8_linear,
    kv_store,
    moe,
    norm,
    rope,
    sampling,
)
from backends.torch.kernels import (
    decode_attention as decode,
)
from backends.torch.kernels import (
    prefill_attention as prefill,
)

MAIN = 90
"""The architecture whose every variant is compiled; of the others, the outermost ones."""


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack and local memory, as cuobjdump states them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def build(
    name: str, fn: Any, arch: int, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int = 3
) -> dict[str, Any]:
    """Compile ``fn``. ``types`` names the dtypes of run-time arguments; pointers and strides are multiples of 16."""
    signature = {a: "constexpr" if a in constants else types[a] for a in fn.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(fn.arg_names)
        if signature[a].startswith("*") or (signature[a] == "i32" and a not in ("batch", "rows", "heads"))
    }
    source = ASTSource(fn, signature, constants, aligned)
    kernel = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    ptx = kernel.asm["ptx"]
    return {
        "name": name,
        "arch": arch,
        "shared": kernel.metadata.shared,
        **_resources(kernel.asm["cubin"]),
        "wgmma": "wgmma" in ptx,
        "cp.async": "cp.async" in ptx,
        "tcgen05": "tcgen05" in ptx,
        "mma": "mma.sync" in ptx,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4", ptx)),
        "div": "div.full" in ptx or "div.rn" in ptx,
    }


STRIDES = ("q_token", "q_head", "k_slot", "k_head", "v_slot", "v_head", "table_row")


def attention(arch: int, dtype: str = "bf16") -> Iterator[dict[str, Any]]:
    """Llama-like (128), small (64), unusual (80) and wide (256) heads; with and without a window."""
    itemsize = 4 if dtype == "fp32" else 2
    types = {n: f"*{dtype}" for n in ("q", "k_cache", "v_cache", "out")} | {n: "i32" for n in (*STRIDES, "batch")}
    types |= {"partial": "*fp32", "partial_lse": "*fp32", "page_table": "*i32", "rows": "*i64", "seq_lens": "*i32"}
    types |= {"q_starts": "*i32", "score_scale": "fp32"}
    shapes = [(128, 32, 8, 16, 0), (256, 16, 8, 16, 4096)]
    if arch == MAIN:
        shapes += [(64, 14, 2, 1, 0), (80, 7, 1, 16, 512)]
    for width, heads, kv_heads, page, window in shapes:
        tag = f"{width}/{heads}:{kv_heads}/page{page}/window{window}/{dtype}"
        shape = {"HEADS": heads, "KV_HEADS": kv_heads, "WIDTH": width, "WINDOW": window}
        block_d = decode.next_power_of_2(width)
        d = decode.decode_config(arch, width, itemsize)
        common = shape | {"PROGRAMS": 264, "LEAST": 2, "BATCH": 256, "BLOCK_N": d.block_n, "BLOCK_D": block_d}
        constants = common | {"PAGE": page, "BLOCK_H": 16, "STAGES": d.stages}
        yield build(f"decode/{tag}", decode.decode_kernel, arch, types, constants, d.warps)
        if width == 128:
            yield build(f"merge/{tag}", decode.merge_kernel, arch, types, common | {"PIECES": 16}, 4)
        for rows in (16, 64, 8192) if width == 128 and arch == MAIN else (8192,):
            p = prefill.prefill_config(arch, width, itemsize, rows)
            constants = shape | {
                "PAGE": page,
                "BLOCK_M": p.block_m,
                "BLOCK_N": p.block_n,
                "BLOCK_D": block_d,
                "STAGES": p.stages,
            }
            yield build(f"prefill/{tag}/rows{rows}", prefill.prefill_kernel, arch, types, constants, p.warps)


def elementwise(arch: int, dtype: str = "bf16") -> Iterator[dict[str, Any]]:
    p = f"*{dtype}"
    types = {n: p for n in ("x", "residual", "weight", "out", "q", "k", "v", "k_cache", "v_cache")}
    types |= {
        n: "i32"
        for n in (
            "inner",
            "x_outer",
            "x_inner",
            "x_stride",
            "residual_stride",
            "row_stride",
            "width",
            "q_token",
            "q_head",
            "k_token",
            "k_head",
            "v_token",
            "v_head",
            "cache_slot",
            "cache_head",
            "rows",
            "q_heads",
            "k_heads",
        )
    }
    types |= {"eps": "fp32", "positions": "*i64", "slots": "*i64", "cos_sin": "*fp32"}
    for width, rows in ((128, 16), (4096, 1)):
        constants = {"WIDTH": width, "BLOCK": width, "ROWS": rows}
        yield build(f"rms_norm/{width}", norm.rms_norm_kernel, arch, types, constants, norm.warps_for(width * rows))
    constants = {"WIDTH": 4096, "BLOCK": 4096}
    yield build("add_rms_norm", norm.add_rms_norm_kernel, arch, types, constants, norm.warps_for(4096))
    yield build("rope", rope.rope_kernel, arch, types, {"HALF": 64, "BLOCK": 64, "Q_HEADS": 32, "K_HEADS": 8}, 8)
    yield build("silu_and_mul", activation.silu_and_mul_kernel, arch, types, {"BLOCK": 2048}, 8)
    constants = {"HEADS": 8, "WIDTH": 128, "BLOCK": 1024}
    yield build("store_kv", kv_store.store_kv_kernel, arch, types, constants, 4)


def experts(arch: int, dtype: str = "bf16") -> Iterator[dict[str, Any]]:
    types = {n: f"*{dtype}" for n in ("x", "weight", "out", "logits", "results")}
    types |= {
        n: "i32"
        for n in (
            "row_stride",
            "tokens",
            "pairs",
            "blocks",
            "columns",
            "depth",
            "x_row",
            "weight_expert",
            "weight_row",
            "width",
        )
    }
    types |= {n: "*i32" for n in ("experts", "counts", "order", "block_expert", "used")}
    types |= {"weights": "*fp32"}
    constants = {"EXPERTS": 128, "TOP_K": 8, "RENORMALIZE": True, "BLOCK_E": 128, "BLOCK_K": 8, "ROWS": 8}
    yield build("route", moe.route_kernel, arch, types, constants, 4)
    yield build("count", moe.count_kernel, arch, types, {"BLOCK": 2048}, 4)
    constants = {"EXPERTS": 128, "BLOCK_E": 128, "BLOCK_M": 64, "BLOCK": 2048}
    yield build("place", moe.place_kernel, arch, types, constants, 4)
    for mean in (1, 100, 1000) if arch == MAIN else (1, 1000):
        for gated in (True, False) if arch == MAIN else (mean == 1,):
            c = moe.moe_config(arch, 4 if dtype == "fp32" else 2, 128 * mean, 128, gated)
            constants = {
                "PER_TOKEN": 8 if gated else 1,
                "GATED": gated,
                "EVEN": True,
                "GROUP": c.group,
                "BLOCK_M": c.block_m,
                "BLOCK_N": c.block_n,
                "BLOCK_K": c.block_k,
                "STAGES": c.stages,
            }
            name = f"grouped/{'gated' if gated else 'plain'}/mean{mean}"
            yield build(name, moe.grouped_kernel, arch, types, constants, c.warps)
    if arch == MAIN:
        yield build("grouped/uneven", moe.grouped_kernel, arch, types, constants | {"EVEN": False}, c.warps)
    yield build("combine", moe.combine_kernel, arch, types, {"TOP_K": 8, "BLOCK": 2048}, 8)


def eight_bits(arch: int, dtype: str = "bf16") -> Iterator[dict[str, Any]]:
    """Products with FP8 weights: decodes and prompts, one scale a row and one for 128 columns."""
    types = {"x": f"*{dtype}", "weight": "*u8", "scales": "*fp32", "out": f"*{dtype}"}
    types |= {n: "i32" for n in ("rows", "columns", "depth", "x_row", "weight_row", "scale_row")}
    for rows in (16, 64, 8192) if arch == MAIN else (16, 8192):
        for shared in (0, 128) if arch == MAIN else (128,):
            c = fp8_linear.fp8_config(arch, rows, 2, shared)
            constants = {
                "SCALE_COLUMNS": shared,
                "EVEN": True,
                "GROUP": 8,
                "BLOCK_M": c.block_m,
                "BLOCK_N": c.block_n,
                "BLOCK_K": c.block_k,
                "STAGES": c.stages,
            }
            name = f"fp8_linear/scale{shared}/rows{rows}"
            yield build(name, fp8_linear.fp8_linear_kernel, arch, types, constants, c.warps)


def choosing(arch: int) -> Iterator[dict[str, Any]]:
    types = {
        n: "*fp32"
        for n in (
            "logits",
            "maxima",
            "temperature",
            "top_p",
            "min_p",
            "chosen",
            "values",
            "repetition",
            "presence",
            "frequency",
        )
    }
    types |= {n: "*i64" for n in ("tokens", "seeds", "positions", "ids")}
    types |= {"selected": "*i32", "top_k": "*i32", "output_counts": "*i32", "in_prompt": "*u8"}
    types |= {
        n: "i32"
        for n in (
            "row_stride",
            "group_stride",
            "vocab",
            "count_stride",
            "prompt_stride",
            "repetition_stride",
            "presence_stride",
            "frequency_stride",
        )
    }
    wide, small, warps = sampling._blocks(152_064, None)
    steps = {"BLOCK": wide, "SMALL": small, "GROUP": sampling.GROUP, "STAGES": sampling.STAGES}
    variants = [(False, False), (True, False), (True, True)]
    for noise, filtered in variants if arch == MAIN else variants[2:]:
        name = f"sample/noise={noise}/filtered={filtered}"
        yield build(name, sampling.sample_kernel, arch, types, steps | {"NOISE": noise, "FILTERED": filtered}, warps)
    yield build("logprobs", sampling.logprobs_kernel, arch, types, steps | {"TOP": 20}, warps)
    yield build("penalize", sampling.penalize_kernel, arch, types, {"BLOCK": 4096}, 8)


def main(arch: int) -> None:
    for group in (attention, elementwise, experts, eight_bits, choosing):
        for result in group(arch):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
