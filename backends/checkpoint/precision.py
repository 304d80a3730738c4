"""Precision of a checkpoint's weights and of their products: ``quantization_config``.

A model is told apart in parts (:data:`PARTS`); routers and embeddings are never quantised. A part that a configuration
leaves out in some layers is counted by the share of its matrices that it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from backends.checkpoint.config_fields import DTYPES, Fields, Inner

DTYPE_BYTES: dict[str, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5 + 2 / 128}
"""Bytes a weight or a KV element. int4 counts a 2-byte scale for every 128 weights."""
BY_FLAG = "--dtype"
PARTS = ("attention", "mlp", "experts", "shared_experts", "head")

_MATRICES: dict[str, tuple[str, ...]] = {
    "attention": tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    "mlp": tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "experts": tuple(f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")),
    "shared_experts": tuple(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")),
}
"""Names of a layer's matrices in a checkpoint."""
_OTHER_NAMES = (
    ("mlp.experts.0.", "block_sparse_moe.experts.0."),
    ("gate_proj", "w1"),
    ("up_proj", "w3"),
    ("down_proj", "w2"),
)
"""Mixtral's."""


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
    """Share of each part's matrices that stay as they are; 0 where it is not named."""
    notes: tuple[str, ...] = ()

    def of(self, part: str) -> list[tuple[float, Held]]:
        """(share, how it is held) of a part's matrices; the shares add up to 1."""
        kept = self.kept.get(part, 0.0)
        return [(share, held) for share, held in ((1 - kept, self.quantised), (kept, self.plain)) if share]

    def bytes_of(self, part: str) -> float:
        """Bytes of a part's weight, on average."""
        return sum(share * held.bytes for share, held in self.of(part))

    @property
    def described(self) -> dict[str, Any]:
        """The precision in words, for a record."""
        return {
            "dtype": self.dtype,
            "said_by": self.said_by,
            "bytes": round(self.quantised.bytes, 6),
            "computes": self.quantised.computes,
            "kept": {part: round(self.kept[part], 3) for part in PARTS if part in self.kept},
            "kept_in": self.plain.computes,
        }


def named(dtype: str, said_by: str = BY_FLAG) -> Precision:
    """The precision that a word stands for. The output projection stays in two bytes when the rest is narrower."""
    size = DTYPE_BYTES[dtype]
    plain = dtype if size >= 2 else "bf16"
    computes = dtype if dtype != "int4" else "bf16"
    return Precision(dtype, said_by, Held(size, computes), Held(DTYPE_BYTES[plain], plain), {"head": 1.0})


def as_precision(dtype: str | Precision) -> Precision:
    """A word or what it stands for, as the latter."""
    return named(dtype) if isinstance(dtype, str) else dtype


def read_precision(fields: Fields, layers: int) -> Precision:
    """Read what a config.json says of its weights. Raises UnsupportedModel, which names a quantisation that is not known."""
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
        share = _kept(read.ignored, layers, read.only)
    except re.error as problem:
        raise fields.error(
            "quantization_config", f"{problem.pattern!r} is no regular expression: {problem}"
        ) from problem
    if not read.head:
        share["head"] = 1.0
    return Precision(read.dtype, f"quantization_config ({method})", read.held, plain, share, read.notes)


def quant_method(fields: Fields) -> str:
    """Name the quantisation of a config.json. Raises UnsupportedModel if it says none."""
    config = fields.object("quantization_config")
    method = config.get("quant_method")
    if method is None and "producer" in config:
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
    notes: tuple[str, ...] = ()


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
    return replace(read, ignored=[*read.ignored, *(f"re:{rule[2:]}" for rule in rules)], head=config.flag("lm_head"))


def _fp8(config: Inner, plain: Held) -> _Read:
    config.must_be("fmt", "e4m3", "float8_e4m3fn")
    block = block_size(config)
    size = 1 + (4 / (block[0] * block[1]) if block else 0)
    return _Read("fp8", Held(size, "fp8"), config.texts("modules_to_not_convert", "ignored_layers"))


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


NVFP4_NOTE = "products in fp4 are counted at the rate of fp8: the GPUs' fp4 rates are not known here"


def _modelopt(config: Inner, plain: Held) -> _Read:
    inner = config.inner("quantization") if config.raw("quantization") is not None else config
    ignored = inner.texts("exclude_modules", "ignore")
    algorithm = inner.need("quant_algo", str)
    if algorithm == "NVFP4":
        return _Read("nvfp4", Held(0.5 + 1 / 16, "fp8"), ignored, notes=(NVFP4_NOTE,))
    if algorithm == "FP8":
        return _Read("fp8", Held(1, "fp8"), ignored)
    raise inner.error("quant_algo", f"{algorithm!r} is not modelled; known: FP8, NVFP4")


def _compressed_tensors(config: Inner, plain: Held) -> _Read:
    sparsity = config.inner("sparsity_config").get("format", str)
    if sparsity not in (None, "dense"):
        raise config.error("sparsity_config", f"{sparsity!r} is not modelled")
    groups = config.object("config_groups")
    if not groups:
        raise config.error("config_groups", "missing")
    outer = config.inner("config_groups")
    found, only = [], list[str]()
    for name in groups:
        group = outer.inner(name)
        found.append(_compressed(group, plain))
        only += group.texts("targets")
    if any(read != found[0] for read in found):
        raise config.error("config_groups", f"{len(groups)} groups of different kinds are not modelled")
    return replace(found[0], ignored=config.texts("ignore"), only=[] if "Linear" in only else only, head=True)


def _compressed(group: Inner, plain: Held) -> _Read:
    weights, inputs = group.inner("weights"), group.inner("input_activations")
    bits, kind = weights.size("num_bits"), weights.get("type", str, "int")
    strategy, size = weights.get("strategy", str), weights.get("group_size", int) or 0
    computes = plain.computes
    if inputs.values:
        activations = f"{'fp' if inputs.get('type', str, 'int') == 'float' else 'int'}{inputs.size('num_bits')}"
        if activations not in ("fp8", "int8", "fp4"):
            raise inputs.error("num_bits", f"activations in {activations} are not modelled")
        computes = "fp8" if activations == "fp4" else activations
    if kind == "float" and bits == 8:
        block = weights.raw("block_structure")
        scales = 4 / (block[0] * block[1]) if strategy == "block" and isinstance(block, list) and len(block) == 2 else 0
        return _Read("fp8", Held(1 + scales, computes))
    if kind == "float" and bits == 4:
        fine = size == 16
        notes = (NVFP4_NOTE,) if computes == "fp8" else ()
        return _Read("nvfp4" if fine else "mxfp4", Held(0.5 + 1 / (size or 32), computes), notes=notes)
    if kind == "int":
        asymmetric = weights.get("symmetric", bool, True) is False
        return _integers(weights, "num_bits", size if strategy == "group" else 0, asymmetric, computes)
    raise weights.error("type", f"{kind!r} of {bits} bits is not modelled")


METHODS: dict[str, Callable[[Inner, Held], _Read]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}


def _kept(ignored: Iterable[str], layers: int, only: Sequence[str]) -> dict[str, float]:
    """The share of each part's matrices that patterns leave out."""
    leaves_out, quantises = [_matcher(pattern) for pattern in ignored], [_matcher(pattern) for pattern in only]
    shares = {}
    for part in PARTS:
        names = _names(part, layers) if leaves_out or quantises else []
        kept = sum(
            any(matches(each) for matches in leaves_out for each in spellings)
            or (bool(quantises) and not any(matches(each) for matches in quantises for each in spellings))
            for spellings in names
        )
        if kept:
            shares[part] = kept / len(names)
    return shares


def _names(part: str, layers: int) -> list[tuple[str, ...]]:
    """Every matrix of a part, under each of its names."""
    if part == "head":
        return [("lm_head",)]
    return [
        tuple(dict.fromkeys((f"model.layers.{layer}.{name}", f"model.layers.{layer}.{_other(name)}")))
        for layer in range(layers)
        for name in _MATRICES[part]
    ]


def _other(name: str) -> str:
    if ".experts." in name:
        for ours, theirs in _OTHER_NAMES:
            name = name.replace(ours, theirs)
    return name


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Make a test of whether a configuration leaves a module out, by its name or that of a module it is in.

    ``pattern`` is ``re:`` and an expression, a pattern with ``*``, or parts of a name.
    """
    if pattern.startswith("re:"):
        expression = re.compile(pattern[3:])
        return lambda name: expression.match(name) is not None
    if "*" in pattern:
        return lambda name: fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    return lambda name: f".{pattern}." in f".{name}."
