"""Kinds of layers that decoders are made of, with their shapes.

A layer is a mixer of tokens (attention or a recurrence), an MLP (dense, or experts), or both. From the shapes here follow
weights, KV and state; how long a layer takes is up to the cost models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Attention:
    """Softmax attention over cached keys and values; grouped where there are fewer KV heads than query heads."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    """Width of a head's values, which a few models have other than that of keys."""
    window: int | None = None
    """How many of the last tokens a token sees; None: all of them."""
    chunked: bool = False
    """Tokens see back to the last multiple of ``window`` instead (Llama 4)."""
    gated: bool = False
    """Queries come with a gate of the same size for what attention gives (Qwen3-Next)."""
    head_gates: bool = False
    """What a head gives is multiplied by one gate, of a projection of its own (Step 3.5)."""
    keys_are_values: bool = False
    """Values are the projected keys, before their norm (Gemma 4); both are cached."""
    normed_over_all: Literal["sums", "gathered"] | None = None
    """Queries and keys have a norm over all heads, for which GPUs that share the heads exchange their sums of squares, or
    the heads themselves."""
    vectors: int = 0
    """Elements of biases, norms of queries and keys, and sinks."""

    part = "attention"

    @property
    def described(self) -> str:
        """The kind in words."""
        seen = "" if self.window is None else f" in {'chunks' if self.chunked else 'a window'} of {self.window}"
        return f"attention of {self.heads} heads on {self.kv_heads} of KV{seen}"

    def matrices(self, hidden: int) -> dict[str, int]:
        """Elements of each weight matrix, by its name in a checkpoint."""
        found = {
            "self_attn.q_proj": hidden * self.heads * self.head_dim * (2 if self.gated else 1),
            "self_attn.k_proj": hidden * self.kv_heads * self.head_dim,
            "self_attn.v_proj": hidden * self.kv_heads * self.value_dim,
            "self_attn.o_proj": self.heads * self.value_dim * hidden,
        }
        if self.keys_are_values:
            del found["self_attn.v_proj"]
        if self.head_gates:
            found["self_attn.g_proj"] = hidden * self.heads
        return found

    def held_elements(self, hidden: int, tp: int) -> float:
        """Elements of the matrices on one of ``tp`` GPUs; KV heads are copied when there are fewer than GPUs."""
        copies = max(tp / self.kv_heads, 1)
        return sum(
            elements * (copies if name in ("self_attn.k_proj", "self_attn.v_proj") else 1) / tp
            for name, elements in self.matrices(hidden).items()
        )

    def kv_elements(self, tp: int) -> float:
        """Elements of KV a token on one GPU; heads are copied when there are fewer than GPUs."""
        return max(self.kv_heads / tp, 1) * (self.head_dim + self.value_dim)

    def unsplit(self, tp: int) -> str | None:
        """Name the heads that ``tp`` GPUs cannot share; with fewer KV heads than GPUs, neighbours hold the same one."""
        if self.heads % tp:
            return f"{self.heads} attention heads"
        shared = self.kv_heads % tp == 0 or tp % self.kv_heads == 0
        return None if shared else f"{self.kv_heads} KV heads"


@dataclass(frozen=True)
class Indexer:
    """The small attention that chooses which tokens sparse attention reads (DeepSeek-V3.2-Exp, section 2.1)."""

    heads: int
    head_dim: int


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, section 2.1), of all tokens or of those that an indexer chooses."""

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    topk: int | None = None
    """How many tokens a token attends to; None: all of them."""
    indexer: Indexer | None = None
    """None where nothing is chosen, or where the layer takes what one before it chose."""
    vectors: int = 0

    part = "attention"
    window = None

    @property
    def latent(self) -> int:
        """Elements that are kept of a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def described(self) -> str:
        """The kind in words."""
        chosen = (
            ""
            if self.topk is None
            else f" over {self.topk} tokens that {'one before it' if self.indexer is None else 'it'} chooses"
        )
        return f"latent attention of {self.heads} heads{chosen}"

    def matrices(self, hidden: int) -> dict[str, int]:
        """Elements of each weight matrix, by its name in a checkpoint."""
        query = self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        found = (
            {"self_attn.q_proj": hidden * query}
            if self.q_lora_rank is None
            else {"self_attn.q_a_proj": hidden * self.q_lora_rank, "self_attn.q_b_proj": self.q_lora_rank * query}
        )
        found |= {
            "self_attn.kv_a_proj_with_mqa": hidden * self.latent,
            "self_attn.kv_b_proj": self.kv_lora_rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim),
            "self_attn.o_proj": self.heads * self.v_head_dim * hidden,
        }
        if self.indexer is not None:
            found |= {
                "self_attn.indexer.wq_b": (self.q_lora_rank or hidden) * self.indexer.heads * self.indexer.head_dim,
                "self_attn.indexer.wk": hidden * self.indexer.head_dim,
                "self_attn.indexer.weights_proj": hidden * self.indexer.heads,
            }
        return found

    def held_elements(self, hidden: int, tp: int) -> float:
        """Elements of the matrices on one of ``tp`` GPUs: what has no heads is on each of them whole, and so is the
        indexer."""
        divided = ("self_attn.q_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj")
        return sum(elements / (tp if name in divided else 1) for name, elements in self.matrices(hidden).items())

    def kv_elements(self, tp: int) -> float:
        """Elements kept of a token on one GPU: a latent is never split."""
        return self.latent

    @property
    def index_bytes(self) -> int:
        """Bytes of the indexer's key of a token: 8 bits an element and 4 bytes of scale for each 128, whatever KV is in."""
        return 0 if self.indexer is None else self.indexer.head_dim + 4 * -(-self.indexer.head_dim // 128)

    def unsplit(self, tp: int) -> str | None:
        """Name the heads that ``tp`` GPUs cannot share."""
        return f"{self.heads} attention heads" if self.heads % tp else None


@dataclass(frozen=True)
class GatedDelta:
    """Linear attention by the gated delta rule (Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    state_bytes: int = 4
    """Of an element of the state."""

    part = "recurrent"

    @property
    def inner(self) -> int:
        """Width of what the recurrence gives."""
        return self.value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Channels that a short convolution runs over: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.inner

    @property
    def projected(self) -> int:
        """Elements a token that its projections write and read: what goes in, the gate, and what comes out."""
        return self.conv_channels + 2 * self.inner

    @property
    def vectors(self) -> int:
        """Elements of the convolution, decays, their biases, and the norm of a head."""
        return self.conv_channels * self.conv_kernel + 2 * self.value_heads + self.value_dim

    @property
    def state_elements(self) -> int:
        """Elements of a request's state: a matrix a value head."""
        return self.value_heads * self.key_dim * self.value_dim

    @property
    def described(self) -> str:
        """The kind in words."""
        return f"linear attention of {self.value_heads} heads"

    def matrices(self, hidden: int) -> dict[str, int]:
        """Elements of each weight matrix, by its name in a checkpoint."""
        return {
            "linear_attn.in_proj_qkv": hidden * self.conv_channels,
            "linear_attn.in_proj_z": hidden * self.inner,
            "linear_attn.in_proj_b": hidden * self.value_heads,
            "linear_attn.in_proj_a": hidden * self.value_heads,
            "linear_attn.out_proj": self.inner * hidden,
        }

    def held_elements(self, hidden: int, tp: int) -> float:
        """Elements of the matrices on one of ``tp`` GPUs."""
        return sum(self.matrices(hidden).values()) / tp

    def unsplit(self, tp: int) -> str | None:
        """Name the heads that ``tp`` GPUs cannot share."""
        for heads, what in ((self.key_heads, "key"), (self.value_heads, "value")):
            if heads % tp:
                return f"{heads} {what} heads of linear attention"
        return None


@dataclass(frozen=True)
class Mamba2:
    """A selective state space (Dao and Gu, "Transformers are SSMs", 2024)."""

    heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_kernel: int
    chunk: int
    """Tokens of a prompt that are computed together."""
    biases: int = 0
    """Elements of the biases of projections and convolution."""
    state_bytes: int = 4

    part = "recurrent"

    @property
    def inner(self) -> int:
        """Width of what is mixed."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that a short convolution runs over."""
        return self.inner + 2 * self.groups * self.state_size

    @property
    def projected(self) -> int:
        """Elements a token that its projections write and read: what goes in, the gate, and what comes out."""
        return self.conv_channels + 2 * self.inner

    @property
    def vectors(self) -> int:
        """Elements of the convolution, the gated norm, decays, steps and skips of heads, and biases."""
        return self.conv_channels * self.conv_kernel + self.inner + 3 * self.heads + self.biases

    @property
    def state_elements(self) -> int:
        """Elements of a request's state."""
        return self.inner * self.state_size

    @property
    def described(self) -> str:
        """The kind in words."""
        return f"state space of {self.heads} heads"

    def matrices(self, hidden: int) -> dict[str, int]:
        """Elements of each weight matrix, by its name in a checkpoint."""
        return {
            "mixer.in_proj": hidden * (self.inner + self.conv_channels + self.heads),
            "mixer.out_proj": self.inner * hidden,
        }

    def held_elements(self, hidden: int, tp: int) -> float:
        """Elements of the matrices on one of ``tp`` GPUs; groups are copied when there are fewer."""
        copied = 2 * self.state_size * (max(self.groups / tp, 1) - self.groups / tp)
        return sum(self.matrices(hidden).values()) / tp + hidden * copied

    def unsplit(self, tp: int) -> str | None:
        """Name the heads that ``tp`` GPUs cannot share; groups are copied when there are fewer than GPUs."""
        if self.heads % tp:
            return f"{self.heads} state-space heads"
        shared = self.groups % tp == 0 or tp % self.groups == 0
        return None if shared else f"{self.groups} state-space groups"


Recurrent = GatedDelta | Mamba2
Mixer = Attention | Latent | Recurrent


@dataclass(frozen=True)
class Dense:
    """An MLP that every token passes through."""

    width: int
    gated: bool = True
    vectors: int = 0

    @property
    def described(self) -> str:
        """The kind in words."""
        return f"MLP of {self.width}"

    def matrices(self, hidden: int) -> dict[str, int]:
        """Elements of each weight matrix, by its name in a checkpoint."""
        return _mlp("mlp", hidden, self.width, self.gated)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, with those that all tokens share."""

    count: int
    per_token: int
    width: int
    shared_width: int = 0
    """Inner width of all shared experts together."""
    gated: bool = True
    latent: int | None = None
    """Width that tokens are brought to before their experts, and back from after (Nemotron 3); None: as they are."""
    dense_width: int = 0
    """Inner width of a dense MLP that runs beside the experts (Gemma 4)."""
    vectors: int = 0
    name: str = "mlp.experts"
    """What a checkpoint calls them."""

    @property
    def described(self) -> str:
        """The kind in words."""
        return f"{self.per_token} of {self.count} experts of {self.width}"

    def expert(self, hidden: int) -> int:
        """Elements of one routed expert."""
        return sum(_mlp("", self.latent or hidden, self.width, self.gated).values())

    def shared(self, hidden: int) -> int:
        """Elements of what all tokens pass through: shared experts, and the way to a latent width and back."""
        return sum(self.shared_matrices(hidden).values())

    def shared_matrices(self, hidden: int) -> dict[str, int]:
        """Elements of each matrix that all tokens pass through, by its name in a checkpoint."""
        found = _mlp("mlp.shared_experts", hidden, self.shared_width, self.gated) if self.shared_width else {}
        if self.dense_width:
            found |= _mlp("mlp", hidden, self.dense_width, self.gated)
        if self.latent is not None:
            found |= {"mlp.fc1_latent_proj": hidden * self.latent, "mlp.fc2_latent_proj": self.latent * hidden}
        return found

    def expert_matrices(self, hidden: int) -> dict[str, int]:
        """Elements of each matrix of the first expert, by its name in a checkpoint."""
        return _mlp(f"{self.name}.0", self.latent or hidden, self.width, self.gated)

    def router(self, hidden: int) -> int:
        """Elements of the router, which is never quantised."""
        return hidden * self.count


MLP = Dense | Experts


def _mlp(where: str, hidden: int, width: int, gated: bool) -> dict[str, int]:
    names = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
    return {f"{where}.{name}": hidden * width for name in names}


@dataclass(frozen=True)
class Layer:
    """A mixer, an MLP, or both one after the other."""

    mixer: Mixer | None
    mlp: MLP | None
    vectors: int = 0
    """Elements of the norms around them."""

    def parameters(self, hidden: int, *, active: bool = False) -> int:
        """Elements of everything; ``active`` counts the experts that one token uses only."""
        return self.all_vectors + sum(self.elements(hidden, active=active).values())

    def elements(self, hidden: int, *, active: bool = False) -> dict[str, int]:
        """Elements of all matrices by the part of a model they are of, and of the router; ``active`` as above."""
        found = {part: sum(matrices.values()) for part, matrices in self.matrices(hidden).items()}
        if isinstance(self.mlp, Experts):
            found["experts"] *= self.mlp.per_token if active else self.mlp.count
            found["router"] = self.mlp.router(hidden)
        return found

    @property
    def all_vectors(self) -> int:
        """Elements of everything that is no matrix: norms, biases, convolutions."""
        return self.vectors + sum(each.vectors for each in (self.mixer, self.mlp) if each is not None)

    def matrices(self, hidden: int) -> Mapping[str, Mapping[str, int]]:
        """Elements of matrices by the part of a model they are of; experts stand for all by the first."""
        found: dict[str, dict[str, int]] = {}
        if self.mixer is not None:
            found[self.mixer.part] = self.mixer.matrices(hidden)
        if isinstance(self.mlp, Dense):
            found["mlp"] = self.mlp.matrices(hidden)
        elif isinstance(self.mlp, Experts):
            found["experts"] = self.mlp.expert_matrices(hidden)
            if shared := self.mlp.shared_matrices(hidden):
                found["shared_experts"] = shared
        return found


@dataclass(frozen=True)
class Stack:
    """All layers of a model, and the vectors outside of them."""

    layers: tuple[Layer, ...]
    vectors: int
    """Elements of the norm after the last layer, and of a bias of the output projection."""
