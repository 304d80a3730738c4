"""The operators of any model out of published tables, and by the roofline where these lack one (``--cost measured``).

Matrix products, attention that sees every token, routed experts and all-reduces are looked up. Whatever else a model has,
and shapes and precisions of these that nobody measured, are the roofline's, operator by operator; notes name both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from backends.checkpoint.layer_kinds import Attention, Dense, Experts, Layer
from backends.checkpoint.precision import Held
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.operator_tables import (
    AttentionTable,
    Curve,
    Grid,
    NotMeasured,
    OperatorTables,
    Provenance,
)
from backends.simulated.cost.models.roofline import RooflineCost, RooflineStage
from backends.simulated.cost.tables.aiconfigurator import (
    DTYPES,
    PREFIXES,
    Products,
    all_reduce_grid,
    attention_of,
    decode_rows,
    experts_grid,
    heads_beside,
    prompt_rows,
)
from backends.simulated.cost.tables.published_package import described, find_tables

COUNTS = np.array(sorted(base * 2**k for k in range(14) for base in (1, 3)))
"""Tokens at which the roofline is asked where no matrix products were measured."""
ALWAYS = ["norms, rotary and activations", "embedding", "sampler"]
"""Operators that no table is read for."""

Shapes = Mapping[str, tuple[int, int]]
"""Columns and rows of the weights of matrix products by name."""


def read_measured(want: CostRequest) -> OperatorTables:
    """The operators of a model. Raises ``CostError`` where there are no tables, ProfileError for one that cannot be read."""
    return _Reader(want).tables()


class _Reader:
    """What was found, and what was not, for one request."""

    def __init__(self, want: CostRequest) -> None:
        self._want, self._model = want, want.model
        self._tables = find_tables(want.gpu, want.engine)
        self._measured: dict[str, str] = {}
        """Operators that were found, and the version they are of."""
        self._lacking = list(ALWAYS)
        self._products: dict[str, Products | None] = {}
        plain = self._products_in(want.weights.plain)
        self._counts = COUNTS if plain is None else plain.counts

    def tables(self) -> OperatorTables:
        """Everything, with the notes about it."""
        want, model = self._want, self._model
        whole = self._roofline(model.stack)
        experts = self._experts()
        attends, attention = self._attention()
        kinds = {layer: self._layer(layer, experts is not None) for layer in dict.fromkeys(model.stack)}
        once = {"embedding": self._by_roofline(whole, "embedding")}
        part = "head" if not model.tied_embeddings else None
        head = self._matrices(part, {"lm_head": (model.vocab // want.tp, model.hidden)}, "output head")
        counts = self._counts
        if head is None:
            head = {"lm_head": Curve(counts, [whole.linear(1, int(n))["lm_head"] for n in counts])}
        head["sampler"] = Curve(counts, [whole.linear(1, int(n))["sampler"] for n in counts])
        reduce = self._all_reduce() if want.tp > 1 else None
        engine = f"{self._tables.engine} {self._tables.version_of('gemm')}"
        source = Provenance(self._tables.system, "aiconfigurator", self._tables.system.name, want.dtype, engine=engine)
        return OperatorTables(
            source,
            {},
            once,
            head,
            attention,
            experts,
            reduce,
            experts_over=want.tp,
            kinds=kinds,
            attends=attends,
            notes=self._notes(),
        )

    # -- parts of a model --------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer, experts_measured: bool) -> dict[str, Curve]:
        """Everything of a layer but attention, recurrences and routed experts."""
        hidden, tp = self._model.hidden, self._want.tp
        alone = self._roofline([layer])
        found = {"elementwise": self._by_roofline(alone, "elementwise")}
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, Attention):
            heads, kv_heads = mixer.heads // tp, max(mixer.kv_heads // tp, 1)
            queries = heads * mixer.head_dim * (2 if mixer.gated else 1)
            values = 0 if mixer.keys_are_values else mixer.value_dim
            shapes = {
                "qkv_proj": (queries + kv_heads * (mixer.head_dim + values), hidden),
                "o_proj": (hidden, heads * mixer.value_dim),
            }
            found |= self._matrices("attention", shapes, "products around attention") or {
                "projections": self._by_roofline(alone, "projections")
            }
        elif mixer is not None:
            self._lack(f"products around {mixer.described}")
            found["projections"] = self._by_roofline(alone, "projections")
        if isinstance(mlp, Dense):
            shapes = _mlp_shapes("", hidden, mlp.width // tp, mlp.gated)
            found |= self._matrices("mlp", shapes, "products of the MLP") or {"mlp": self._by_roofline(alone, "mlp")}
        elif isinstance(mlp, Experts) and experts_measured:
            # Routers are never quantised.
            found |= self._router(mlp)
            for name, width in (("shared_experts.", mlp.shared_width), ("beside_experts.", mlp.dense_width)):
                if width:
                    shapes = _mlp_shapes(name, hidden, width // tp, mlp.gated)
                    found |= self._matrices("shared_experts", shapes, "shared experts") or self._shared(
                        name, mlp, width
                    )
        return found

    def _router(self, mlp: Experts) -> dict[str, Curve]:
        hidden = self._model.hidden
        found = self._matrices(None, {"router": (mlp.count, hidden)}, "router")
        if found is not None:
            return found
        cost = self._cost(self._model.stack)
        seconds = [cost.matrix_s(cost.plain, int(n), mlp.router(hidden), hidden + mlp.count) for n in self._counts]
        return {"router": Curve(self._counts, seconds)}

    def _shared(self, name: str, mlp: Experts, width: int) -> dict[str, Curve]:
        """Shared experts of one width by the roofline."""
        cost = self._cost(self._model.stack)
        seconds = [cost.mlp_s("shared_experts", int(n), width, mlp.gated) for n in self._counts]
        return {f"{name}mlp": Curve(self._counts, seconds)}

    def _attention(self) -> tuple[Attention | None, AttentionTable | None]:
        """The commonest kind of attention that sees every token, and its table; what the others are is noted."""
        mixers = Counter(layer.mixer for layer in self._model.stack if layer.mixer is not None)
        whole = Counter({each: count for each, count in mixers.items() if isinstance(each, Attention) and _plain(each)})
        chosen = whole.most_common(1)[0][0] if whole else None
        for mixer in mixers:
            if mixer != chosen:
                self._lack(mixer.described)
        if chosen is None:
            return None, None
        assert isinstance(chosen, Attention)
        kv_dtype, tp = DTYPES.get(self._want.kv_dtype, self._want.kv_dtype), self._want.tp
        shape = (chosen.heads // tp, max(chosen.kv_heads // tp, 1), chosen.head_dim)
        heads = f"of {shape[0]} heads on {shape[1]} of KV of {shape[2]} in {self._want.kv_dtype}"
        rows: list[np.ndarray | None] = []
        for kind, read, what in (
            ("context_attention", prompt_rows, "attention of prompts"),
            ("generation_attention", decode_rows, "attention of decodes"),
        ):
            try:
                found, between = self._attention_rows(read, kind, shape, kv_dtype)
                rows.append(found)
                self._find(what + between, kind)
            except NotMeasured:
                rows.append(None)
                self._lack(f"{what} {heads}")
        if all(each is None for each in rows):
            return None, None
        alone = self._roofline([Layer(chosen, None)])
        prompts, decodes = rows
        if prompts is None:
            prompts = _roofline_prompts(alone)
        if decodes is None:
            decodes = _roofline_decodes(alone)
        return chosen, attention_of(prompts, decodes, self._tables.system)

    def _attention_rows(
        self, read: Callable[..., np.ndarray], kind: str, shape: tuple[int, int, int], kv_dtype: str
    ) -> tuple[np.ndarray, str]:
        """Rows of attention of a shape, and what to know of them: where other numbers of query heads were measured on as
        many KV heads, those of the numbers next to it, in a straight line. Raises NotMeasured."""
        heads, kv_heads, head_dim = shape
        try:
            return read(self._tables, *shape, kv_dtype), ""
        except NotMeasured:
            low, high = heads_beside(self._tables, kind, *shape, kv_dtype)
        fewer, more = (read(self._tables, count, kv_heads, head_dim, kv_dtype) for count in (low, high))
        above = {tuple(row[:4]): row[4] for row in more}
        part = (heads - low) / (high - low)
        rows = [(*row[:4], row[4] + part * (above[key] - row[4])) for row in fewer if (key := tuple(row[:4])) in above]
        if not rows:
            raise NotMeasured(f"{self._tables}: {kind}: {low} and {high} heads at different points")
        return np.array(rows), f" ({heads} heads, between {low} and {high})"

    def _experts(self) -> Grid | None:
        """Routed experts, where all layers have the same and they are of the usual kind."""
        kinds = {layer.mlp for layer in self._model.stack if isinstance(layer.mlp, Experts)}
        if not kinds:
            return None
        each, ways = next(iter(kinds)), self._want.weights.of("experts")
        dtype = self._dtype(ways[0][1])
        try:
            if len(kinds) > 1 or len(ways) > 1 or dtype is None or not each.gated or each.latent is not None:
                raise NotMeasured("of a kind that is not read")
            grid = experts_grid(self._tables, self._model, self._want.tp, (dtype,))
        except NotMeasured:
            for one in sorted(kind.described for kind in kinds):
                self._lack(f"{one} (tp {self._want.tp}, {self._want.dtype}) with router and shared experts")
            return None
        self._find("routed experts", "moe")
        return grid

    def _all_reduce(self) -> Grid | None:
        try:
            grid = all_reduce_grid(self._tables, self._want.tp)
        except NotMeasured:
            self._lack(f"all-reduces over {self._want.tp} GPUs")
            return None
        self._find("all-reduces", "custom_allreduce")
        return grid

    # -- matrix products ---------------------------------------------------------------------------------------------

    def _matrices(self, part: str | None, shapes: Shapes, what: str) -> dict[str, Curve] | None:
        """Products with weights of a part of the model, or with those that are never quantised; None where one of them
        was not measured."""
        weights = self._want.weights
        ways = weights.of(part) if part is not None else [(1.0, weights.plain)]
        found: dict[str, Curve] = {}
        for share, held in ways:
            products = self._products_in(held)
            try:
                curves = None if products is None else {name: products.curve(*shape) for name, shape in shapes.items()}
            except NotMeasured:
                curves = None
            if curves is None:
                self._lack(f"{what} in {held.computes if held == weights.plain else weights.dtype}")
                return None
            for name, curve in curves.items():
                curve = curve.times(share)
                found[name] = found[name] + curve if name in found else curve
        self._find("matrix products", "gemm")
        return found

    def _products_in(self, held: Held) -> Products | None:
        dtype = self._dtype(held)
        if dtype is None:
            return None
        if dtype not in self._products:
            try:
                self._products[dtype] = Products(self._tables, dtype)
            except NotMeasured:
                self._products[dtype] = None
        return self._products[dtype]

    def _dtype(self, held: Held) -> str | None:
        """What the tables call a way in which weights are held; None for one that they do not know."""
        if held.computes in ("bf16", "fp16"):
            if held.bytes == 2:
                return "bfloat16"
            return None if held.bytes >= 1 else "w4a16_mxfp4" if self._want.weights.dtype == "mxfp4" else "int4_wo"
        if held.computes != "fp8":
            return None
        if held.bytes < 1:
            return "nvfp4"
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

    # -- notes -------------------------------------------------------------------------------------------------------

    def _find(self, what: str, kind: str) -> None:
        self._measured[what] = self._tables.version_of(kind) or ""

    def _lack(self, what: str) -> None:
        if what not in self._lacking:
            self._lacking.append(what)

    def _notes(self) -> list[str]:
        tables, notes = self._tables, []
        for version in dict.fromkeys(self._measured.values()):
            names = ", ".join(name for name, each in self._measured.items() if each == version)
            near = "" if version == tables.version else f", the nearest to {tables.version}"
            notes.append(
                f"cost: measured on {tables.system.name} under {tables.engine} {version}{near} ({described()}): {names}"
            )
        return [*notes, f"cost: by the roofline, no table was read for them: {'; '.join(self._lacking)}"]


def _plain(mixer: Attention) -> bool:
    return mixer.window is None and mixer.head_dim == mixer.value_dim


def _mlp_shapes(prefix: str, hidden: int, width: int, gated: bool) -> dict[str, tuple[int, int]]:
    return {
        f"{prefix}gate_up_proj": ((2 if gated else 1) * width, hidden),
        f"{prefix}down_proj": (hidden, width),
    }


def _roofline_prompts(stage: RooflineStage) -> np.ndarray:
    """Rows of prompts as ``prompt_rows`` has them."""
    return np.array(
        [
            (c, p, 0, 0, stage.prefill_attention_s(c * (p + (c + 1) / 2), c + p) + stage.attention_overhead_s)
            for c in (2.0**k for k in range(4, 16))
            for p in PREFIXES
        ]
    )


def _roofline_decodes(stage: RooflineStage) -> np.ndarray:
    """Rows of decodes as ``decode_rows`` has them. The roofline is linear in their context: few points are all."""
    return np.array(
        [
            (0, 0, n, context, n * context * stage.layer_context_s + stage.attention_overhead_s)
            for n in (2.0**k for k in range(12))
            for context in (1.0, 1024.0, 131072.0)
        ]
    )
