"""GGUF files of the supported families: their metadata as the fields of a config.json, their tensors one at a time.

The header is parsed here: the package ``gguf`` builds an object for every token of the vocabulary, which takes seconds.
Quantised tensors are dequantised by that package as they are read, so a model takes as much memory as its dtype says.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backends.torch.model_config import Fields, UnsupportedModel

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
"""``general.architecture`` and who runs it. Mistral is stored as llama; llama with experts is Mixtral."""

TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
IGNORED = ("rope_freqs.weight",)
"""Read into the configuration, not into a parameter."""


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata values, as letters of :mod:`struct`."""
STRING, ARRAY = 8, 9
PLAIN: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 28: np.dtype("<f8")}
"""Types of tensors that are not quantised."""
BF16 = 30


class Stored(NamedTuple):
    """One tensor of the file."""

    shape: tuple[int, ...]
    """As torch has it, rows first."""
    kind: int
    """Of ``GGMLQuantizationType``."""
    offset: int
    """Bytes from the start of the data."""


class _Header:
    """Reader of a mapped file's header, from front to back."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, letter: str) -> Any:
        """One little-endian number."""
        size = struct.calcsize(letter)
        (value,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += size
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A metadata value; an array as its length alone: the arrays are the tokenizer's, which transformers reads."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in SCALARS:
            self.at += count * struct.calcsize(SCALARS[inner])
        elif inner == STRING:
            at = self.at
            for _ in range(count):
                at += 8 + struct.unpack_from("<Q", self.data, at)[0]
            self.at = at
        else:
            for _ in range(count):
                self.value(inner)
        return Array(count)


class Array(NamedTuple):
    """A metadata array that was passed over."""

    length: int


class GGUFFile:
    """One open GGUF file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Open a GGUF file. Raises UnsupportedModel where it is none of version 2 or 3."""
        self.path = path
        self.values: dict[str, Any] = {}
        self.stored: dict[str, Stored] = {}
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = _Header(self.data)
            magic, version = header.data[:4], struct.unpack_from("<I", header.data, 4)[0]
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"it begins with {magic!r}, version {version}")
            header.at = 8
            tensors, values = header.scalar("Q"), header.scalar("Q")
            for _ in range(values):
                key = header.text()
                self.values[key] = header.value(header.scalar("I"))
            for _ in range(tensors):
                name = header.text()
                shape = [header.scalar("Q") for _ in range(header.scalar("I"))]
                self.stored[name] = Stored(tuple(reversed(shape)), header.scalar("I"), header.scalar("Q"))
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise UnsupportedModel(f"{path}: not a GGUF file that can be read ({error})") from None
        alignment = self.value("general.alignment", 32)
        self.start = -(-header.at // alignment) * alignment

    def value(self, key: str, default: Any = None) -> Any:
        """One metadata value, or ``default`` where there is none."""
        return self.values.get(key, default)

    def fields(self) -> Fields:
        """The metadata under the names of config.json. Raises UnsupportedModel."""
        name = str(self.path)
        arch = self.value("general.architecture")
        if arch not in ARCHITECTURES:
            raise UnsupportedModel(f"{name}: general.architecture is {arch!r}; supported: {', '.join(ARCHITECTURES)}")
        if "token_embd.weight" not in self.stored:
            raise UnsupportedModel(f"{name}: tensor token_embd.weight is missing")

        def own(key: str) -> Any:
            return self.value(f"{arch}.{key}")

        experts = own("expert_count") or 0
        heads, hidden = own("attention.head_count"), own("embedding_length")
        if not isinstance(heads, int) or not isinstance(own("attention.head_count_kv") or heads, int):
            raise UnsupportedModel(f"{name}: {arch}.attention.head_count must be one number for all layers")
        if own("attention.sliding_window"):
            raise UnsupportedModel(f"{name}: {arch}.attention.sliding_window in a GGUF file is not supported")
        head_dim = own("attention.key_length") or (hidden // heads if hidden else None)
        for key in ("attention.value_length", "rope.dimension_count"):
            if own(key) not in (None, head_dim):
                raise UnsupportedModel(f"{name}: {arch}.{key} is {own(key)}, supported: the head size, {head_dim}")
        eos = [self.value(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        values = {
            "architectures": ["MixtralForCausalLM" if arch == "llama" and experts else ARCHITECTURES[arch]],
            "hidden_size": hidden,
            "num_hidden_layers": own("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": own("attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "intermediate_size": own("feed_forward_length") or own("expert_feed_forward_length"),
            "vocab_size": self.stored["token_embd.weight"].shape[0],
            "max_position_embeddings": own("context_length"),
            "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
            "rope_theta": own("rope.freq_base") or 10_000.0,
            "rope_scaling": self._rope_scaling(str(arch)),
            "sliding_window": None,
            "tie_word_embeddings": "output.weight" not in self.stored,
            "attention_bias": "blk.0.attn_q.bias" in self.stored,
            "mlp_bias": "blk.0.ffn_up.bias" in self.stored,
            "num_experts": experts or None,
            "num_local_experts": experts or None,
            "num_experts_per_tok": own("expert_used_count"),
            "moe_intermediate_size": own("expert_feed_forward_length"),
            "norm_topk_prob": True,  # llama.cpp has no key for it: it always renormalises these families
            "eos_token_id": [i for i in eos if i is not None],
        }
        return Fields(values, name)

    def _rope_scaling(self, arch: str) -> dict[str, Any] | None:
        name = str(self.path)
        kind = self.value(f"{arch}.rope.scaling.type", "none")
        factor = self.value(f"{arch}.rope.scaling.factor", self.value(f"{arch}.rope.scale_linear", 1.0))
        if "rope_freqs.weight" in self.stored:
            if kind != "none":
                raise UnsupportedModel(
                    f"{name}: rope_freqs.weight together with rope scaling {kind!r} is not supported"
                )
            return {"rope_type": "divisors", "divisors": self._dequantized("rope_freqs.weight").tolist()}
        if kind == "yarn":
            if self.value(f"{arch}.rope.scaling.attn_factor", 1.0) != 1.0:
                raise UnsupportedModel(f"{name}: {arch}.rope.scaling.attn_factor is not supported")
            original = self.value(f"{arch}.rope.scaling.original_context_length")
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if kind not in ("none", "linear"):
            raise UnsupportedModel(f"{name}: {arch}.rope.scaling.type is {kind!r}; supported: none, linear, yarn")
        return {"rope_type": "linear", "factor": factor} if factor not in (0, 1) else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, float32 tensor), one at a time; an expert is a tensor of its own.

        Raises UnsupportedModel for a tensor of a name or a quantisation that is not known.
        """
        for name in self.stored:
            if name not in IGNORED:
                yield from self._converted(name)

    def _converted(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """One tensor of the file as the tensors it is in a Hugging Face checkpoint."""
        stem, _, kind = name.rpartition(".")
        if stem in TOP:
            yield f"{TOP[stem]}.{kind}", self._dequantized(name)
            return
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match is None or (match[2] not in BLOCK and match[2] not in EXPERTS):
            raise UnsupportedModel(f"{self.path}: tensor {name} is not known")
        layer, part = f"model.layers.{match[1]}", match[2]
        if part in EXPERTS:
            for i, expert in enumerate(self._dequantized(name)):
                yield f"{layer}.mlp.experts.{i}.{EXPERTS[part]}.{kind}", expert
        elif part in ("attn_q", "attn_k") and self.value("general.architecture") == "llama":
            heads = self.value("llama.attention.head_count")
            if part == "attn_k":
                heads = self.value("llama.attention.head_count_kv", heads)
            yield f"{layer}.{BLOCK[part]}.{kind}", _unpermute(self._dequantized(name), heads)
        else:
            yield f"{layer}.{BLOCK[part]}.{kind}", self._dequantized(name)

    def _dequantized(self, name: str) -> Tensor:
        """A tensor of the file, in float32. Raises UnsupportedModel."""
        stored = self.stored[name]
        begin, count = self.start + stored.offset, int(np.prod(stored.shape))
        if stored.kind in PLAIN or stored.kind == BF16:
            dtype = PLAIN.get(stored.kind, np.dtype("<u2"))
            raw = self._bytes(name, begin, count * dtype.itemsize).view(dtype)
            if stored.kind == BF16:  # the upper half of a float32
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            return torch.from_numpy(raw.astype(np.float32)).view(stored.shape)
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
        except ImportError:
            raise UnsupportedModel(f"{self.path}: quantised tensors need the package gguf (pip install gguf)") from None
        try:
            kind = GGMLQuantizationType(stored.kind)
            block, size = GGML_QUANT_SIZES[kind]
            rows = self._bytes(name, begin, count // block * size).reshape(-1, stored.shape[-1] // block * size)
            return torch.from_numpy(dequantize(rows, kind)).view(stored.shape)
        except (NotImplementedError, KeyError, ValueError) as error:
            raise UnsupportedModel(f"{self.path}: tensor {name} cannot be dequantised ({error})") from None

    def _bytes(self, name: str, begin: int, size: int) -> np.ndarray:
        if begin + size > len(self.data):
            raise UnsupportedModel(f"{self.path}: ends before tensor {name} does")
        return np.frombuffer(self.data, np.uint8, size, begin)


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """llama.cpp stores Llama's queries and keys for rotation of neighbouring pairs; Hugging Face rotates halves."""
    rows = tensor.shape[0]
    return tensor.view(heads, rows // heads // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
