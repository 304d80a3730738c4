"""Norms, what attention needs of a projection, and the activation against their definitions."""

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


def angles(positions, rotary, device):
    table = torch.outer(torch.arange(positions).float(), 1e4 ** (-torch.arange(0, rotary, 2) / rotary)).to(device)
    return torch.cat((table.cos(), table.sin()), dim=1)


def inputs(heads, kv_heads, width, rotary, normed, dtype, device, tokens=5):
    """Arguments of the operator: views of a fused projection, whose last columns belong to nobody, and caches of zeros."""
    fused = randn((tokens, (heads + 2 * kv_heads) * width + 8), dtype, device, seed=8)
    parts = fused[:, :-8].view(tokens, heads + 2 * kv_heads, width).split((heads, kv_heads, kv_heads), dim=1)
    weights = [randn((width,), dtype, device, seed=seed) for seed in (9, 10)]
    positions = torch.tensor([0, 49, 7, 7, 30], device=device)[:tokens]
    slots = torch.tensor([9, 0, 3, 11, 5], device=device)[:tokens]
    caches = [torch.zeros((12, kv_heads, width), dtype=dtype, device=device) for _ in range(2)]
    norms = weights if normed else (None, None)
    return fused, (*parts, *norms, 1e-5, positions, angles(50, rotary, device), *caches, slots)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "heads, kv_heads, width, rotary",
    [(1, 1, 8, 8), (4, 2, 64, 64), (7, 1, 80, 80), (8, 8, 64, 16), (3, 1, 96, 24), (40, 3, 128, 128)],
)
def test_heads_are_normalised_turned_and_stored_as_in_the_definition(
    heads, kv_heads, width, rotary, normed, dtype, device
):
    fused, arguments = inputs(heads, kv_heads, width, rotary, normed, dtype, device)
    _, same = inputs(heads, kv_heads, width, rotary, normed, dtype, device)
    before = fused.clone()
    expected, result = reference.attention_inputs(*same), ops.attention_inputs(*arguments)
    close(result, expected)
    for cache, wanted in zip(arguments[8:10], same[8:10], strict=True):
        close(cache, wanted)
    if not normed:
        assert torch.equal(result[..., rotary:], expected[..., rotary:])
    # Values are copied; slots that are not named stay as they are.
    slots = arguments[10]
    assert torch.equal(arguments[9][slots], arguments[2])
    assert arguments[8][[1, 2, 4]].count_nonzero() == arguments[9][[1, 2, 4]].count_nonzero() == 0
    # Queries are turned in place, and nothing else of the projection is written.
    assert result.data_ptr() == fused.data_ptr()
    assert torch.equal(fused[:, heads * width :], before[:, heads * width :])


def test_no_tokens_write_nothing(device):
    _, arguments = inputs(4, 2, 16, 16, True, torch.float32, device, tokens=0)
    assert ops.attention_inputs(*arguments).shape == (0, 4, 16)
    assert arguments[8].count_nonzero() == 0


@pytest.mark.parametrize("rows, width", [(1, 2), (3, 128), (2, 300), (1, 5000), (0, 16)])
def test_silu_and_mul_agrees(rows, width, dtype, device):
    x = randn((rows, width), dtype, device, seed=11) * 4
    close(ops.silu_and_mul(x), reference.silu_and_mul(x))


def test_silu_of_large_numbers_neither_overflows_nor_becomes_nan(device):
    x = torch.tensor([[-200.0, 200.0, -1e30, 1e30, 1.0, 1.0, 1.0, 1.0]], device=device)
    assert torch.equal(ops.silu_and_mul(x), torch.tensor([[0.0, 200.0, 0.0, 1e30]], device=device))


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
    _, (q, k, v, q_norm, k_norm, eps, positions, table, keys, values, slots) = inputs(
        2, 1, 8, 8, True, torch.float32, device
    )
    ops.attention_inputs(q, k, v, q_norm, k_norm, eps, positions, table, keys, values, slots)  # right, and checked
    for changed, error, told in (
        ({"positions": positions.int()}, TypeError, r"positions: torch\.int32"),
        ({"slots": slots[:4]}, ValueError, "slots: shape"),
        ({"cos_sin": torch.ones((4, 10), device=device)}, ValueError, "cos_sin: width 10"),
        ({"cos_sin": torch.ones((4, 7), device=device)}, ValueError, "cos_sin: width 7"),
        ({"k_cache": torch.ones((4, 2, 8), device=device)}, ValueError, "k_cache: shape"),
        ({"v_cache": values.half()}, TypeError, r"v_cache: torch\.float16"),
        ({"v_cache": values.repeat(1, 2, 1)[:, ::2]}, ValueError, "v_cache: strides"),
        ({"k_norm": k_norm[:4]}, ValueError, "k_norm: shape"),
        ({"q_norm": None}, ValueError, "only one of them"),
        ({"v": v[:, :, :4]}, ValueError, "v: shape"),
    ):
        arguments = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm, "eps": eps, "cos_sin": table}
        arguments |= {"positions": positions}
        arguments |= {"k_cache": keys, "v_cache": values, "slots": slots}
        with pytest.raises(error, match=told):
            ops.attention_inputs(**arguments | changed)
