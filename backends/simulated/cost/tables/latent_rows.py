"""Latent attention out of published tables: its kernels alone, or with every product around it, as an engine's module runs.

A module's rows are of the model that they name: their shapes are those that our catalogue has of it, but for the heads.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from backends.checkpoint.layer_kinds import Latent
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.filled_grid import Shape, beside, between, filled_grid
from backends.simulated.cost.models.measured_mixers import MeasuredDecodes, MeasuredPrompts, Seen
from backends.simulated.cost.models.operator_tables import Curve, Grid, NotMeasured
from backends.simulated.cost.tables.attention_rows import PROMPT_PARTS, decode_terms, pair_seconds, prompt_terms
from backends.simulated.cost.tables.table_kinds import MILLISECOND, Columns, Tables, rows_where, shortest
from ground.errors import InputError

KERNELS_OF = "deepseek-ai/DeepSeek-V3"
"""The model whose latent attention the tables of kernels alone are of."""
WITHOUT_INDEXER = "_skip_indexer"
"""End of the name of a module that takes what one before it chose."""


def kernel_prompts(tables: Tables, mixer: Latent, heads: int, kv_dtype: str) -> MeasuredPrompts:
    """Prompts by kernels alone. Raises :class:`NotMeasured`."""
    grid = _grid(*_kernels(tables, "context_mla", mixer, heads, kv_dtype), heads, "isl")
    return MeasuredPrompts(grid, pair_s=pair_seconds(grid, Seen()))


def kernel_decodes(tables: Tables, mixer: Latent, heads: int, kv_dtype: str) -> MeasuredDecodes:
    """Decodes by kernels alone. Raises :class:`NotMeasured`."""
    return MeasuredDecodes(_grid(*_kernels(tables, "generation_mla", mixer, heads, kv_dtype), heads, "step", 1))


def absorbed_products(tables: Tables, mixer: Latent, heads: int, dtypes: tuple[str, ...]) -> Curve:
    """The products that take decodes into the latent space and back, by decodes, in the first of ``dtypes`` that was
    measured. Raises :class:`NotMeasured`."""
    columns = tables.table("mla_bmm")
    if not _same_shape(mixer, KERNELS_OF):
        raise NotMeasured(f"{tables}: mla_bmm: of other latents")
    for dtype in dtypes:
        curves = []
        for operator in ("mla_gen_pre", "mla_gen_post"):
            of = rows_where(columns, op_name=operator, bmm_dtype=dtype, num_heads=heads)
            if of.any():
                tokens, seconds = shortest(columns["num_tokens"][of], columns["latency"][of] * MILLISECOND)
                shape = Shape(tokens[:, None], seconds, lambda at: np.column_stack((np.ones(len(at)), at[:, 0])))
                every = np.unique(columns["num_tokens"])
                curves.append(Curve(every, shape.seconds([every])))
        if len(curves) == 2:
            return curves[0] + curves[1]
    raise NotMeasured(f"{tables}: mla_bmm: no rows for {heads} heads")


def module_of(
    tables: Tables, mixer: Latent, hidden: int, heads: int, kv_dtype: str, products: str
) -> tuple[MeasuredPrompts, MeasuredDecodes]:
    """Prompts and decodes with all products around them in a dtype of the tables. Raises :class:`NotMeasured`."""
    family = "mla" if mixer.topk is None else "dsa"
    kinds = (f"{family}_context_module", f"{family}_generation_module")
    found = []
    for kind in kinds:
        columns = tables.table(kind)
        of = rows_where(columns, kv_cache_dtype=kv_dtype, gemm_type=products)
        of &= np.char.endswith(np.asarray(columns["op_name"]), WITHOUT_INDEXER) == (
            mixer.topk is not None and mixer.indexer is None
        )
        models = np.asarray(columns["model"])
        of &= np.isin(models, [name for name in np.unique(models) if _same_shape(mixer, str(name), hidden)])
        if heads not in columns["num_heads"][of]:
            raise NotMeasured(f"{tables}: {kind}: no rows for {mixer.described} of {hidden}, {heads} on a GPU")
        found.append((columns, of))
    # The tables count a decode itself here.
    return _module_prompts(*found[0], heads), MeasuredDecodes(_grid(*found[1], heads, "step"))


def _module_prompts(columns: Columns, of: np.ndarray, heads: int) -> MeasuredPrompts:
    """Prompts of a module, by what is before them where several such were measured."""
    before = columns["step"]
    whole = of & (before == 0)
    if heads not in columns["num_heads"][whole]:
        raise NotMeasured("no whole prompts")
    grid = _grid(columns, whole, heads, "isl")
    token_s, pair_s = _rates(grid)
    of = of & (columns["num_heads"] == heads)
    if len(np.unique(before[of])) > 2:
        where = np.stack([columns[name][of] for name in ("batch_size", "isl", "step")], axis=1)
        grid = filled_grid(*shortest(where, columns["latency"][of] * MILLISECOND), _prefixed_terms)
    return MeasuredPrompts(grid, pair_s=pair_s, token_s=token_s)


def _grid(columns: Columns, of: np.ndarray, heads: int, tokens: str, itself: int = 0) -> Grid:
    """(requests, tokens of each) for a number of heads that was measured, out of rows of it and of those next to it."""
    have = columns["num_heads"]
    rows = of & np.isin(have, beside(np.unique(have[of]), heads))
    where = np.stack((columns["batch_size"][rows], columns[tokens][rows] + itself, have[rows]), axis=1)
    prompts = tokens == "isl"
    fitted = Shape(
        *shortest(where, columns["latency"][rows] * MILLISECOND), prompt_terms(Seen()) if prompts else decode_terms()
    )
    requests, lengths = fitted.axes[:2]
    if prompts:
        lengths = np.union1d(lengths, between(lengths, PROMPT_PARTS))
    return Grid((requests, lengths), fitted.seconds([requests, lengths, np.array([float(heads)])])[:, :, 0])


def _prefixed_terms(points: np.ndarray) -> np.ndarray:
    """A launch, tokens, pairs among a prompt's tokens, and with those before it."""
    prompts, tokens, before = points.T
    new = prompts * tokens
    return np.column_stack((np.ones(len(points)), new, new * tokens / 2, new * before))


def _rates(grid: Grid) -> tuple[float, float]:
    """Seconds a token and a pair more of long prompts: of the parabola through the longest, half and a quarter of it."""
    lengths = np.array(grid.axes[1])
    if len(lengths) < 3:
        raise NotMeasured("fewer than three lengths of prompts")
    c = lengths[-1]
    b, a = (lengths[max(int(np.searchsorted(lengths, c / part)), least)] for part, least in ((2, 1), (4, 0)))
    low, high = (grid.at(1, b) - grid.at(1, a)) / (b - a), (grid.at(1, c) - grid.at(1, b)) / (c - b)
    curvature = max((high - low) / (c - a), 0.0)
    return max(high - curvature * (b + c), 0.0), 2 * curvature


def _kernels(tables: Tables, kind: str, mixer: Latent, heads: int, kv_dtype: str) -> tuple[Columns, np.ndarray]:
    columns = tables.table(kind)
    of = rows_where(columns, mla_dtype="bfloat16", kv_cache_dtype=kv_dtype)
    if heads not in columns["num_heads"][of] or not _same_shape(mixer, KERNELS_OF):
        raise NotMeasured(f"{tables}: {kind}: no rows for {mixer.described}, {heads} on a GPU")
    return columns, of


def _same_shape(mixer: Latent, name: str, hidden: int | None = None) -> bool:
    """Whether latent attention is that of a model of the catalogue: where ``hidden`` is given with the products around,
    else that of the kernels alone."""
    for theirs, width in _latents(name):
        if hidden is None:
            parts = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            if mixer.topk is None and all(getattr(mixer, part) == getattr(theirs, part) for part in parts):
                return True
        elif hidden == width and _bare(mixer) == _bare(theirs):
            return True
    return False


def _bare(mixer: Latent) -> Latent:
    return replace(mixer, heads=0, vectors=0)


@lru_cache(maxsize=64)
def _latents(name: str) -> list[tuple[Latent, int]]:
    """The kinds of latent attention of a model and its hidden size; none of one that the catalogue does not know."""
    for known in (name, name.removesuffix("-FP8")):
        try:
            model = load_model(known)
        except InputError:
            continue
        mixers = dict.fromkeys(layer.mixer for layer in model.stack if isinstance(layer.mixer, Latent))
        found = [(mixer, model.hidden) for mixer in mixers]
        # A layer with an indexer was measured without, too, by models that have both.
        return found + [(replace(mixer, indexer=None), model.hidden) for mixer in mixers if mixer.indexer is not None]
    return []
