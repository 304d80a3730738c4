"""The operators of any model out of published tables, and by the roofline where these lack one (``--cost measured``).

Matrix products, attention and recurrences, routed experts and collectives are looked up. Whatever else a model has, and
shapes and precisions of these that nobody measured, are the roofline's, operator by operator; notes name both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from backends.checkpoint.layer_kinds import Attention, Dense, Experts, GatedDelta, Latent, Layer, Mixer
from backends.checkpoint.precision import DTYPE_BYTES, Held
from backends.simulated.cost.cost_request import CostError, CostRequest
from backends.simulated.cost.models.layer_times import times_of
from backends.simulated.cost.models.measured_mixers import MeasuredDecodes, MeasuredMixer, MeasuredPrompts, Seen
from backends.simulated.cost.models.operator_tables import Curve, Grid, NotMeasured, OperatorTables, Provenance
from backends.simulated.cost.models.roofline import RooflineCost, RooflineStage
from backends.simulated.cost.tables.attention_rows import Shape, decodes_of, prompts_of
from backends.simulated.cost.tables.latent_rows import absorbed_products, kernel_decodes, kernel_prompts, module_of
from backends.simulated.cost.tables.operator_rows import (
    LOADS,
    Products,
    all_reduce_grid,
    collective_grid,
    experts_grid,
    timed_with_launches,
)
from backends.simulated.cost.tables.product_shapes import Shapes, around_mixer, expand_latents, of_mlp
from backends.simulated.cost.tables.published_package import described, find_tables
from backends.simulated.cost.tables.recurrent_rows import gated_delta_of
from backends.simulated.cost.tables.table_kinds import DTYPES, Keep, Tables

COUNTS = np.array(sorted(base * 2**k for k in range(14) for base in (1, 3)))
"""Tokens at which the roofline is asked where no matrix products were measured."""
ALWAYS = ["norms, rotary and activations", "embedding", "sampler"]
"""Operators that no table is read for."""
BY_ROOFLINE = "cost: by the roofline, no table was read for them: "
"""Beginning of the note that names what was not found, parted by semicolons."""
MEASURED_SKEW = 1.01
"""That of the tables of most models, unless another is asked for."""

Found = TypeVar("Found")


def read_measured(want: CostRequest, keep: Keep | None = None) -> OperatorTables:
    """The operators of a model, of whose tables ``keep`` says which rows may be read. Raises ``CostError`` where there are
    none, ProfileError for one that cannot be read."""
    tables = find_tables(want.gpu, want.engine, keep)
    source = Provenance(tables.system, "aiconfigurator", tables.system.name, want.dtype)
    reader = OperatorReader(want, tables)
    found = reader.read(replace(source, engine=f"{tables.engine} {tables.version_of('gemm')}"))
    found.notes = reader.notes(tables.system.name, described())
    return found


class OperatorReader:
    """What was found, and what was not, for one request."""

    def __init__(self, want: CostRequest, tables: Tables) -> None:
        self._want, self._model, self._tables = want, want.model, tables
        self._skew = MEASURED_SKEW if want.expert_skew is None else want.expert_skew
        if self._skew not in LOADS:
            have = ", ".join(f"{skew:g}" for skew in LOADS)
            raise CostError(f"cost: measured: experts were measured at an expert_skew of {have}, not {self._skew:g}")
        self._measured: dict[tuple[str, str], None] = {}
        """Operators that were found, and what they were measured under, in order."""
        self.lacking: list[str] = []
        """Operators that were not."""
        self._products: dict[str, tuple[Products, str] | None] = {}
        plain = self._products_in(want.weights.plain)
        self._counts = COUNTS if plain is None else plain[0].counts
        self._kv_dtype = DTYPES.get(want.kv_dtype, want.kv_dtype)
        self._kinds = len({layer.mixer for layer in self._model.stack if layer.mixer is not None})

    def read(self, source: Provenance) -> OperatorTables:
        """Everything."""
        want, model = self._want, self._model
        whole = self._roofline(model.stack)
        experts = self._experts()
        mixers = {mixer: self._mixer(mixer) for mixer in dict.fromkeys(layer.mixer for layer in model.stack) if mixer}
        self._mixers = {mixer: found for mixer, found in mixers.items() if found is not None}
        kinds = {layer: self._layer(layer, experts is not None) for layer in dict.fromkeys(model.stack)}
        once = {"embedding": self._by_roofline(whole, "embedding")}
        part = "head" if not model.tied_embeddings else None
        head = self._matrices(part, {"lm_head": (model.vocab // want.tp, model.hidden)}, "output head")
        counts = self._counts
        if head is None:
            head = {"lm_head": Curve(counts, [whole.linear(1, int(n))["lm_head"] for n in counts])}
        head["sampler"] = Curve(counts, [whole.linear(1, int(n))["sampler"] for n in counts])
        gather, scatter = self._exchange() if want.ep > want.tp else (None, None)
        return OperatorTables(
            source,
            {},
            once,
            head,
            None,
            experts,
            self._all_reduce() if want.tp > 1 else None,
            experts_over=max(want.tp, want.ep),
            kinds=kinds,
            mixers={mixer: times for mixer, times in self._mixers.items()},
            gather=gather,
            scatter=scatter,
        )

    # -- parts of a model --------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer, experts_measured: bool) -> dict[str, Curve]:
        """Everything of a layer but attention, recurrences and routed experts."""
        hidden, tp = self._model.hidden, self._want.tp
        alone = self._roofline([layer])
        found = {"elementwise": self._by_roofline(alone, "elementwise")}
        mixer, mlp = layer.mixer, layer.mlp
        if mixer is not None and not ((times := self._mixers.get(mixer)) is not None and times.whole):
            shapes = around_mixer(mixer, hidden, tp)
            if isinstance(mixer, Latent) and not self._absorbed(mixer):
                shapes |= expand_latents(mixer, tp)
            what = "products around attention" if isinstance(mixer, Attention) else f"products around {mixer.described}"
            found |= self._matrices(mixer.part, shapes, what) or {
                "projections": self._by_roofline(alone, "projections")
            }
        if isinstance(mlp, Dense):
            shapes = of_mlp("", hidden, mlp.width // tp, mlp.gated)
            found |= self._matrices("mlp", shapes, "products of the MLP") or {"mlp": self._by_roofline(alone, "mlp")}
        elif isinstance(mlp, Experts) and experts_measured:
            # Routers are never quantised.
            found |= self._router(mlp)
            for name, width in (("shared_experts.", mlp.shared_width), ("beside_experts.", mlp.dense_width)):
                if width:
                    shapes = of_mlp(name, hidden, width // tp, mlp.gated)
                    found |= self._matrices("shared_experts", shapes, "shared experts") or self._shared(
                        name, mlp, width
                    )
            if mlp.latent is not None:
                shapes = {"to_latent": (mlp.latent, hidden), "from_latent": (hidden, mlp.latent)}
                found |= self._matrices("shared_experts", shapes, "products around experts") or self._around(mlp.latent)
        return found

    def _router(self, mlp: Experts) -> dict[str, Curve]:
        hidden = self._model.hidden
        found = self._matrices(None, {"router": (mlp.count, hidden)}, "router")
        if found is not None:
            return found
        cost = self._cost(self._model.stack)
        seconds = [
            cost.matrix_s(cost.plain, int(n), mlp.router(hidden), hidden + mlp.count, hidden) for n in self._counts
        ]
        return {"router": Curve(self._counts, seconds)}

    def _shared(self, name: str, mlp: Experts, width: int) -> dict[str, Curve]:
        """Shared experts of one width by the roofline."""
        cost = self._cost(self._model.stack)
        seconds = [cost.mlp_s("shared_experts", int(n), width, mlp.gated) for n in self._counts]
        return {f"{name}mlp": Curve(self._counts, seconds)}

    def _around(self, latent: int) -> dict[str, Curve]:
        """The products to a latent width and back by the roofline."""
        cost, hidden = self._cost(self._model.stack), self._model.hidden
        held, parameters, width = cost.parts["shared_experts"], 2 * hidden * latent, 2 * (hidden + latent)
        seconds = [cost.matrix_s(held, int(n), parameters, width, hidden + latent, products=2) for n in self._counts]
        return {"around_experts": Curve(self._counts, seconds)}

    def _mixer(self, mixer: Mixer) -> MeasuredMixer | None:
        """Attention or recurrence of a kind of layer; None where nothing of it was measured."""
        want, whole = self._want, False
        if isinstance(mixer, Attention):
            prompts, decodes = self._attention(mixer)
        elif isinstance(mixer, Latent):
            prompts, decodes, whole = self._latent(mixer)
        elif isinstance(mixer, GatedDelta):
            both = self._first("gdn", lambda tables: gated_delta_of(tables, mixer, want.tp))
            self._note(both, mixer.described)
            prompts, decodes = both[0] if both is not None else (None, None)
        else:
            self._lack(mixer.described)
            return None
        if prompts is None and decodes is None:
            return None
        return MeasuredMixer(prompts, decodes, times_of(mixer, want.kv_dtype, want.tp, want.gpu), whole)

    def _attention(self, mixer: Attention) -> tuple[MeasuredPrompts | None, MeasuredDecodes | None]:
        tp, seen = self._want.tp, Seen(mixer.window, mixer.chunked)
        shape = Shape(mixer.heads // tp, max(mixer.kv_heads // tp, 1), mixer.head_dim)
        which = f"{shape}{'' if mixer.window is None else f' in a window of {mixer.window}'} in {self._want.kv_dtype}"
        if mixer.head_dim != mixer.value_dim:
            self._lack(f"attention of {which} with values of {mixer.value_dim}")
            return None, None
        prompts = self._first("context_attention", lambda tables: prompts_of(tables, shape, seen, self._kv_dtype))
        decodes = self._first("generation_attention", lambda tables: decodes_of(tables, shape, seen, self._kv_dtype))
        for found, what in ((prompts, "attention of prompts"), (decodes, "attention of decodes")):
            if found is None:
                self._lack(f"{what} of {which}")
                continue
            (_, how), version = found
            of = f" of {which}" if self._kinds > 1 else ""
            self._find(f"{what}{of}{f' ({how})' if how else ''}", version)
        return prompts[0][0] if prompts else None, decodes[0][0] if decodes else None

    def _latent(self, mixer: Latent) -> tuple[MeasuredPrompts | None, MeasuredDecodes | None, bool]:
        """Latent attention, and whether the products around are in it."""
        hidden, heads, kv_dtype = self._model.hidden, mixer.heads // self._want.tp, self._kv_dtype
        ways = self._want.weights.of(mixer.part)
        products = self._dtype(ways[0][1]) if len(ways) == 1 else None
        if products is not None:
            family = "mla" if mixer.topk is None else "dsa"
            module = self._first(
                f"{family}_context_module",
                lambda tables: module_of(tables, mixer, hidden, heads, kv_dtype, products),
            )
            if module is not None:
                self._note(module, f"{mixer.described} with the products around")
                return *module[0], True
        which = f"{mixer.described}, {heads} on a GPU in {self._want.kv_dtype}"
        prompts = self._first("context_mla", lambda tables: kernel_prompts(tables, mixer, heads, kv_dtype))
        decodes = self._first("generation_mla", lambda tables: kernel_decodes(tables, mixer, heads, kv_dtype))
        self._note(prompts, f"prompts of {which}")
        self._note(decodes, f"decodes of {which}")
        if prompts is not None and decodes is not None and (bmm := self._absorb(mixer, heads, products)) is not None:
            decodes[0].of_requests, prompts[0].of_context = bmm
        return prompts[0] if prompts else None, decodes[0] if decodes else None, False

    def _absorb(self, mixer: Latent, heads: int, products: str | None) -> tuple[Curve, Curve] | None:
        """The products that take decodes into the latent space and back, by decodes, and that which makes keys and values
        for prompts, by tokens."""
        dtypes = ("fp8", "bfloat16") if products is not None and products.startswith("fp8") else ("bfloat16",)
        found = self._first("mla_bmm", lambda tables: absorbed_products(tables, mixer, heads, dtypes))
        expand = self._matrices(mixer.part, expand_latents(mixer, self._want.tp), f"products around {mixer.described}")
        if found is None or expand is None:
            return None
        self._find("products of absorbed decodes", found[1])
        return found[0], next(iter(expand.values()))

    def _absorbed(self, mixer: Latent) -> bool:
        """Whether the product that makes keys and values is in the times of attention."""
        times = self._mixers.get(mixer)
        return times is not None and times.prompts is not None and times.prompts.of_context is not None

    def _experts(self) -> Grid | None:
        """Routed experts, where all layers have the same."""
        want = self._want
        kinds = {layer.mlp for layer in self._model.stack if isinstance(layer.mlp, Experts)}
        if not kinds:
            return None
        each, ways = next(iter(kinds)), want.weights.of("experts")
        dtype = self._dtype(ways[0][1]) if len(ways) == 1 else None
        # Spread over GPUs whole, or each divided.
        tp, ep = (1, want.ep) if want.ep > 1 else (want.tp, 1)
        found = None
        if len(kinds) == 1 and dtype is not None:
            hidden = self._model.hidden

            def read(tables: Tables) -> tuple[Grid, str]:
                try:
                    return experts_grid(tables, each, hidden, tp, ep, dtype, self._skew), ""
                except NotMeasured:
                    if dtype != "fp8":
                        raise
                    return experts_grid(tables, each, hidden, tp, ep, "fp8_block", self._skew), ", in fp8 by block"

            found = self._first("moe", read)
        if found is None:
            for one in sorted(kind.described for kind in kinds):
                layout = f"tp {want.tp}" if want.ep == 1 else f"tp {want.tp}, ep {want.ep}"
                self._lack(f"{one} ({layout}, {want.dtype}) with router and shared experts")
            return None
        grid, how = found[0]
        self._find(f"routed experts ({LOADS[self._skew].replace('_', ' ')} load{how})", found[1])
        return grid

    def _all_reduce(self) -> Grid | None:
        found = self._first("custom_allreduce", lambda tables: all_reduce_grid(tables, self._want.tp))
        self._note(found, "all-reduces", f"all-reduces over {self._want.tp} GPUs")
        return None if found is None else found[0]

    def _exchange(self) -> tuple[Grid | None, Grid | None]:
        """Sending tokens to the experts of all instances and back."""
        ranks = self._want.ep
        both = []
        for operator in ("all_gather", "reduce_scatter"):
            found = self._first("nccl", lambda tables: collective_grid(tables, operator, ranks))  # noqa: B023, now
            what = operator.replace("_", "-")
            self._note(found, f"{what}s", f"{what}s over {ranks} GPUs")
            both.append(None if found is None else found[0])
        return both[0], both[1]

    # -- matrix products ---------------------------------------------------------------------------------------------

    def _matrices(self, part: str | None, shapes: Shapes, what: str) -> dict[str, Curve] | None:
        """Products with weights of a part of the model, or with those that are never quantised; None where one of them
        was not measured."""
        weights = self._want.weights
        ways = weights.of(part) if part is not None else [(1.0, weights.plain)]
        found: dict[str, Curve] = {}
        under = []
        for share, held in ways:
            products = self._products_in(held)
            try:
                curves = {} if products is None else {name: products[0].curve(*at) for name, at in shapes.items()}
            except NotMeasured:
                products = None
            if products is None:
                self._lack(f"{what} in {held.computes if held == weights.plain else weights.dtype}")
                return None
            under.append(("matrix products" + ("" if held == weights.plain else f" in {weights.dtype}"), products[1]))
            for name, curve in curves.items():
                curve = curve.times(share)
                found[name] = found[name] + curve if name in found else curve
        for kind, where in under:
            self._find(kind, where)
        return found

    def _products_in(self, held: Held) -> tuple[Products, str] | None:
        """The products with weights held so, and the version they are of."""
        dtype = self._dtype(held)
        if dtype is None:
            return None
        if dtype not in self._products:
            # Launches are an engine's, kernels are much alike.
            launches = self._first("gemm", lambda tables: timed_with_launches(tables, dtype))
            others = self._tables.elsewhere() if launches is not None and launches[0] else []
            self._products[dtype] = self._first("gemm", lambda tables: Products(tables, dtype), *others)
        return self._products[dtype]

    def _dtype(self, held: Held) -> str | None:
        """What the tables call a way in which weights are held; None for one that they do not know."""
        if held.computes in ("bf16", "fp16"):
            if held.bytes == 2:
                return "bfloat16"
            return None if held.bytes >= 1 else "w4a16_mxfp4" if self._want.weights.dtype == "mxfp4" else "int4_wo"
        if held.computes == "fp4":
            return "nvfp4" if held.bytes == DTYPE_BYTES["nvfp4"] else None
        if held.computes != "fp8":
            return None
        # A scale for a block of 128 by 128 adds little; one for 32 weights (mxfp8) was not measured.
        return "fp8" if held.bytes == 1 else "fp8_block" if held.bytes < 1.01 else None

    # -- the roofline ------------------------------------------------------------------------------------------------

    def _cost(self, layers: Sequence[Layer]) -> RooflineCost:
        want = self._want
        some = replace(self._model, stack=tuple(layers))
        return RooflineCost(some, want.gpu, dtype=want.weights, kv_dtype=want.kv_dtype, tp=want.tp, capture_sizes=[])

    def _roofline(self, layers: Sequence[Layer]) -> RooflineStage:
        """What the roofline says of these layers alone."""
        return self._cost(layers).stage(0)

    def _by_roofline(self, stage: RooflineStage, operator: str) -> Curve:
        return Curve(self._counts, [stage.linear(int(count), 0)[operator] for count in self._counts])

    # -- what is there -----------------------------------------------------------------------------------------------

    def _first(self, kind: str, read: Callable[[Tables], Found], *others: Tables) -> tuple[Found, str] | None:
        """What is read of a kind of table, of the nearest version that has it, or of ``others``, and what it was measured
        under; None where none has."""
        for tables in (self._tables, *others):
            for version in tables.versions(kind):
                try:
                    return read(tables.at(version)), tables.named(version, kind)
                except NotMeasured:
                    continue
        return None

    def _note(self, found: tuple[object, str] | None, what: str, lacking: str | None = None) -> None:
        if found is None:
            self._lack(lacking or what)
        else:
            self._find(what, found[1])

    def _find(self, what: str, where: str) -> None:
        self._measured[what, where] = None

    def _lack(self, what: str) -> None:
        if what not in self.lacking:
            self.lacking.append(what)

    def notes(self, system: str, package: str) -> list[str]:
        """Sentences about where times are from."""
        notes = []
        for where in dict.fromkeys(where for _, where in self._measured):
            names = ", ".join(name for name, each in self._measured if each == where)
            notes.append(f"cost: measured on {system} {where} ({package}): {names}")
        rest = "; ".join([*ALWAYS, *self.lacking])
        notes += self._cost(self._model.stack).notes
        return [*notes, f"{BY_ROOFLINE}{rest}"]
