"""Fit the achievable shares and overheads of ``efficiencies.toml`` to published operator tables, one GPU at a time.

    python benchmarks/roofline_fit.py [GPU...] [--write]

For each kind of operator, the few numbers with the least mean error (of logarithms) in the roofline's form: matrix
products by precision, attention of decodes and of prompts (grouped, with a KV head for each head, latent), routed experts
by precision, and collectives. They are fitted to one half of the tables' shapes, and the errors that are printed are
those on the other (``board/halves.py``). The tables are those that the package ``aiconfigurator-core`` carries (the extra
``profiles``), the newest version of SGLang and of vLLM, which count the same; of TensorRT-LLM where these two have none.
``--write`` writes the file and the table of docs/cost-model.md anew, for all GPUs. Whole steps are compared by
``whole_steps.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.simulated.catalogue.gpu_specs import EFFICIENCIES, GPU, load_gpu
from backends.simulated.cost.cost_request import CostError
from backends.simulated.cost.tables.published_package import find_tables
from benchmarks.board.collective_kinds import far, ring, shots
from benchmarks.board.operator_fit import Fit
from benchmarks.board.operator_kinds import (
    BF16,
    BLOCKS,
    CACHE_BYTES,
    FP4,
    FP8,
    INT8,
    W4,
    decodes,
    experts,
    latent_decodes,
    latent_prompts,
    products,
    prompts,
)
from benchmarks.board.pages import between_markers
from benchmarks.board.table_rows import ENGINES, Tables

GPUS = tuple(CACHE_BYTES)
"""GPUs that are fitted."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "cost-model.md"
LEAST_SHARE = 0.5
"""Experts in 8 bits that reach less of the bandwidth take longer than in 16: such rows are not what engines reach."""
OWN_GAIN = 0.05
"""An engine has numbers of its own for a kind of operator where these take more than this off the mean error (of logarithms)
on what is fitted, from that of the numbers of all."""
Way = Callable[[GPU], "Fit | None"]


@dataclass(frozen=True)
class GPUFits:
    """The numbers of one GPU."""

    together: list[Fit]
    """To all engines."""
    own: dict[str, list[Fit]]
    """To one alone, of the kinds in which it differs."""

    def error(self, what: str) -> str:
        """Mean error of a kind of operator by the numbers that an engine has; "*" where these are one's own."""
        shared = next((each for each in self.together if each.what == what), None)
        if shared is None:
            return ""
        own = {engine: each.error for engine, of in self.own.items() for each in of if each.what == what}
        errors = {engine: absolute for engine, (absolute, _) in shared.by_engine.items()} | own
        return f"{np.mean(list(errors.values())):.0%}{'*' if own else ''}"


def fit_gpu(name: str) -> GPUFits:
    """All kinds of operators that a GPU has tables of; the later ones rest on the numbers of the earlier. Raises CostError
    where there are none."""
    ends = ("_efficiency", "_s", "_most_bytes")
    defaults = {field.name: field.default for field in fields(GPU) if field.name.endswith(ends)}
    gpu = replace(load_gpu(name), **{k: v for k, v in defaults.items() if not k.startswith("link")})
    system = find_tables(gpu, ENGINES[0]).system
    together = []
    for found in _kinds(Tables(system), gpu):
        together.append(found)
        gpu = replace(gpu, **found.values)
    own = {}
    for engine in ENGINES:
        kinds = _kinds(Tables(system, engine), gpu)
        own[engine] = _own(list(kinds))
    return GPUFits(together, own)


def _own(found: list[Fit]) -> list[Fit]:
    """What an engine has of its own: kinds of operators to which that is much nearer. Experts by tensor take the place of
    those by block, which then have fields of their own."""
    by_tensor = any(
        each.what == f"experts in {FP8.words}"
        and each.gained > OWN_GAIN
        and each.values["fp8_expert_memory_efficiency"] > LEAST_SHARE
        for each in found
    )
    kept = []
    for each in found:
        name = next(iter(each.values))
        if name.startswith("block_expert_") or each.what == f"experts in {FP8.words}":
            kept += [each] if by_tensor else []
        elif each.gained > OWN_GAIN and not (by_tensor and name.startswith("fp8_expert_")):
            kept.append(each)
    return kept


def _kinds(tables: Tables, gpu: GPU) -> Iterator[Fit]:
    """What is fitted, one kind of operator after the other, beginning with the numbers of a GPU."""
    ways: list[Way] = [
        lambda g: products(tables, g, BF16, "bfloat16"),
        lambda g: products(tables, g, FP8, "fp8") if g.fp8_flops else products(tables, g, INT8, "sq", ("trtllm",)),
        lambda g: products(tables, _with_blocks(g, "block_"), BLOCKS, "fp8_block") if g.fp8_flops else None,
        lambda g: products(tables, g, FP4, "nvfp4") if g.fp4_flops else None,
        lambda g: experts(tables, g, BF16, "bfloat16"),
        lambda g: experts(tables, g, replace(BLOCKS, prefix=FP8.prefix), "fp8_block") if g.fp8_flops else None,
        lambda g: experts(tables, g, FP4, "nvfp4") if g.fp4_flops else None,
        lambda g: experts(tables, g, W4, "w4a16_mxfp4"),
        lambda g: decodes(tables, g, True, "bfloat16"),
        lambda g: decodes(tables, g, True, "fp8"),
        lambda g: decodes(tables, g, False, "bfloat16"),
        lambda g: decodes(tables, g, False, "fp8"),
        lambda g: prompts(tables, g, True),
        lambda g: prompts(tables, g, False),
        lambda g: latent_decodes(tables, g),
        lambda g: latent_prompts(tables, g),
        lambda g: ring(tables, g),
        lambda g: shots(tables, g),
        lambda g: far(tables, g),
    ]
    if tables.engine is not None and gpu.fp8_flops:
        # Not every engine was measured with experts by tensor: one that was has both.
        ways += [
            lambda g: experts(tables, _with_blocks(g, "block_expert_"), BLOCKS, "fp8_block"),
            lambda g: experts(tables, g, FP8, "fp8"),
        ]
    for way in ways:
        found = way(gpu)
        if found is not None:
            gpu = replace(gpu, **found.values)
            yield found


def _with_blocks(gpu: GPU, prefix: str) -> GPU:
    """The GPU with numbers of products by block: those of any in 8 bits."""
    names = [field.name for field in fields(GPU) if field.name.startswith(prefix)]
    return replace(gpu, **{name: getattr(gpu, name.replace("block_", "fp8_")) for name in names})


def written(fits: dict[str, GPUFits]) -> str:
    """The text of ``efficiencies.toml``."""
    lines = [
        "# What operators achieve of a GPU's peaks. Written by benchmarks/roofline_fit.py; the fields: gpu_specs.py."
    ]
    for name, found in fits.items():
        for under, some in ("", found.together), *((f".engines.{engine}", own) for engine, own in found.own.items()):
            if some:
                lines += ["", f"[{name}{under}]"]
                lines += [f"{field} = {value!r}" for each in some for field, value in each.values.items()]
    return "\n".join(lines) + "\n"


def table(fits: dict[str, GPUFits]) -> str:
    """Errors of kinds of operators by GPU, for a page."""
    kinds = sorted({each.what for found in fits.values() for each in found.together})
    rows = [f"| {kind} | {' | '.join(found.error(kind) for found in fits.values())} |" for kind in kinds]
    return "\n".join([f"| | {' | '.join(fits)} |", "|---" * (len(fits) + 1) + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="*", metavar="GPU", help=f"of {', '.join(GPUS)}; all, if none is named")
    parser.add_argument("--write", action="store_true", help=f"write {EFFICIENCIES.name}, for all GPUs")
    asked = parser.parse_args()
    if strange := [name for name in asked.gpus if name not in GPUS]:
        parser.error(f"no tables of {', '.join(strange)}; there are some of {', '.join(GPUS)}")
    if asked.write and asked.gpus:
        parser.error("--write is for all GPUs: name none")
    fits: dict[str, GPUFits] = {}
    for name in asked.gpus or GPUS:
        try:
            fits[name] = fit_gpu(name)
        except CostError as error:
            parser.error(str(error))
        for heading, some in (name, fits[name].together), *fits[name].own.items():
            if some:
                print(f"{heading}:", *some, sep="\n", flush=True)
    if asked.write:
        EFFICIENCIES.write_text(written(fits), encoding="utf-8")
        PAGE.write_text(between_markers(PAGE, {"fits": table(fits)}), encoding="utf-8")


if __name__ == "__main__":
    main()
