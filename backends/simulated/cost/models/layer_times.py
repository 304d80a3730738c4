"""Roofline times of what one kind of layer does with the tokens before: attention of every sort, and recurrences.

Each class has ``written_bytes``, what a token leaves in memory; ``overhead_s`` of a layer that only decodes and
``prompt_overhead_s`` of one with prompts; ``prompts_s`` and ``decodes_s``; and ``steps_s``, decodes but for their contexts.
All are of one layer on one GPU.
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
    """What a GPU reaches in one kind of attention, or in recurrences."""

    flops: float
    """Of prompts."""
    decode_flops: float
    bandwidth: float
    """Of KV that decodes read."""
    prompt_bandwidth: float
    """Of what prompts read and write: queries, keys, values and what comes out."""
    index_flops: float
    """Of scores in 8 bits, where the GPU has them."""
    overhead_s: float
    """Seconds of a layer that only decodes, whatever it does."""
    prompt_overhead_s: float
    """Seconds of a layer with prompts, whatever it does."""
    kernel_s: float
    """Seconds of each kernel beside attention's."""
    head_s: float
    """Seconds of a decode for each request and KV head."""

    @classmethod
    def of(cls, gpu: GPU, mixer: Attention | Latent | Recurrent, kv_dtype: str) -> Rates:
        """Return the rates of a GPU for a kind of layer."""
        prompts = decodes = gpu.attention_efficiency
        moved = gpu.prompt_memory_efficiency
        eight_bits = kv_dtype in ("fp8", "int8")
        kv = gpu.kv8_efficiency if eight_bits else gpu.kv_efficiency
        overhead_s = gpu.kv8_overhead_s if eight_bits else gpu.attention_overhead_s
        if isinstance(mixer, Latent):
            prompts, decodes, kv = gpu.latent_attention_efficiency, gpu.latent_flops_efficiency, gpu.latent_efficiency
            overhead_s, moved = gpu.latent_overhead_s, gpu.latent_prompt_memory_efficiency
        elif isinstance(mixer, Attention) and mixer.kv_heads == mixer.heads:
            prompts = decodes = gpu.mha_attention_efficiency
            moved = gpu.mha_prompt_memory_efficiency
            kv = gpu.mha8_efficiency if eight_bits else gpu.mha_efficiency
        elif isinstance(mixer, Recurrent):
            kv, overhead_s = gpu.kv_efficiency, gpu.attention_overhead_s
        return cls(
            gpu.bf16_flops * prompts,
            gpu.bf16_flops * decodes,
            gpu.memory_bandwidth * kv,
            gpu.memory_bandwidth * moved,
            gpu.flops_for("fp8") * gpu.attention_efficiency,
            overhead_s,
            gpu.prompt_overhead_s,
            gpu.kernel_overhead_s,
            gpu.attention_head_overhead_s,
        )

    def prompt_s(self, flops: float, read_bytes: float) -> float:
        """Seconds of a prompt's arithmetic in 16 bits or of reading the KV before it, whichever takes longer."""
        return max(flops / self.flops, read_bytes / self.bandwidth)

    def decode_s(self, flops: float, read_bytes: float) -> float:
        """Seconds of a decode's arithmetic in 16 bits or of reading KV, whichever takes longer."""
        return max(flops / self.decode_flops, read_bytes / self.bandwidth)


class AttentionTimes:
    """Softmax attention: two products of a query's head with every key and value that it sees, each of which is read once.

    ``4 * heads * head_dim`` FLOPs a pair of query and key, ``kv_heads * 2 * head_dim`` elements a key (Dao,
    "FlashAttention-2", 2023, section 4). With a window position p sees ``min(p + 1, window)`` tokens, in chunks
    ``p mod chunk + 1``.

    Beside, every token of a prompt has its queries, keys and values read and what comes out written, which overlaps with
    little; and every decode has a block of work for each KV head that starts, ends and is merged with others.
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
        widths = self._prefill_flops / 2 / heads
        kv_heads = heads if isinstance(mixer, Latent) else max(mixer.kv_heads / tp, 1)
        self._token_s = (heads + kv_heads) * widths * ACTIVATION_BYTES / rates.prompt_bandwidth
        """Seconds for each token of a prompt, whatever it sees."""
        blocks = 1 if isinstance(mixer, Latent) else kv_heads
        out_bytes = self._decode_flops / 2 * ACTIVATION_BYTES
        self._request_s = blocks * rates.head_s + out_bytes / rates.bandwidth
        """Seconds for each decode, whatever it sees."""
        self.context_s = rates.decode_s(self._decode_flops, self._kv_bytes)
        """Seconds for each token of context that a decode sees."""
        self.linear = self._window is None
        """A decode takes :attr:`context_s` for each token of its context."""
        self.overhead_s, self.prompt_overhead_s = rates.overhead_s, rates.prompt_overhead_s

    def pairs_s(self, pairs: float, tokens: float, read_tokens: float) -> float:
        """Prompts of so many ``tokens``: ``pairs`` of query and key, over ``read_tokens`` of KV."""
        return self._rates.prompt_s(self._prefill_flops * pairs, read_tokens * self._kv_bytes) + tokens * self._token_s

    def steps_s(self, requests: int) -> float:
        """Decodes of so many requests, but for the contexts that they see."""
        return requests * self._request_s

    def prompts_s(self, new: np.ndarray, context: np.ndarray) -> float:
        """Prompts with ``new`` tokens, at the end of as much context."""
        if self._window is None:
            # Whole numbers, so exact; and prompts are few: numpy would take longer.
            tokens, ends = new.tolist(), context.tolist()
            pairs = float(sum(n * (end - n) + n * (n + 1) // 2 for n, end in zip(tokens, ends, strict=True)))
            return self.pairs_s(pairs, float(sum(tokens)), float(sum(ends)))
        before, count = context - new, float(new.sum())
        if self._chunked:
            pairs = float((_sawtooth(context, self._window) - _sawtooth(before, self._window)).sum())
            return self.pairs_s(pairs, count, float((new + before % self._window).sum()))
        pairs = float((_triangle(context, self._window) - _triangle(before, self._window)).sum())
        return self.pairs_s(pairs, count, float((new + before.clip(max=self._window)).sum()))

    def decodes_s(self, context: np.ndarray, total: float) -> float:
        """Decodes at these contexts, ``total`` in all."""
        if self._window is None:
            return total * self.context_s + self.steps_s(len(context))
        seen = (context - 1) % self._window + 1 if self._chunked else context.clip(max=self._window)
        return float(seen.sum()) * self.context_s + self.steps_s(len(context))


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
            self._index_flops = 2 * mixer.indexer.heads * mixer.indexer.head_dim
            self.overhead_s += 2 * rates.kernel_s
            self.prompt_overhead_s += 2 * rates.kernel_s

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
        tokens = float(new.sum())
        sparse_s = self._rates.decode_s(self._decode_flops * chosen, read * self._kv_bytes) + tokens * self._request_s
        return min(sparse_s, self.pairs_s(every, tokens, read)) + self._index_s(every, read)

    def decodes_s(self, context: np.ndarray, total: float) -> float:
        """Decodes at these contexts, ``total`` in all."""
        chosen_s = float(context.clip(max=self._topk).sum()) * self.context_s
        return chosen_s + self.steps_s(len(context)) + self._index_s(total, total)


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
            kernels = 5
        else:
            chunk = mixer.chunk
            flops = 2 * chunk * (mixer.groups * mixer.state_size + mixer.inner) + 4 * mixer.inner * mixer.state_size
            # Beside attention's kernel: the convolution, sums of steps, products within chunks, states.
            kernels = 4
        self.overhead_s = self.prompt_overhead_s = rates.overhead_s + kernels * rates.kernel_s
        self._token_flops = flops / tp
        activations = 2 * (mixer.conv_channels + mixer.inner) * ACTIVATION_BYTES
        self._token_bytes = (activations + 2 * mixer.state_elements * ACTIVATION_BYTES / chunk) / tp
        self._decode_bytes = 2 * layer_state_bytes(mixer, tp) + activations / tp

    def prompts_s(self, new: np.ndarray, context: np.ndarray) -> float:
        """Prompts with ``new`` tokens; what came before is in their states."""
        tokens = float(new.sum())
        states = len(new) * self._decode_bytes
        return self._rates.prompt_s(tokens * self._token_flops, tokens * self._token_bytes + states)

    def decodes_s(self, context: np.ndarray, total: float) -> float:
        """Decodes, whatever their contexts."""
        return self.steps_s(len(context))

    def steps_s(self, requests: int) -> float:
        """Decodes of so many requests."""
        return requests * self._decode_bytes / self._rates.bandwidth


MixerTimes = AttentionTimes | RecurrentTimes


def times_of(mixer: Attention | Latent | Recurrent, kv_dtype: str, tp: int, gpu: GPU) -> MixerTimes:
    """Return the times of one kind of layer."""
    rates = Rates.of(gpu, mixer, kv_dtype)
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
