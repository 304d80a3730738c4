"""Roofline times of what one kind of layer does with the tokens before: attention of every sort, and recurrences.

Each class has ``written_bytes``, what a token leaves in memory, ``kernels`` beside those of plain attention, and two times:
of prompts' tokens and of decodes. All are of one layer on one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.checkpoint.layer_kinds import Attention, GatedDelta, Latent, Recurrent
from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.catalogue.model_specs import layer_kv_bytes, layer_state_bytes
from backends.simulated.cost.models.communication import ACTIVATION_BYTES

DELTA_CHUNK = 64
"""Tokens of a prompt that kernels of the gated delta rule compute together (flash-linear-attention's)."""


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches in attention."""

    flops: float
    bandwidth: float
    index_flops: float
    """Of scores in 8 bits, where the GPU has them."""

    @classmethod
    def of(cls, gpu: GPU) -> Rates:
        """Return the rates of a GPU."""
        return cls(
            gpu.bf16_flops * gpu.attention_efficiency,
            gpu.memory_bandwidth * gpu.kv_efficiency,
            gpu.flops_for("fp8") * gpu.attention_efficiency,
        )

    def longer_s(self, flops: float, traffic_bytes: float) -> float:
        """Seconds of arithmetic in 16 bits or of its memory traffic, whichever takes longer."""
        return max(flops / self.flops, traffic_bytes / self.bandwidth)


class AttentionTimes:
    """Softmax attention: two products of a query's head with every key and value that it sees, each of which is read once.

    ``4 * heads * head_dim`` FLOPs a pair of query and key, ``kv_heads * 2 * head_dim`` elements a key (Dao,
    "FlashAttention-2", 2023, section 4). With a window position p sees ``min(p + 1, window)`` tokens, in chunks
    ``p mod chunk + 1``.
    """

    def __init__(self, mixer: Attention | Latent, kv_dtype: str, tp: int, rates: Rates) -> None:
        self._rates, self._window = rates, mixer.window
        self._chunked = isinstance(mixer, Attention) and mixer.chunked
        self._kv_bytes = self.written_bytes = layer_kv_bytes(mixer, kv_dtype, tp)
        heads = max(mixer.heads / tp, 1)
        if isinstance(mixer, Latent):
            self._kv_bytes -= mixer.index_bytes  # which only the indexer reads
            # Absorbed decode: scores against the latent and rotary parts, values out of the latent (DeepSeek-V2, 2.1).
            self._decode_flops = 2 * heads * (mixer.latent + mixer.kv_lora_rank)
            self._prefill_flops = 2 * heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim + mixer.v_head_dim)
        else:
            self._decode_flops = self._prefill_flops = 2 * heads * (mixer.head_dim + mixer.value_dim)
        self.context_s = rates.longer_s(self._decode_flops, self._kv_bytes)
        """Seconds for each token of context that a decode sees."""
        self.linear = self._window is None
        """A decode takes :attr:`context_s` for each token of its context."""
        self.kernels = 0

    def pairs_s(self, pairs: float, read_tokens: float) -> float:
        """Prompts: ``pairs`` of query and key, over ``read_tokens`` of KV."""
        return self._rates.longer_s(self._prefill_flops * pairs, read_tokens * self._kv_bytes)

    def prompts_s(self, new: np.ndarray, context: np.ndarray) -> float:
        """Prompts with ``new`` tokens, at the end of as much context."""
        if self._window is None:
            # Whole numbers, so exact; and prompts are few: numpy would take longer.
            lens = list(zip(new.tolist(), context.tolist(), strict=True))
            pairs = float(sum(n * (end - n) + n * (n + 1) // 2 for n, end in lens))
            return self.pairs_s(pairs, float(sum(end for _, end in lens)))
        before = context - new
        if self._chunked:
            pairs = float((_sawtooth(context, self._window) - _sawtooth(before, self._window)).sum())
            return self.pairs_s(pairs, float((new + before % self._window).sum()))
        pairs = float((_triangle(context, self._window) - _triangle(before, self._window)).sum())
        return self.pairs_s(pairs, float((new + before.clip(max=self._window)).sum()))

    def decodes_s(self, context: np.ndarray, total: float) -> float:
        """Decodes at these contexts, ``total`` in all."""
        if self._window is None:
            return total * self.context_s
        seen = (context - 1) % self._window + 1 if self._chunked else context.clip(max=self._window)
        return float(seen.sum()) * self.context_s


class SparseTimes(AttentionTimes):
    """Sparse attention over latents: an indexer scores every token before in 8 bits, and ``topk`` of them are attended to.

    ``2 * index_heads * index_dim`` FLOPs a pair of query and key, and one key of the indexer read for each
    (DeepSeek-V3.2-Exp, section 2.1, equation 1); then latent attention over ``min(p + 1, topk)`` tokens, absorbed in
    prompts, too. A prompt for which dense attention is shorter takes that (masked MHA for short prompts, section 2.3). A
    layer that takes what one before it chose has no indexer.
    """

    def __init__(self, mixer: Latent, kv_dtype: str, tp: int, rates: Rates) -> None:
        super().__init__(mixer, kv_dtype, tp, rates)
        assert mixer.topk is not None
        self._topk = mixer.topk
        self.linear = False
        self._index_bytes, self._index_flops = mixer.index_bytes, 0
        if mixer.indexer is not None:
            # Every GPU of a tensor-parallel group scores with all heads of the indexer. One kernel scores, one chooses.
            self._index_flops, self.kernels = 2 * mixer.indexer.heads * mixer.indexer.head_dim, 2

    def _index_s(self, pairs: float, read_tokens: float) -> float:
        return max(
            self._index_flops * pairs / self._rates.index_flops, read_tokens * self._index_bytes / self._rates.bandwidth
        )

    def prompts_s(self, new: np.ndarray, context: np.ndarray) -> float:
        """Prompts with ``new`` tokens, at the end of as much context."""
        before = context - new
        every = float((_triangle(context, 2**62) - _triangle(before, 2**62)).sum())
        chosen = float((_triangle(context, self._topk) - _triangle(before, self._topk)).sum())
        read = float(context.sum())
        sparse_s = self._rates.longer_s(self._decode_flops * chosen, read * self._kv_bytes)
        return min(sparse_s, self.pairs_s(every, read)) + self._index_s(every, read)

    def decodes_s(self, context: np.ndarray, total: float) -> float:
        """Decodes at these contexts, ``total`` in all."""
        return float(context.clip(max=self._topk).sum()) * self.context_s + self._index_s(total, total)


class RecurrentTimes:
    """Recurrences: a decode reads and writes its state once; a prompt's tokens are computed in chunks of matrix products.

    Gated delta rule (Yang, Kautz and Hatamizadeh, "Gated Delta Networks", 2024, section 3.3), a value head and token, with
    chunks of C tokens: ``2 C (3 key_dim + 2 value_dim)`` FLOPs within a chunk (products of keys and of queries with keys,
    their inverse applied to keys and values, the result), ``6 key_dim value_dim`` with the state.
    State space (Dao and Gu, "Transformers are SSMs", 2024, section 6), a token: ``2 C (groups state + inner)`` FLOPs within
    a chunk, ``4 inner state`` to and from the state. Both write a state a chunk and read it again.
    """

    linear = True
    context_s = 0.0
    written_bytes = 0.0

    def __init__(self, mixer: Recurrent, tp: int, rates: Rates) -> None:
        self._rates = rates
        if isinstance(mixer, GatedDelta):
            chunk, k, v = DELTA_CHUNK, mixer.key_dim, mixer.value_dim
            flops = mixer.value_heads * (2 * chunk * (3 * k + 2 * v) + 6 * k * v)
            # Beside attention's kernel: the convolution, decays, the inverse, keys and values, states.
            self.kernels = 5
        else:
            chunk = mixer.chunk
            flops = 2 * chunk * (mixer.groups * mixer.state_size + mixer.inner) + 4 * mixer.inner * mixer.state_size
            # Beside attention's kernel: the convolution, sums of steps, products within chunks, states.
            self.kernels = 4
        self._token_flops = flops / tp
        activations = 2 * (mixer.conv_channels + mixer.inner) * ACTIVATION_BYTES
        self._token_bytes = (activations + 2 * mixer.state_elements * ACTIVATION_BYTES / chunk) / tp
        self._decode_bytes = 2 * layer_state_bytes(mixer, tp) + activations / tp

    def prompts_s(self, new: np.ndarray, context: np.ndarray) -> float:
        """Prompts with ``new`` tokens; what came before is in their states."""
        tokens = float(new.sum())
        states = len(new) * self._decode_bytes
        return self._rates.longer_s(tokens * self._token_flops, tokens * self._token_bytes + states)

    def decodes_s(self, context: np.ndarray, total: float) -> float:
        """Decodes, whatever their contexts."""
        return self.steps_s(len(context))

    def steps_s(self, requests: int) -> float:
        """Decodes of so many requests."""
        return requests * self._decode_bytes / self._rates.bandwidth


MixerTimes = AttentionTimes | RecurrentTimes


def times_of(mixer: Attention | Latent | Recurrent, kv_dtype: str, tp: int, rates: Rates) -> MixerTimes:
    """Return the times of one kind of layer."""
    if isinstance(mixer, Recurrent):
        return RecurrentTimes(mixer, tp, rates)
    if isinstance(mixer, Latent) and mixer.topk is not None:
        return SparseTimes(mixer, kv_dtype, tp, rates)
    return AttentionTimes(mixer, kv_dtype, tp, rates)


def _triangle(length: np.ndarray, window: int) -> np.ndarray:
    """Sum over positions p < length of min(p + 1, window), elementwise."""
    head = length.clip(max=window)
    found: np.ndarray = head * (head + 1) / 2 + (length - head) * window
    return found


def _sawtooth(length: np.ndarray, chunk: int) -> np.ndarray:
    """Sum over positions p < length of p mod chunk + 1, elementwise."""
    whole, rest = length // chunk, length % chunk
    found: np.ndarray = whole * (chunk * (chunk + 1) / 2) + rest * (rest + 1) / 2
    return found
