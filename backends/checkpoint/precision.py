"""Precision of a checkpoint's weights and of their products: ``quantization_config``.

A model is told apart in parts (:data:`PARTS`); routers and embeddings are never quantised. A part that a configuration
leaves out in some layers is counted by the share of its weights that it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from typing import Any

from backends.checkpoint.config_fields import DTYPES, Fields, Inner
from backends.checkpoint.layer_kinds import Layer

DTYPE_BYTES: dict[str, float] = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "fp8": 1,
    "int8": 1,
    "int4": 0.5 + 2 / 128,
    "nvfp4": 0.5 + 1 / 16,
}
"""Bytes a weight or a KV element. int4 counts a 2-byte scale for every 128 weights, nvfp4 a byte for every 16."""
COMPUTES = {"int4": "bf16", "nvfp4": "fp4"}
"""What products with weights of such a word are in, where it is not the word itself."""
BY_FLAG = "--dtype"
PARTS = ("attention", "recurrent", "mlp", "experts", "shared_experts", "head")

_WHERE = (
    "model.layers.{}.",
    "model.language_model.layers.{}.",
    "language_model.model.layers.{}.",
    "backbone.layers.{}.",
)
"""Where families keep their layers."""
_OTHER_NAMES = (
    # Mixtral's, with MiniMax's beside.
    ("mlp.experts.0.gate_proj", "block_sparse_moe.experts.0.w1"),
    ("mlp.experts.0.up_proj", "block_sparse_moe.experts.0.w3"),
    ("mlp.experts.0.down_proj", "block_sparse_moe.experts.0.w2"),
    ("mlp.shared_experts.", "mlp.shared_expert."),
    ("mlp.", "feed_forward."),
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_qkvz"),
    ("linear_attn.in_proj_z", "linear_attn.in_proj_qkvz"),
    ("linear_attn.in_proj_b", "linear_attn.in_proj_ba"),
    ("linear_attn.in_proj_a", "linear_attn.in_proj_ba"),
    # Nemotron-H calls whatever a layer has its mixer.
    ("self_attn.", "mixer."),
    ("mlp.", "mixer."),
)
"""Beginnings of our names of matrices, and what some families write instead."""


@dataclass(frozen=True)
class Held:
    """Precision in which a matrix is held and multiplied."""

    bytes: float
    """Bytes of a weight, its share of scales and zero points included."""
    computes: str
    """Dtype of the products, where the GPU has it; else 16 bits."""


@dataclass(frozen=True)
class Precision:
    """Precision of the weights of a model, by what they are of."""

    dtype: str
    """The word for it: a name of :data:`DTYPE_BYTES`, mxfp4 or nvfp4."""
    said_by: str
    """Origin of the word: ``--dtype``, ``quantization_config (awq)``, ``torch_dtype``, or that nothing says so."""
    quantised: Held
    plain: Held
    """Precision of what is not quantised."""
    kept: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Share of each part's weights that stay as they are; 0 where it is not named."""
    mixed: Mapping[str, tuple[tuple[float, Held], ...]] = field(default_factory=dict, hash=False)
    """Of a checkpoint that is quantised in several ways: (share, how it is held) of each part's weights."""

    def of(self, part: str) -> list[tuple[float, Held]]:
        """(share, how it is held) of a part's weights; the shares add up to 1."""
        if part in self.mixed:
            return list(self.mixed[part])
        kept = self.kept.get(part, 0.0)
        return [(share, held) for share, held in ((1 - kept, self.quantised), (kept, self.plain)) if share]

    def bytes_of(self, part: str) -> float:
        """Bytes of a part's weight, on average."""
        return sum(share * held.bytes for share, held in self.of(part))

    @property
    def described(self) -> dict[str, Any]:
        """The precision in words, for a record."""
        mixed = {
            part: [[round(share, 3), held.bytes, held.computes] for share, held in ways]
            for part, ways in self.mixed.items()
        }
        return {
            "dtype": self.dtype,
            "said_by": self.said_by,
            "bytes": round(self.quantised.bytes, 6),
            "computes": self.quantised.computes,
            "kept": {part: round(self.kept[part], 3) for part in PARTS if part in self.kept},
            "kept_in": self.plain.computes,
        } | ({"mixed": mixed} if mixed else {})


def named(dtype: str, said_by: str = BY_FLAG) -> Precision:
    """The precision that a word stands for. The output projection stays in two bytes when the rest is narrower."""
    size = DTYPE_BYTES[dtype]
    plain = dtype if size >= 2 else "bf16"
    return Precision(
        dtype, said_by, Held(size, COMPUTES.get(dtype, dtype)), Held(DTYPE_BYTES[plain], plain), {"head": 1.0}
    )


def as_precision(dtype: str | Precision) -> Precision:
    """A word or what it stands for, as the latter."""
    return named(dtype) if isinstance(dtype, str) else dtype


def read_precision(fields: Fields, layers: Sequence[Layer], hidden: int) -> Precision:
    """Read what a config.json says of the weights of these layers. Raises UnsupportedModel, which names a quantisation that
    is not known."""
    said = fields.dtype_name()
    dtype = DTYPES.get(said or "", "bf16")
    plain = Held(DTYPE_BYTES[dtype], dtype)
    config = fields.object("quantization_config")
    if not config:
        where = ("dtype" if "dtype" in fields.values else "torch_dtype") if said else "nothing in its configuration"
        return named(dtype, where)
    method = quant_method(fields)
    reader = METHODS.get(method)
    if reader is None:
        raise fields.error(
            "quantization_config", f"quant_method {method!r} is not modelled; known: {', '.join(METHODS)}"
        )
    read = reader(Inner(config, fields.source, "quantization_config"), plain)
    try:
        if read.ways:
            return _in_ways(read, f"quantization_config ({method})", plain, layers, hidden)
        share = _kept(read.ignored, layers, hidden, read.only)
    except re.error as problem:
        raise fields.error(
            "quantization_config", f"{problem.pattern!r} is no regular expression: {problem}"
        ) from problem
    if not read.head:
        share["head"] = 1.0
    return Precision(read.dtype, f"quantization_config ({method})", read.held, plain, share)


def read_kv_dtype(fields: Fields) -> str | None:
    """Read the dtype that a checkpoint has scales of KV for; None where it has none. Raises UnsupportedModel for one that is
    not modelled."""
    config = Inner(fields.object("quantization_config"), fields.source, "quantization_config")
    if isinstance(config.raw("quantization"), Mapping):
        config = config.inner("quantization")
    algorithm = config.get("kv_cache_quant_algo", str)
    if algorithm:
        if algorithm.upper() != "FP8":
            raise config.error("kv_cache_quant_algo", f"{algorithm!r} is not modelled; known: FP8")
        return "fp8"
    scheme = config.inner("kv_cache_scheme")
    if not scheme.values:
        return None
    if (scheme.raw("num_bits"), scheme.raw("type")) != (8, "float"):
        raise config.error(
            "kv_cache_scheme", f"{scheme.raw('type')!r} of {scheme.raw('num_bits')!r} bits is not modelled"
        )
    return "fp8"


def quant_method(fields: Fields) -> str:
    """Name the quantisation of a config.json. Raises UnsupportedModel if it says none."""
    config = fields.object("quantization_config")
    method = config.get("quant_method")
    if method is None and ("producer" in config or "quantization" in config or "quant_algo" in config):
        method = "modelopt"  # hf_quant_config.json, put in as it is
    if not isinstance(method, str):
        raise fields.error("quantization_config", "has no quant_method")
    return method


@dataclass(frozen=True)
class _Read:
    dtype: str
    held: Held
    ignored: Sequence[str] = ()
    """Names or patterns of modules that stay as they are."""
    only: Sequence[str] = ()
    """The only modules that are quantised, if any are named."""
    head: bool = False
    """The output projection is quantised, too, unless it is ignored."""
    ways: Mapping[str, tuple[Held, Sequence[str]]] = field(default_factory=dict)
    """Where there are several: by its word, how weights are held, and the modules that are (the first to name one)."""


def _integers(
    config: Inner, field: str, group: int, zero_points: bool, computes: str, default: int | None = None
) -> _Read:
    """Weights of as many bits as ``field`` says, ``group`` of them with a scale of their own; 0: none have."""
    bits = config.size(field, default)
    config.must_be(field, 2, 3, 4, 8)
    size = bits / 8
    if group > 0:
        size += (2 + (bits / 8 if zero_points else 0)) / group
    return _Read(f"int{bits}", Held(size, computes), config.texts("modules_to_not_convert"))


def _awq(config: Inner, plain: Held) -> _Read:
    bits = "w_bit" if config.raw("bits") is None and config.raw("w_bit") is not None else "bits"
    group = config.get("group_size", int) or config.get("q_group_size", int) or 128
    return _integers(config, bits, group, config.get("zero_point", bool, True) is True, plain.computes, 4)


def _gptq(config: Inner, plain: Held) -> _Read:
    read = _integers(config, "bits", config.get("group_size", int, 128) or 128, True, plain.computes)
    rules = config.object("dynamic")
    if any(not rule.startswith("-:") for rule in rules):
        raise config.error("dynamic", "other bits for some modules are not modelled")
    ignored = [*read.ignored, *(f"re:{rule[2:]}" for rule in rules)]
    return replace(
        read, ignored=ignored, only=_nested_texts(config, "modules_in_block_to_quantize"), head=config.flag("lm_head")
    )


def _nested_texts(config: Inner, field: str) -> list[str]:
    """The texts in the lists of a list, none where it is absent. Raises UnsupportedModel."""
    groups = config.raw(field) or []
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and all(isinstance(each, str) for each in group) for group in groups
    ):
        raise config.error(field, f"{groups!r} is not a list of lists of texts")
    return [each for group in groups for each in group]


def _fp8(config: Inner, plain: Held) -> _Read:
    config.must_be("fmt", "e4m3", "float8_e4m3fn")
    block = block_size(config)
    size = 1 + (4 / (block[0] * block[1]) if block else 0)
    return _Read("fp8", Held(size, "fp8"), config.texts("modules_to_not_convert", "ignored_layers"))


def _int8(config: Inner, plain: Held) -> _Read:
    return _Read("int8", Held(1, "int8"), config.texts("modules_to_not_convert", "ignored_layers", "ignore"))


def block_size(config: Fields) -> tuple[int, int] | None:
    """Rows and columns that share a scale, None for one a tensor. Raises UnsupportedModel."""
    block = config.raw("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n >= 1 for n in block):
        raise config.error("weight_block_size", f"{block!r} is not rows and columns")
    return block[0], block[1]


def _bitsandbytes(config: Inner, plain: Held) -> _Read:
    ignored = config.texts("llm_int8_skip_modules")
    if config.flag("load_in_4bit") or config.flag("_load_in_4bit"):
        # A scale for 64 weights: in fp32, or in a byte with a second scale for 256 of them.
        scale = 1 / 64 + 4 / (64 * 256) if config.flag("bnb_4bit_use_double_quant") else 4 / 64
        return _Read("int4", Held(0.5 + scale, plain.computes), ignored)
    if config.flag("load_in_8bit") or config.flag("_load_in_8bit"):
        return _Read("int8", Held(1, "int8"), ignored)
    raise config.error("load_in_4bit", "neither this nor load_in_8bit is true")


def _mxfp4(config: Inner, plain: Held) -> _Read:
    return _Read("mxfp4", Held(0.5 + 1 / 32, plain.computes), config.texts("modules_to_not_convert"))


def _modelopt(config: Inner, plain: Held) -> _Read:
    inner = config.inner("quantization") if config.raw("quantization") is not None else config
    ignored = inner.texts("exclude_modules", "ignore")
    algorithm = inner.need("quant_algo", str)
    known = {
        "NVFP4": ("nvfp4", Held(DTYPE_BYTES["nvfp4"], COMPUTES["nvfp4"])),
        "W4A16_NVFP4": ("nvfp4 a16", Held(DTYPE_BYTES["nvfp4"], plain.computes)),
        "FP8": ("fp8", Held(1, "fp8")),
        "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", Held(1, "fp8")),
        "FP8_PB_WO": ("fp8", Held(1 + 4 / 128**2, "fp8")),
        "MXFP8": ("mxfp8", Held(1 + 1 / 32, "fp8")),
    }
    if algorithm == "MIXED_PRECISION":
        modules = inner.inner("quantized_layers")
        ways: dict[str, tuple[Held, list[str]]] = {}
        for module in modules.values:
            said = modules.inner(module).need("quant_algo", str)
            if said not in known:
                raise inner.error("quantized_layers", f"{module}: {said!r} is not modelled; known: {', '.join(known)}")
            ways.setdefault(known[said][0], (known[said][1], []))[1].append(module)
        if not ways:
            raise inner.error("quantized_layers", "missing")
        return _Read("mixed", plain, ways=ways)
    if algorithm not in known:
        raise inner.error(
            "quant_algo", f"{algorithm!r} is not modelled; known: {', '.join([*known, 'MIXED_PRECISION'])}"
        )
    word, held = known[algorithm]
    return _Read(word, held, ignored)


def _compressed_tensors(config: Inner, plain: Held) -> _Read:
    sparsity = config.inner("sparsity_config").get("format", str)
    if sparsity not in (None, "dense"):
        raise config.error("sparsity_config", f"{sparsity!r} is not modelled")
    groups = config.object("config_groups")
    if not groups:
        raise config.error("config_groups", "missing")
    outer = config.inner("config_groups")
    found = [(outer.inner(name), _compressed(outer.inner(name), plain)) for name in groups]
    ignored = config.texts("ignore")
    first = found[0][1]
    if all(read == first for _, read in found):
        only = [target for group, _ in found for target in group.texts("targets")]
        return replace(first, ignored=ignored, only=[] if "Linear" in only else only, head=True)
    # The first group that names a module says how it is held; one for all linear layers comes last.
    ways: dict[str, tuple[Held, list[str]]] = {}
    for group, read in sorted(found, key=lambda each: "Linear" in each[0].texts("targets")):
        targets = ["re:.*" if target == "Linear" else target for target in group.texts("targets")]
        held, named = ways.setdefault(read.dtype, (read.held, []))
        if held != read.held:
            raise group.error("weights", f"another {read.dtype} than that of another group is not modelled")
        named += targets
    return _Read("mixed", plain, ignored, ways=ways)


def _compressed(group: Inner, plain: Held) -> _Read:
    weights, inputs = group.inner("weights"), group.inner("input_activations")
    bits, kind = weights.size("num_bits"), weights.get("type", str, "int")
    strategy, size = weights.get("strategy", str), weights.get("group_size", int) or 0
    computes = plain.computes
    if inputs.values:
        activations = f"{'fp' if inputs.get('type', str, 'int') == 'float' else 'int'}{inputs.size('num_bits')}"
        if activations not in ("fp8", "int8", "fp4"):
            raise inputs.error("num_bits", f"activations in {activations} are not modelled")
        computes = activations
    if kind == "float" and bits == 8:
        block = weights.raw("block_structure")
        scales = 4 / (block[0] * block[1]) if strategy == "block" and isinstance(block, list) and len(block) == 2 else 0
        return _Read("fp8", Held(1 + scales, computes))
    if kind == "float" and bits == 4:
        return _Read("nvfp4" if size == 16 else "mxfp4", Held(0.5 + 1 / (size or 32), computes))
    if kind == "int":
        asymmetric = weights.get("symmetric", bool, True) is False
        return _integers(weights, "num_bits", size if strategy == "group" else 0, asymmetric, computes)
    raise weights.error("type", f"{kind!r} of {bits} bits is not modelled")


METHODS: dict[str, Callable[[Inner, Held], _Read]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "w8a8_fp8": _fp8,
    "w8a8_int8": _int8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}


def _kept(ignored: Sequence[str], layers: Sequence[Layer], hidden: int, only: Sequence[str]) -> dict[str, float]:
    """The share of each part's weights that patterns leave out."""
    if not ignored and not only:
        return {}
    leaves_out, quantises = _any_of(ignored), _any_of(only)
    all_of, kept = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for part, size, names in _matrices(layers, hidden):
        all_of[part] += size
        if any(map(leaves_out, names)) or (only and not any(map(quantises, names))):
            kept[part] += size
    return {part: kept[part] / all_of[part] for part in PARTS if kept[part]}


def _in_ways(read: _Read, said_by: str, plain: Held, layers: Sequence[Layer], hidden: int) -> Precision:
    """The precision of a checkpoint that names the modules of each way in which it is quantised."""
    tests = [(plain, _any_of(read.ignored)), *((held, _any_of(modules)) for held, modules in read.ways.values())]
    sizes: dict[str, dict[Held, int]] = {part: {} for part in PARTS}
    for part, size, names in _matrices(layers, hidden):
        held = next((held for held, named in tests if any(map(named, names))), plain)
        sizes[part][held] = sizes[part].get(held, 0) + size
    mixed = {
        part: tuple((size / sum(by.values()), held) for held, size in by.items()) for part, by in sizes.items() if by
    }
    kept = {part: share for part, by in mixed.items() for share, held in by if held == plain}
    word = " and ".join(read.ways)
    return Precision(word, said_by, next(iter(read.ways.values()))[0], plain, kept, mixed)


def _matrices(layers: Sequence[Layer], hidden: int) -> Iterator[tuple[str, int, list[str]]]:
    """Every matrix: the part that it is of, its weights, and its name as families write it."""
    yield "head", 1, ["lm_head", "language_model.lm_head"]
    for number, layer in enumerate(layers):
        for part, matrices in layer.matrices(hidden).items():
            for name, size in matrices.items():
                spellings = {
                    name,
                    *(theirs + name[len(ours) :] for ours, theirs in _OTHER_NAMES if name.startswith(ours)),
                }
                yield part, size, [where.format(number) + each for where in _WHERE for each in sorted(spellings)]


def _any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Make a test of whether any of the patterns names a module, or one that it is in.

    A pattern is ``re:`` and an expression, one with ``*``, or parts of a name. Raises re.error.
    """
    plain = {each for each in patterns if "*" not in each and not each.startswith("re:")}
    expressions = [re.compile(each[3:]) for each in patterns if each.startswith("re:")]
    starred = [each for each in patterns if "*" in each and not each.startswith("re:")]
    if starred:
        expressions.append(re.compile("|".join(f"{translate(each)}|{translate(each + '.*')}" for each in starred)))

    def matches(name: str) -> bool:
        words = name.split(".")
        if plain and any(
            ".".join(words[first:last]) in plain
            for first in range(len(words))
            for last in range(first + 1, len(words) + 1)
        ):
            return True
        return any(each.match(name) for each in expressions)

    return matches
