"""Fit the achievable shares and overheads of ``efficiencies.toml`` to published operator tables, one GPU at a time.

    python benchmarks/roofline_fit.py [GPU...] [--write]

For each kind of operator, the few numbers with the least mean error (of logarithms) in the roofline's form: matrix products
by precision, attention of decodes and of prompts (grouped, with a KV head for each head, latent), and routed experts by
precision. They are fitted to one half of the tables' shapes, and the errors that are printed are those on the other
(``board/halves.py``). The tables are those that the package ``aiconfigurator-core`` carries (the extra ``profiles``), the
newest version of SGLang and of vLLM, which count the same; of TensorRT-LLM where these two have none. ``--write`` writes
the file and the table of docs/cost-model.md anew, for all GPUs. Whole steps are compared by ``whole_steps.py``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.simulated.catalogue.gpu_specs import EFFICIENCIES, GPU, load_gpu
from backends.simulated.cost.models.expert_loads import distinct_experts
from backends.simulated.cost.models.roofline import OVERLAP
from backends.simulated.cost.tables.measured_operators import MEASURED_SKEW
from backends.simulated.cost.tables.operator_rows import LOADS
from benchmarks.board.halves import rows_score
from benchmarks.board.pages import between_markers
from benchmarks.board.silicon import find_rows

SYSTEMS = {
    "a100": "a100_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
"""Names in the package of the GPUs that are fitted."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "cost-model.md"
ENGINES = ("sglang", "vllm")
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
DIGITS = 3
LEAST_SHARE = 0.5
"""Experts in 8 bits that reach less of the bandwidth take longer than in 16: such rows are not what engines reach."""
OWN_GAIN = 0.05
"""An engine has numbers of its own for a kind of operator where these take more than this off the mean error (of logarithms)
on what is fitted, from that of the numbers of all."""
NEGLIGIBLE_S = {"each_overhead_s": 1e-9, "head_overhead_s": 1e-10, "overhead_s": 1e-7, "depth_s": 1e-11}
"""What is written as 0 below these."""


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
Seconds = np.ndarray
Way = Callable[[GPU], "Fit | None"]
Model = Callable[..., Seconds]


@dataclass(frozen=True)
class Measured:
    """Measurements of one kind of operator."""

    rows: pd.DataFrame
    """With the columns ``seconds``, ``engine`` and ``scores``."""

    def __getattr__(self, name: str) -> np.ndarray:
        """A column in numbers."""
        if name not in self.rows:
            raise AttributeError(name)
        return self.rows[name].to_numpy(float)

    @property
    def weight(self) -> np.ndarray:
        """What a row counts, so that engines count the same."""
        return 1 / self.rows.groupby("engine").seconds.transform("size").to_numpy(float)

    def part(self, of: np.ndarray) -> Measured:
        """Some of the rows."""
        return Measured(self.rows[of])


@dataclass(frozen=True)
class Fit:
    """Numbers of one kind of operator."""

    what: str
    values: dict[str, float]
    by_engine: dict[str, tuple[float, float]]
    """Means of the absolute and of the signed errors on what scores."""
    gained: float
    """By how much the mean error (of logarithms) on what is fitted fell from that of the numbers which were there."""
    fitted: int
    scored: int

    @property
    def error(self) -> float:
        """Mean of the absolute errors on what scores, over engines."""
        return float(np.mean([absolute for absolute, _ in self.by_engine.values()]))

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {_number(value)}" for name, value in self.values.items())
        engines = ", ".join(f"{name} {signed:+.1%}" for name, (_, signed) in self.by_engine.items())
        return (
            f"  {self.what}: off by {self.error:.1%} on {self.scored:,} rows that score ({engines}); "
            f"{self.fitted:,} fitted\n    {shown}"
        )


def fit(what: str, measured: Measured, fields: Sequence[str], start: GPU, model: Callable[[Measured], Model]) -> Fit:
    """The numbers of ``fields`` that come nearest: one at a time, by ever smaller steps, from those of ``start``."""
    scores = measured.rows.scores.to_numpy(bool)
    learned, kept = measured.part(~scores), measured.part(scores)
    seconds, weight, predict = np.log(learned.seconds), learned.weight / learned.weight.sum(), model(learned)

    def error(values: Sequence[float]) -> float:
        return float((weight * np.abs(np.log(predict(*values)) - seconds)).sum())

    values = [float(getattr(start, name)) for name in fields]
    first = best = error(values)
    step = 1.4
    while step > 1.005:
        moved = False
        for i, name in enumerate(fields):
            for factor in (step, 1 / step):
                tried = values.copy()
                tried[i] *= factor
                if name.endswith("_efficiency"):
                    tried[i] = min(tried[i], 1.0)
                if (found := error(tried)) < best - 1e-7:
                    best, values, moved = found, tried, True
        if not moved:
            step = step**0.5
    values = [_rounded(name, value) for name, value in zip(fields, values, strict=True)]
    off = model(kept)(*values) / kept.seconds - 1
    by_engine = {
        str(name): (float(np.abs(off[of]).mean()), float(off[of].mean()))
        for name, of in ((name, of.to_numpy()) for name, of in _engines(kept.rows))
    }
    values_of = dict(zip(fields, values, strict=True))
    return Fit(what, values_of, by_engine, first - best, int((~scores).sum()), int(scores.sum()))


def _engines(rows: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    return ((name, rows.engine.eq(name)) for name in rows.engine.unique())


def _rounded(name: str, value: float) -> float:
    least = next((least for end, least in NEGLIGIBLE_S.items() if name.endswith(end)), 0.0)
    return float(f"{value:.{DIGITS}g}") if value >= least else 0.0


def _number(value: float) -> str:
    return f"{value:.3g}"


# -- tables --------------------------------------------------------------------------------------------------------------


class Tables:
    """The tables of one GPU, of all engines or of one."""

    def __init__(self, system: Path, engine: str | None = None) -> None:
        self.system, self.engine = system, engine

    def rows(
        self,
        family: str,
        kind: str,
        of: Callable[[pd.DataFrame], pd.Series],
        sizes: Sequence[str],
        engines: Sequence[str] = ENGINES,
    ) -> Measured | None:
        """Rows of all engines that ``of`` chooses, the fastest kernel of each size; None without any."""
        found = []
        for engine in engines if self.engine is None else {*engines} & {self.engine}:
            files = sorted((self.system / family / engine).glob(f"*/{kind}_perf.parquet"), key=_version)
            if not files:
                continue
            table = pd.read_parquet(files[-1])
            if kind.endswith("_attention") and "window_size" not in table:
                table = table.assign(window_size=0)
            table["scores"] = rows_score(kind, table)
            chosen = table[of(table)]
            if len(chosen):
                best = chosen.groupby([*sizes, "scores"], as_index=False).latency.min()
                found.append(best.assign(seconds=best.latency * 1e-3, engine=engine))
        if not found:
            return None
        together = pd.concat(found)
        return None if together.scores.all() or not together.scores.any() else Measured(together)


def _version(file: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", file.parent.name)]


# -- kinds of operators --------------------------------------------------------------------------------------------------


def products(tables: Tables, gpu: GPU, form: Form, dtype: str, engines: Sequence[str] = ENGINES) -> Fit | None:
    """Matrix products in a form of weights."""
    rows = tables.rows(
        "gemm",
        "gemm",
        lambda t: t.gemm_dtype.eq(dtype) & t.m.isin(COUNTS) & t.n.between(1024, 70_000) & t.k.between(1024, 17_000),
        ["m", "n", "k"],
        engines,
    )
    if rows is None:
        return None
    slow = [name for name, of in _engines(rows.rows) if rows.rows[of].seconds.min() > FROM_HOST_S]
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
        "attention",
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
        "attention",
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
        "mla",
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
        "mla",
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


# -- all of a GPU --------------------------------------------------------------------------------------------------------


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


def fit_gpu(name: str, data: Path) -> GPUFits:
    """All kinds of operators that a GPU has tables of; the later ones rest on the numbers of the earlier."""
    defaults = {field.name: field.default for field in fields(GPU) if field.name.endswith(("_efficiency", "_s"))}
    gpu = replace(load_gpu(name), **{k: v for k, v in defaults.items() if not k.startswith("link")})
    together = []
    for found in _kinds(Tables(data / SYSTEMS[name]), gpu):
        together.append(found)
        gpu = replace(gpu, **found.values)
    own = {}
    for engine in ENGINES:
        kinds = _kinds(Tables(data / SYSTEMS[name], engine), gpu)
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
    parser.add_argument("gpus", nargs="*", metavar="GPU", help=f"of {', '.join(SYSTEMS)}; all, if none is named")
    parser.add_argument("--write", action="store_true", help=f"write {EFFICIENCIES.name}, for all GPUs")
    asked = parser.parse_args()
    if strange := [name for name in asked.gpus if name not in SYSTEMS]:
        parser.error(f"no tables of {', '.join(strange)}; there are some of {', '.join(SYSTEMS)}")
    if asked.write and asked.gpus:
        parser.error("--write is for all GPUs: name none")
    rows = find_rows()
    if rows is None:
        sys.exit('error: the tables are in a package that is not installed: pip install "llm-workbench[profiles]"')
    fits: dict[str, GPUFits] = {}
    for name in asked.gpus or SYSTEMS:
        fits[name] = fit_gpu(name, rows.parent / "data")
        for heading, some in (name, fits[name].together), *fits[name].own.items():
            if some:
                print(f"{heading}:", *some, sep="\n", flush=True)
    if asked.write:
        EFFICIENCIES.write_text(written(fits), encoding="utf-8")
        PAGE.write_text(between_markers(PAGE, {"fits": table(fits)}), encoding="utf-8")


if __name__ == "__main__":
    main()
