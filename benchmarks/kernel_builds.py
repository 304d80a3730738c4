"""Compile every kernel for a GPU that this machine need not have: registers, stack, shared memory and instructions of each.

    python benchmarks/kernel_builds.py 90                        # all of them for compute capability 9.0, as a table
    python benchmarks/kernel_builds.py 90 --only decode,merge    # those whose names begin so
    python benchmarks/kernel_builds.py 90 --json                 # one JSON line a kernel: what tests/kernels checks

``loop``: instructions of the longest innermost loop, which is where a kernel that streams spends its time. Nothing here
runs: how fast a kernel is, no compiler says. Needs TRITON_INTERPRET to be unset.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.torch.kernels import (
    activation,
    attention_inputs,
    forbidding,
    fp8_linear,
    moe,
    norm,
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


def _dump(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory, instructions, and those of the longest innermost loop."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    at = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    back = []
    for number, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if jump is not None and at.get(int(jump[1], 16), number) < number:
            back.append((at[int(jump[1], 16)], number))
    inner = [(a, b) for a, b in back if not any((a, b) != (c, d) and a <= c and d <= b for c, d in back)]
    used = [number for number, (_, text) in enumerate(lines) if not re.search(r"\b(NOP|BRA)\b", text)]
    loop = max((b - a + 1 for a, b in inner), default=0)
    return {**found, "instructions": len(used), "loop": loop}


class Variant(NamedTuple):
    """One way to build a kernel. ``types`` names the dtypes of run-time arguments."""

    name: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3

    def build(self, arch: int) -> dict[str, Any]:
        """Compile it as a launch would. Pointers and strides are multiples of 16, but where the kernel says that it does
        not count on that."""
        signature = {p.name: "constexpr" if p.name in self.constants else self.types[p.name] for p in self.fn.params}
        special = [
            p
            for p in self.fn.params
            if (signature[p.name].startswith("*") or signature[p.name] == "i32")
            and not (p.do_not_specialize or p.do_not_specialize_on_alignment)
        ]
        aligned = {(p.num,): [["tt.divisibility", 16]] for p in special}
        kernel = triton.compile(
            ASTSource(self.fn, signature, self.constants, aligned),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": self.warps, "num_stages": self.stages},
        )
        ptx = kernel.asm["ptx"]
        return {
            "name": self.name,
            "arch": arch,
            "threads": 32 * self.warps,
            "shared": kernel.metadata.shared,
            **_dump(kernel.asm["cubin"]),
            "specialised": [f"{signature[p.name]} {p.name}" for p in special],
            "wgmma": "wgmma" in ptx,
            "cp.async": "cp.async" in ptx,
            "tcgen05": "tcgen05" in ptx,
            "mma": "mma.sync" in ptx,
            "converts_through_shared": "st.shared" in ptx,
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4", ptx)),
        }


STRIDES = ("q_token", "q_head", "k_slot", "k_head", "v_slot", "v_head", "table_row")


def attention(arch: int, dtype: str = "bf16") -> Iterator[Variant]:
    """Llama-like (128), small (64), unusual (80) and wide (256) heads; with and without a window."""
    itemsize = 4 if dtype == "fp32" else 2
    types = {n: f"*{dtype}" for n in ("q", "k_cache", "v_cache", "out")} | {n: "i32" for n in (*STRIDES, "batch")}
    types |= {"partial": "*fp32", "partial_lse": "*fp32", "page_table": "*i32", "rows": "*i64", "seq_lens": "*i32"}
    types |= {"q_starts": "*i32", "score_scale": "fp32"}
    shapes = [(128, 32, 8, 16, 0), (256, 16, 8, 16, 4096)]
    everything = arch == MAIN and dtype != "fp32"
    if everything:
        shapes += [(128, 16, 8, 1, 0), (128, 40, 8, 64, 0), (64, 14, 2, 1, 0), (80, 7, 1, 16, 512)]
    for width, heads, kv_heads, page, window in shapes:
        tag = f"{width}/{heads}:{kv_heads}/page{page}/window{window}"
        shape = {"HEADS": heads, "KV_HEADS": kv_heads, "WIDTH": width, "WINDOW": window}
        block_d = decode.next_power_of_2(width)
        # Pools of more than 2^31 elements, and several queries a request, are variants of their own.
        more = [("/large", True, 1), ("/queries4", False, 4)] if (width, page) == (128, 16) and everything else []
        for name, large, queries in [("", False, 1), *more]:
            d = decode.decode_config(arch, width, itemsize, heads // kv_heads, kv_heads, queries)
            common = decode.shape_of(heads, kv_heads, width, window, queries, 264, 256, d)
            tile = d.bundle * heads // kv_heads * queries
            rows = max(16, decode.next_power_of_2(tile))
            constants = common | {"PAGE": page, "LARGE": large, "BLOCK_H": rows, "STAGES": d.stages}
            yield Variant(f"decode/{tag}{name}", decode.decode_kernel, types, constants, d.warps)
            if (width, page) == (128, 16) and not large:
                tiles = decode.merge_tiles(tile)
                yield Variant(f"merge/{tag}{name}", decode.merge_kernel, types, common | tiles, 4)
        if width == 128 and page != 16:
            continue
        for rows in (16, 64, 8192) if width == 128 and everything else (8192,):
            p = prefill.prefill_config(arch, width, itemsize, rows)
            constants = shape | {
                "PAGE": page,
                "BLOCK_M": p.block_m,
                "BLOCK_N": p.block_n,
                "BLOCK_D": block_d,
                "STAGES": p.stages,
            }
            yield Variant(f"prefill/{tag}/rows{rows}", prefill.prefill_kernel, types, constants, p.warps)


def elementwise(arch: int, dtype: str = "bf16") -> Iterator[Variant]:
    p = f"*{dtype}"
    names = ("x", "residual", "weight", "out", "q", "k", "v", "q_weight", "k_weight", "k_cache", "v_cache")
    types = {n: p for n in names}
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
        yield Variant(f"rms_norm/{width}", norm.rms_norm_kernel, types, constants, norm.warps_for(width * rows))
    constants = {"WIDTH": 4096, "BLOCK": 4096}
    yield Variant("add_rms_norm", norm.add_rms_norm_kernel, types, constants, norm.warps_for(4096))
    yield Variant("silu_and_mul", activation.silu_and_mul_kernel, types, {"BLOCK": 2048}, 8)
    for norm_heads, heads, rotary in ((True, 16, 128), (False, 32, 128), (True, 40, 64)):
        constants = attention_inputs.blocks(heads, 8, 128, rotary) | {"NORM": norm_heads}
        name = f"attention_inputs/{heads}:8/rotary{rotary}/norm={norm_heads}"
        yield Variant(name, attention_inputs.attention_inputs_kernel, types, constants, 4)


def experts(arch: int, dtype: str = "bf16") -> Iterator[Variant]:
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
    yield Variant("route", moe.route_kernel, types, constants, 4)
    yield Variant("count", moe.count_kernel, types, {"BLOCK": 2048}, 4)
    constants = {"EXPERTS": 128, "BLOCK_E": 128, "BLOCK_M": 64, "BLOCK": 2048}
    yield Variant("place", moe.place_kernel, types, constants, 4)
    everything = arch == MAIN and dtype != "fp32"
    for mean in (1, 100, 1000) if everything else (1,) if dtype == "fp32" else (1, 1000):
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
            yield Variant(name, moe.grouped_kernel, types, constants, c.warps)
    if everything:
        yield Variant("grouped/uneven", moe.grouped_kernel, types, constants | {"EVEN": False}, c.warps)
    yield Variant("combine", moe.combine_kernel, types, {"TOP_K": 8, "BLOCK": 2048}, 8)


def eight_bits(arch: int, dtype: str = "bf16") -> Iterator[Variant]:
    """Products with FP8 weights: decodes and prompts, one scale a row and one for 128 columns."""
    types = {"x": f"*{dtype}", "weight": "*u8", "scales": "*fp32", "out": f"*{dtype}"}
    types |= {n: "i32" for n in ("rows", "columns", "depth", "x_row", "weight_row", "scale_row")}
    for rows in (64,) if dtype == "fp32" else (16, 64, 8192) if arch == MAIN else (16, 8192):
        for shared in (0, 128) if arch == MAIN else (128,):
            c = fp8_linear.fp8_config(arch, rows, 4 if dtype == "fp32" else 2, shared)
            constants = {
                "SCALE_COLUMNS": shared,
                "EVEN": True,
                "SWAP": c.swap,
                "GROUP": 8,
                "BLOCK_M": c.block_m,
                "BLOCK_N": c.block_n,
                "BLOCK_K": c.block_k,
                "STAGES": c.stages,
            }
            name = f"fp8_linear/scale{shared}/rows{rows}"
            yield Variant(name, fp8_linear.fp8_linear_kernel, types, constants, c.warps)


def choosing(arch: int) -> Iterator[Variant]:
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
    for dtype in ("bf16", "fp32"):
        types["logits"] = f"*{dtype}"
        steps, warps = sampling.blocks(152_064, None)
        variants = [(False, False), (True, False), (True, True)]
        for noise, filtered in variants if arch == MAIN and dtype == "bf16" else variants[2:]:
            name = f"sample/{dtype}/noise={noise}/filtered={filtered}"
            constants = steps | {"NOISE": noise, "FILTERED": filtered}
            yield Variant(name, sampling.sample_kernel, dict(types), constants, warps)
        yield Variant(f"logprobs/{dtype}", sampling.logprobs_kernel, dict(types), steps | {"TOP": 20}, warps)
    yield Variant("penalize", sampling.penalize_kernel, types, {"BLOCK": 4096}, 8)
    rows = {"indices": "*i64", "masks": "*i32", "logits_row": "i32", "masks_row": "i32", "vocab": "i32"}
    for dtype in ("bf16", "fp32"):
        yield Variant(f"forbid/{dtype}", forbidding.forbid_kernel, {"logits": f"*{dtype}", **rows}, {"BLOCK": 2048}, 8)


def variants(arch: int) -> Iterator[Variant]:
    """Everything that is compiled for one architecture; for the main one also the products in float32, which checks of
    greedy tokens run in: on the ordinary units, where tiles that are too large spill."""
    for group in (attention, elementwise, experts, eight_bits, choosing):
        yield from group(arch)
    for group in (attention, experts, eight_bits) if arch == MAIN else ():
        for variant in group(arch, "fp32"):
            if variant.name.startswith(("decode", "prefill", "grouped", "fp8_linear")):
                yield variant._replace(name=f"fp32/{variant.name}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel and say what came out.")
    parser.add_argument("arch", type=int, help="compute capability: 80, 90 or 100")
    parser.add_argument("--only", default="", help="beginnings of names, with commas between")
    parser.add_argument("--json", action="store_true", help="one JSON line a kernel")
    given = parser.parse_args(arguments)
    wanted = tuple(given.only.split(","))
    if not given.json:
        print(f"{'kernel':44} {'registers':>9} {'stack':>6} {'shared':>7} {'instructions':>12} {'loop':>6}")
    for variant in variants(given.arch):
        if not variant.name.startswith(wanted):
            continue
        result = variant.build(given.arch)
        if given.json:
            print(json.dumps(result), flush=True)
            continue
        numbers = (result[key] for key in ("REG", "STACK", "shared", "instructions", "loop"))
        print("{:44} {:9} {:6} {:7} {:12} {:6}".format(result["name"], *numbers), flush=True)


if __name__ == "__main__":
    main()
