"""Norms, rotary embedding, activation and cache writes against their definitions."""

from __future__ import annotations

import pytest
import torch

from backends.torch.ops import reference
from backends.torch.ops import triton as ops

from .tensors import close, randn


@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (3, 4, 128), (2, 3, 80), (7, 1000), (2, 2, 2, 16), (0, 64)])
def test_rms_norm_agrees_over_any_leading_axes(shape, dtype, device):
    x = randn(shape, dtype, device, seed=1)
    weight = randn(shape[-1:], dtype, device, seed=2)
    close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_rms_norm_reads_heads_out_of_a_fused_projection(dtype, device):
    fused = randn((6, 5 * 32 + 7), dtype, device, seed=3)
    heads = fused[:, 32 : 32 + 3 * 32].view(6, 3, 32)
    weight = randn((32,), dtype, device, seed=4)
    result = ops.rms_norm(heads, weight, 1e-6)
    close(result, reference.rms_norm(heads, weight, 1e-6))
    assert result.is_contiguous()


@pytest.mark.parametrize("rows, width", [(1, 64), (4, 96), (3, 1000), (0, 32)])
def test_add_rms_norm_agrees_and_returns_the_sum(rows, width, dtype, device):
    x, residual = randn((rows, width), dtype, device, seed=5), randn((rows, width), dtype, device, seed=6)
    weight = randn((width,), dtype, device, seed=7)
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    result = ops.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    close(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize(
    "heads, kv_heads, width, rotary", [(1, 1, 8, 8), (4, 2, 64, 64), (7, 1, 80, 80), (8, 8, 64, 16), (3, 1, 96, 24)]
)
def test_rope_agrees_and_leaves_the_rest_of_a_head_alone(heads, kv_heads, width, rotary, dtype, device):
    q, k = randn((5, heads, width), dtype, device, seed=8), randn((5, kv_heads, width), dtype, device, seed=9)
    angles = torch.outer(torch.arange(50).float(), 1e4 ** (-torch.arange(0, rotary, 2) / rotary)).to(device)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([0, 49, 7, 7, 30], device=device)
    expected = reference.rope(q, k, positions, table)
    for result, want in zip(ops.rope(q.clone(), k.clone(), positions, table), expected, strict=True):
        close(result, want)
        assert torch.equal(result[..., rotary:], want[..., rotary:])


def test_rope_turns_views_of_a_fused_projection_in_place(dtype, device):
    fused = randn((4, 3 * 16), dtype, device, seed=10)
    before = fused.clone()
    q, k = fused[:, :16].view(4, 1, 16), fused[:, 16:32].view(4, 1, 16)
    angles = torch.rand((9, 8), device=device)
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([1, 2, 3, 8], device=device)
    expected = reference.rope(q, k, positions, table)
    ops.rope(q, k, positions, table)
    close(fused[:, :16].view(4, 1, 16), expected[0])
    close(fused[:, 16:32].view(4, 1, 16), expected[1])
    assert torch.equal(fused[:, 32:], before[:, 32:])


@pytest.mark.parametrize("rows, width", [(1, 2), (3, 128), (2, 300), (1, 5000), (0, 16)])
def test_silu_and_mul_agrees(rows, width, dtype, device):
    x = randn((rows, width), dtype, device, seed=11) * 4
    close(ops.silu_and_mul(x), reference.silu_and_mul(x))


def test_silu_of_large_numbers_neither_overflows_nor_becomes_nan(device):
    x = torch.tensor([[-200.0, 200.0, -1e30, 1e30, 1.0, 1.0, 1.0, 1.0]], device=device)
    assert torch.equal(ops.silu_and_mul(x), torch.tensor([[0.0, 200.0, 0.0, 1e30]], device=device))


@pytest.mark.parametrize("heads, width", [(1, 64), (2, 80), (3, 16)])
def test_store_kv_writes_the_named_slots_and_no_others(heads, width, dtype, device):
    fused = randn((4, 3, heads, width), dtype, device, seed=12)
    slots = torch.tensor([9, 0, 3, 11], device=device)
    caches = [torch.zeros((12, heads, width), dtype=dtype, device=device) for _ in range(4)]
    ops.store_kv(fused[:, 0], fused[:, 2], caches[0], caches[1], slots)
    reference.store_kv(fused[:, 0], fused[:, 2], caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


def test_arguments_the_kernels_do_not_take_are_named(device):
    x = torch.ones((2, 8), device=device)
    with pytest.raises(TypeError, match=r"x: torch\.float64"):
        ops.rms_norm(x.double(), torch.ones(8, device=device), 1e-5)
    with pytest.raises(TypeError, match=r"weight: torch\.float16 where torch\.float32"):
        ops.rms_norm(x, torch.ones(8, device=device, dtype=torch.float16), 1e-5)
    with pytest.raises(ValueError, match="weight: shape"):
        ops.add_rms_norm(x, x.clone(), torch.ones(7, device=device), 1e-5)
    with pytest.raises(ValueError, match="x: the last axis has stride 2"):
        ops.silu_and_mul(torch.ones((2, 16), device=device)[:, ::2])
    with pytest.raises(ValueError, match="7 columns are not two halves"):
        ops.silu_and_mul(torch.ones((2, 7), device=device))
    with pytest.raises(TypeError, match=r"positions: torch\.int32"):
        positions = torch.zeros(2, dtype=torch.int32, device=device)
        ops.rope(x[:, None], x[:, None], positions, torch.ones((4, 8), device=device))
    with pytest.raises(ValueError, match="cos_sin: width 10"):
        ops.rope(x[:, None], x[:, None], positions.long(), torch.ones((4, 10), device=device))
    with pytest.raises(ValueError, match="k_cache: shape"):
        ops.store_kv(x[:, None], x[:, None], torch.ones((4, 2, 8), device=device), x[:, None], positions.long())
