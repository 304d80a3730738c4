"""Every kernel compiles for GPUs that this machine need not have, within their limits and with their instructions.

The kernels of this process may belong to the interpreter, so another process compiles them; one for each architecture, and
one test for each, since tests of one module may run in several processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory a program may have."""
SPILL_LIMIT = 64
"""Bytes of stack a thread may have: a few registers kept aside around a loop, never an array."""


def compiled(arch: int) -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "benchmarks/kernel_builds.py", str(arch), "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.slow
def test_every_kernel_compiles_within_the_limits_of_the_gpu_and_uses_its_matrix_unit(arch):
    kernels = compiled(arch)
    in_full_precision = {name for name in kernels if name.startswith("fp32/")}
    assert (arch == 90) == bool(in_full_precision)
    assert [(n, k["STACK"]) for n, k in kernels.items() if k["STACK"] > SPILL_LIMIT or k["LOCAL"]] == []
    assert [(n, k["shared"]) for n, k in kernels.items() if k["shared"] > SHARED_LIMIT[arch]] == []
    kernels = {name: kernel for name, kernel in kernels.items() if name not in in_full_precision}
    assert {name.split("/")[0] for name in kernels} == {
        "decode",
        "merge",
        "prefill",
        "rms_norm",
        "add_rms_norm",
        "silu_and_mul",
        "attention_inputs",
        "route",
        "count",
        "place",
        "grouped",
        "combine",
        "sample",
        "logprobs",
        "penalize",
        "forbid",
        "fp8_linear",
    }

    # What a batch decides has no variants of its own, which would be compiled while requests wait: neither its numbers nor
    # where in a packed array something begins.
    of_a_batch = {f"i32 {name}" for name in ("batch", "rows", "tokens", "pairs", "blocks")}
    of_a_batch |= {"*i64 rows", "*i32 seq_lens", "*i64 positions"}
    assert [(n, s) for n, k in kernels.items() if (s := of_a_batch & set(k["specialised"]))] == []

    # What streams from memory is fetched ahead of its use.
    prefetch = ("decode", "merge", "prefill", "grouped", "fp8_linear", "sample", "logprobs")
    streaming = [n for n in kernels if n.split("/")[0] in prefetch]
    assert [n for n in streaming if not kernels[n]["cp.async"]] == []
    # What does not is loaded sixteen bytes at a time.
    direct = [
        n
        for n in kernels
        if n.split("/")[0] in ("rms_norm", "add_rms_norm", "attention_inputs", "silu_and_mul", "combine", "penalize")
    ]
    assert [n for n in direct if not kernels[n]["wide_loads"]] == []

    # Tall tiles go to the newest matrix unit, short ones to the one that takes sixteen rows.
    tall = {80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]
    tiles = [n for n in kernels if n.endswith(("rows8192", "rows64", "mean100", "mean1000", "uneven"))]
    assert [n for n in tiles if not kernels[n][tall]] == []
    # Converted weights go to it straight from registers.
    if arch != 80:
        eight_bits = [n for n in tiles if n.startswith("fp8_linear")]
        assert eight_bits and [n for n in eight_bits if kernels[n]["converts_through_shared"]] == []
    short = [n for n in kernels if n.startswith("decode") or n.endswith(("rows16", "mean1"))]
    assert [n for n in short if not kernels[n]["mma"]] == []
    assert tiles and short

    # Two programs share a multiprocessor: registers are 65536 (allotted in steps of 8), a program has 128 or 256 threads.
    pairs = {n: 128 if n.startswith("decode") else 256 for n in kernels if n.startswith(("decode", "sample"))}
    assert [n for n, threads in pairs.items() if -(-kernels[n]["REG"] // 8) * 8 * threads * 2 > 65_536] == []
    total = {80: 164, 90: 228, 100: 228}[arch] * 1024
    assert [n for n in pairs if 2 * (kernels[n]["shared"] + 1024) > total] == []
