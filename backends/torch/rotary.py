"""Rotary position embeddings: the angles of each kind of scaling, and the table that ``ops.attention_inputs`` reads.

The numbers are those of transformers' ``modeling_rope_utils``, in the same order of operations, so that a cached key
rotated here equals one rotated there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Parameters of rotary embeddings: from positions to angles. Fields that a kind does not use keep their defaults."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""
    kind: str = "default"
    """One of :data:`KINDS`."""
    factor: float = 1.0
    """By how much the context is stretched (linear, llama3, yarn)."""
    original_context: int = 0
    """Tokens of context the model was trained with before it was stretched (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: wavelengths above ``original_context / low_freq_factor`` are stretched in full, those below
    ``original_context / high_freq_factor`` not at all."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: rotations over the original context from which an angle is kept, and up to which it is stretched in full."""
    truncate: bool = True
    """yarn: round the range between the two betas to whole dimensions."""
    attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied by; None: from ``factor`` and the two mscales."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    divisors: tuple[float, ...] = ()
    """divisors: what each of the head_dim / 2 frequencies is divided by (``rope_freqs.weight`` of a GGUF file)."""


KINDS = ("default", "linear", "llama3", "yarn", "divisors")


def inverse_frequencies(rope: Rope, dim: int) -> tuple[Tensor, float]:
    """(float32[dim / 2] radians a position, the factor on cosines and sines) for heads of ``dim`` elements.

    Raises ValueError for an unknown kind or for as many divisors as do not fit ``dim``.
    """
    # An int64 range turned to float and a float32 power: bit for bit what transformers computes.
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    match rope.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "yarn":
            return _yarn(rope, dim), _yarn_attention_factor(rope)
        case "divisors":
            if len(rope.divisors) != dim // 2:
                raise ValueError(f"rope: {len(rope.divisors)} divisors for {dim // 2} frequencies")
            return plain / torch.tensor(rope.divisors, dtype=torch.float32), 1.0
    raise ValueError(f"rope: {rope.kind!r} is not one of {', '.join(KINDS)}")


def cos_sin_table(rope: Rope, dim: int, positions: int) -> Tensor:
    """float32[positions, dim] on the CPU: the cosines of dim / 2 angles, then their sines."""
    # Wherever it is called from, an ambient "meta" device must not reach the table: it is data, not a parameter.
    with torch.device("cpu"):
        frequencies, factor = inverse_frequencies(rope, dim)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    longest, shortest = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > longest, plain / rope.factor, plain)
    blend = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * stretched / rope.factor + blend * stretched
    between = ~(wavelength < shortest) & ~(wavelength > longest)
    return torch.where(between, blended, stretched)


def _yarn(rope: Rope, dim: int) -> Tensor:
    def dimension_of(rotations: float) -> float:
        """The dimension whose angle turns so many times over the original context."""
        turns = rope.original_context / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return float(scale(rope.mscale) / scale(rope.mscale_all_dim))
    return scale(1.0)
