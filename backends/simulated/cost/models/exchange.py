"""How tokens reach experts on other GPUs and their results come back: what is exchanged, by the way of doing so.

Ranks are data-parallel instances of ``tp`` GPUs each, whose experts lie on all of them. Sources: vLLM's
``distributed/device_communicators/all2all.py``, SGLang's ``layers/dp_attention.py``, DeepEP's README.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from backends.checkpoint.layer_kinds import Experts
from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.cost.models.communication import (
    ACTIVATION_BYTES,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    uneven_all_gather_s,
)
from backends.simulated.cost.models.expert_loads import imbalance
from backends.simulated.cost.models.operator_tables import Grid

Kind = Literal[
    "all-to-all", "allgather-reducescatter", "naive", "sum-or-max", "deepep-normal", "deepep-low-latency", "deepep"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCALE_BLOCK = 128
"""Elements of a hidden state that share a scale (4 bytes) where they travel in 8 bits."""
LOW_LATENCY_TOKENS = 256
"""Tokens of a rank that a low-latency kernel takes at once; more go in several (VLLM_MOE_DP_CHUNK_SIZE)."""


@dataclass(frozen=True)
class ExchangeRule:
    """What is an engine's own in the exchange."""

    pads: Literal["own", "graphs", "always"] = "own"
    """When all ranks compute as many tokens as the largest: ``own`` where all replay a graph of decodes, ``graphs`` where
    all replay some graph (the least able rank decides, and without one none pads), ``always``."""
    sends: Literal["logits", "choices"] = "choices"
    """What travels with a token: the router's logits, or the experts chosen and their weights."""
    quantised: bool = False
    """Where experts compute in 8 bits, hidden states travel in as many, with the experts chosen."""
    prompts_summed: bool = True
    """``sum-or-max``: whether a rank's prompts decide for the sum, or only what would be moved."""


class Exchange:
    """Seconds that the exchange of one layer of experts takes."""

    def __init__(
        self, kind: Kind, rule: ExchangeRule, gpu: GPU, tp: int, eight_bits: bool = False, skew: float = 0.0
    ) -> None:
        """``eight_bits``: whether experts compute in as many; ``skew``: how unevenly tokens fall on them."""
        self.kind, self.rule = kind, rule
        self._gpu, self._tp = gpu, tp
        self._eight_bits = eight_bits
        self.skew = skew
        self.gather: Grid | None = None
        """Measured all-gathers over all GPUs by (bytes of the whole message,), in place of what the links say."""
        self.scatter: Grid | None = None
        """Reduce-scatters."""

    def seconds(self, experts: Experts, hidden: int, tokens: Sequence[int], prompts: bool) -> float:
        """Sending the ``tokens`` of each rank to their experts, and the results back. ``prompts``: whether any rank has
        some."""
        if len(tokens) * self._tp == 1:
            return 0.0
        kind = self.kind
        if kind == "deepep":
            kind = "deepep-normal" if prompts else "deepep-low-latency"
        width = experts.latent or hidden
        seconds = _WAYS[kind](self, experts, width, tokens, prompts)
        if kind not in ("naive", "sum-or-max") and (len(tokens) > 1 or kind != "all-to-all"):
            # The GPUs of a rank had a part of its tokens each, and need the others' for what comes next.
            seconds += all_gather_s(max(tokens) * width * ACTIVATION_BYTES, self._tp, self._gpu)
        return seconds

    @property
    def reduces_inside(self) -> bool:
        """Whether the GPUs of one instance, which all have its tokens, add up what the experts of each made of them, as in a
        tensor-parallel group, instead of exchanging tokens."""
        return self.kind in ("allgather-reducescatter", "naive", "sum-or-max")

    # -- the ways ----------------------------------------------------------------------------------------------------

    def _all_to_all(self, experts: Experts, width: int, tokens: Sequence[int], prompts: bool) -> float:
        """Every token to each of its experts, and each result back, evenly."""
        row = experts.per_token * width * ACTIVATION_BYTES
        return 2 * all_to_all_s(
            self._most(experts, tokens) * max(tokens) * row / self._tp, self._gpus(tokens), self._gpu
        )

    def _gathered(self, experts: Experts, width: int, tokens: Sequence[int], prompts: bool) -> float:
        """An all-gather of all tokens and a reduce-scatter of what each GPU's experts made of them. Ranks of several GPUs
        divide their tokens among them before (sequence-parallel experts)."""
        there, back = self._row_bytes(experts, width, always=False), width * ACTIVATION_BYTES
        return self._gather_s(self.gather, tokens, there) + self._gather_s(self.scatter, tokens, back)

    def _gather_s(self, measured: Grid | None, tokens: Sequence[int], row: float) -> float:
        if measured is not None:
            # Measured with as much from each: the message of which a GPU takes in as much as the one that takes in most.
            message = (sum(tokens) - min(tokens)) * len(tokens) / (len(tokens) - 1) * row
            return measured.at(message) * max(message / measured.ends[0], 1.0)
        return uneven_all_gather_s([count / self._tp * row for count in tokens for _ in range(self._tp)], self._gpu)

    def _naive(self, experts: Experts, width: int, tokens: Sequence[int], prompts: bool) -> float:
        """One broadcast after the other of each rank's tokens and of their logits, and an all-reduce over all of them."""
        row, meta = width * ACTIVATION_BYTES, experts.count * ACTIVATION_BYTES
        gpus = self._gpus(tokens)
        rest = [0.0] * (gpus - 1)
        there = sum(uneven_all_gather_s([count * each, *rest], self._gpu) for count in tokens for each in (row, meta))
        return there + all_reduce_s(sum(tokens) * row, gpus, self._gpu)

    def _sum_or_max(self, experts: Experts, width: int, tokens: Sequence[int], prompts: bool) -> float:
        """SGLang without an all-to-all of its own (DpPaddingMode): where a rank has prompts, or padding would move more, two
        all-reduces over the tokens of all; else an all-gather and a reduce-scatter padded to the largest rank."""
        row, gpus = width * ACTIVATION_BYTES, self._gpus(tokens)
        if (prompts and self.rule.prompts_summed) or 2 * sum(tokens) < max(tokens) * len(tokens):
            return 2 * all_reduce_s(sum(tokens) * row, gpus, self._gpu)
        padded = [max(tokens)] * len(tokens)
        seconds = self._gather_s(self.gather, padded, row) + self._gather_s(self.scatter, padded, row)
        # Ranks of several GPUs reduce and gather what they share.
        return seconds + 2 * all_gather_s(max(tokens) * row, self._tp, self._gpu)

    def _deepep_normal(self, experts: Experts, width: int, tokens: Sequence[int], prompts: bool) -> float:
        """A token once to each GPU that has any of its experts, over nodes once to each node, and as much back. Latency: the
        layout and the sizes are told first."""
        gpus = self._gpus(tokens)
        there, back = self._row_bytes(experts, width, always=True), width * ACTIVATION_BYTES
        near, far = self._reached(experts, gpus)
        each = max(tokens) / self._tp
        return sum(self._sent_s(each * near * row, each * far * row) for row in (there, back)) + self._sent_s(0, 0)

    def _deepep_low_latency(self, experts: Experts, width: int, tokens: Sequence[int], prompts: bool) -> float:
        """A token to each of its experts, and each result back: nothing is told first, nothing is shared."""
        gpus = self._gpus(tokens)
        inside = min(gpus, self._gpu.gpus_per_node)
        there, back = self._row_bytes(experts, width, always=True), width * ACTIVATION_BYTES
        each = self._most(experts, tokens) * max(tokens) / self._tp * experts.per_token
        near, far = each * (inside - 1) / gpus, each * (gpus - inside) / gpus
        again = 2 * (-(-max(tokens) // LOW_LATENCY_TOKENS) - 1) * self._sent_s(0, far)
        return sum(self._sent_s(near * row, far * row) for row in (there, back)) + max(again, 0.0)

    # -- their parts -------------------------------------------------------------------------------------------------

    def _most(self, experts: Experts, tokens: Sequence[int]) -> float:
        """By how much more than its even share the GPU with the most loaded experts takes in."""
        return imbalance(experts.count, experts.per_token, sum(tokens), self.skew, self._gpus(tokens))

    def _gpus(self, tokens: Sequence[int]) -> int:
        return len(tokens) * self._tp

    def _row_bytes(self, experts: Experts, width: int, always: bool) -> float:
        """Bytes of a token on its way there. DeepEP ``always`` quantises what is computed in 8 bits and sends choices."""
        eight = self._eight_bits and (always or self.rule.quantised)
        states = width * (1 + 4 / SCALE_BLOCK) if eight else width * ACTIVATION_BYTES
        if eight or always or self.rule.sends == "choices":
            return states + experts.per_token * 8  # an index and a weight
        return states + experts.count * ACTIVATION_BYTES

    def _reached(self, experts: Experts, gpus: int) -> tuple[float, float]:
        """(other GPUs of its node, other nodes) that have an expert of a token, on average."""
        inside = min(gpus, self._gpu.gpus_per_node)
        nodes = -(-gpus // inside)
        return (inside - 1) * _any_chosen(experts, gpus), (nodes - 1) * _any_chosen(experts, nodes)

    def _sent_s(self, near_bytes: float, far_bytes: float) -> float:
        """What goes to GPUs of the node goes at the same time as what leaves it."""
        gpu = self._gpu
        near_s = gpu.link.seconds(near_bytes)
        return max(near_s, gpu.node_link.seconds(far_bytes)) if far_bytes else near_s


def _any_chosen(experts: Experts, parts: int) -> float:
    """Probability that a token chooses an expert of one of so many equal parts of them."""
    none, outside = 1.0, experts.count - experts.count // parts
    for drawn in range(experts.per_token):
        none *= max(outside - drawn, 0) / (experts.count - drawn)
    return 1 - none


_WAYS: dict[str, Callable[[Exchange, Experts, int, Sequence[int], bool], float]] = {
    "all-to-all": Exchange._all_to_all,
    "allgather-reducescatter": Exchange._gathered,
    "naive": Exchange._naive,
    "sum-or-max": Exchange._sum_or_max,
    "deepep-normal": Exchange._deepep_normal,
    "deepep-low-latency": Exchange._deepep_low_latency,
}
