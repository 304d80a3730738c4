"""Products with weights in FP8 against their definition, and every e4m3 number by itself."""

from __future__ import annotations

import pytest
import torch

from backends.torch import fp8
from backends.torch.kernels import fp8_linear
from backends.torch.ops import reference
from backends.torch.ops import triton as ops

from .tensors import close, randn


def held(rows, columns, block, device, seed=0):
    """A random weight as layers hold it: (values, a row's scales, columns of a block)."""
    how = fp8.Fp8(block)
    weight = randn((rows, columns), torch.float32, device, seed) * columns**-0.5
    weight *= torch.linspace(0.1, 10, rows, device=device)[:, None]  # blocks must not be alike
    values, scales = fp8.quantise(weight, how)
    return values, fp8.row_scales(scales, rows, how).contiguous(), how.of(rows, columns)[1]


@pytest.mark.parametrize(
    "rows, columns, depth, block",
    [
        (1, 8, 32, None),
        (5, 40, 64, None),
        (17, 33, 72, None),
        (3, 64, 96, (32, 32)),
        (20, 70, 80, (16, 16)),
        (2, 16, 200, (128, 128)),
        (40, 96, 128, (32, 64)),
        (0, 8, 32, None),
    ],
)
def test_a_product_with_an_fp8_weight_agrees(rows, columns, depth, block, dtype, device):
    x = randn((rows, depth), dtype, device, seed=1)
    weight = held(columns, depth, block, device)
    close(ops.fp8_linear(x, *weight), reference.fp8_linear(x, *weight))


@pytest.mark.parametrize(
    "rows, columns, depth, block", [(5, 40, 64, None), (17, 33, 72, (16, 16)), (40, 70, 96, (32, 32))]
)
def test_a_product_agrees_with_the_weight_on_either_side(rows, columns, depth, block, dtype, device):
    x = randn((rows, depth), dtype, device, seed=1)
    weight = held(columns, depth, block, device)
    config = fp8_linear.Fp8Config(16, 32, 16, 4, 1, swap=True)
    close(fp8_linear.fp8_linear(x, *weight, config=config), reference.fp8_linear(x, *weight))


def test_every_number_of_e4m3_is_read_exactly(device):
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[~values.float().isnan()].to(device)
    weight, scales = values[:, None].repeat(1, 16).contiguous(), torch.ones((len(values), 1), device=device)
    x = torch.zeros((1, 16), device=device)
    x[0, 3] = 1.0
    result = ops.fp8_linear(x, weight, scales, 16)
    assert torch.equal(result[0], values.float())


def test_inputs_may_be_views_and_wrong_ones_are_refused(device):
    x = randn((6, 3 * 64), torch.float32, device, seed=2)[:, 64:128]
    values, scales, columns = held(24, 64, (8, 16), device)
    close(ops.fp8_linear(x, values, scales, columns), reference.fp8_linear(x, values, scales, columns))
    for wrong, error in (
        ((x, values.float(), scales, 16), TypeError),
        ((x, values, scales.half(), 16), TypeError),
        ((x[:, :32], values, scales, 16), ValueError),
        ((x, values, scales[:5], 16), ValueError),
        ((x, values, scales, 32), ValueError),
        ((x, values, scales[:, :2], 48), ValueError),
    ):
        with pytest.raises(error):
            ops.fp8_linear(*wrong)
