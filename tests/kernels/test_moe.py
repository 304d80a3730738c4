"""The mixture of experts: routing, the sort by expert, and the whole layer against its definition."""

from __future__ import annotations

import pytest
import torch

from backends.torch.kernels import moe as kernels
from backends.torch.ops import reference
from backends.torch.ops import triton as ops

from .tensors import close, randn


def layer(tokens, experts, width, inner, dtype, device, seed=0):
    x = randn((tokens, width), dtype, device, seed)
    logits = randn((tokens, experts), torch.float32, device, seed + 1)
    gate_up = randn((experts, 2 * inner, width), dtype, device, seed + 2) * width**-0.5
    down = randn((experts, width, inner), dtype, device, seed + 3) * inner**-0.5
    return x, logits, gate_up, down


@pytest.mark.parametrize(
    "tokens, experts, width, inner, top_k",
    [
        (1, 4, 32, 32, 2),
        (5, 3, 40, 24, 1),
        (40, 8, 64, 48, 2),
        (17, 5, 96, 33, 5),
        (9, 16, 32, 16, 4),
    ],
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_layer_of_experts_agrees(tokens, experts, width, inner, top_k, renormalize, dtype, device):
    arguments = layer(tokens, experts, width, inner, dtype, device)
    options = {"top_k": top_k, "renormalize": renormalize}
    close(ops.moe(*arguments, **options), reference.moe(*arguments, **options))


def test_all_tokens_may_go_to_one_expert_and_others_get_none(dtype, device):
    x, logits, gate_up, down = layer(37, 4, 32, 32, dtype, device)
    logits = torch.full_like(logits, -5.0)
    logits[:, 2] = 5.0
    expected = reference.moe(x, logits, gate_up, down, top_k=1, renormalize=True)
    close(ops.moe(x, logits, gate_up, down, top_k=1, renormalize=True), expected)


@pytest.mark.parametrize("tokens", [16, 32, 33])
def test_blocks_that_come_out_exactly_full_need_no_filling(tokens, device):
    x, logits, gate_up, down = layer(tokens, 2, 32, 32, torch.float32, device)
    logits = torch.zeros_like(logits)
    logits[: tokens // 2, 1] = 3.0
    expected = reference.moe(x, logits, gate_up, down, top_k=1, renormalize=True)
    close(ops.moe(x, logits, gate_up, down, top_k=1, renormalize=True), expected)


def test_no_tokens_give_no_rows(device):
    result = ops.moe(*layer(0, 4, 32, 32, torch.float32, device), top_k=2, renormalize=True)
    assert result.shape == (0, 32)


@pytest.mark.parametrize("experts", [3, 8, 60])
@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_finds_the_largest_weights_in_order(experts, renormalize, device):
    logits = randn((11, experts), torch.float32, device, 4)
    weights, chosen = kernels.route(logits, 3, renormalize)
    expected, expected_at = logits.softmax(-1).topk(3)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(chosen.long(), expected_at)


def test_experts_of_equal_weight_are_taken_in_the_order_of_their_numbers(device):
    weights, chosen = kernels.route(torch.zeros((2, 6), device=device), 4, True)
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25, device=device))


@pytest.mark.parametrize(
    "pairs, experts, block_m, only",
    [
        (1, 4, 16, None),
        (50, 4, 16, None),
        (64, 2, 16, 1),
        (48, 3, 16, 0),
        (3000, 5, 32, None),
        (7, 64, 16, None),
    ],
)
def test_the_sort_puts_every_pair_into_a_block_of_its_expert_once(pairs, experts, block_m, only, device):
    generator = torch.Generator().manual_seed(pairs)
    chosen = torch.randint(0, experts, (pairs,), generator=generator, dtype=torch.int32).to(device)
    if only is not None:
        chosen[:] = only
    order, block_expert, used = kernels.sort_by_expert(chosen, experts, block_m)
    blocks = int(used)
    assert blocks == sum(-(-int((chosen == e).sum()) // block_m) for e in range(experts))
    assert blocks <= len(block_expert)
    order = order[: blocks * block_m]
    owner = block_expert[:blocks].repeat_interleave(block_m)
    real = order < pairs
    assert (order[~real] == pairs).all()
    assert torch.equal(order[real].sort().values.long(), torch.arange(pairs, device=device))
    assert torch.equal(chosen[order[real].long()], owner[real])
    for expert in range(experts):
        mine = order[real & (owner == expert)]
        assert torch.equal(mine, mine.sort().values)


@pytest.mark.parametrize("seed", range(4))
def test_a_tokens_result_does_not_depend_on_the_other_tokens(seed, device):
    x, logits, gate_up, down = layer(20, 4, 32, 32, torch.float32, device, seed)
    options = {"top_k": 2, "renormalize": True}
    together = ops.moe(x, logits, gate_up, down, **options)
    alone = ops.moe(x[7:8], logits[7:8], gate_up, down, **options)
    close(together[7:8], alone)


def test_arguments_that_do_not_fit_are_named(device):
    x, logits, gate_up, down = layer(3, 4, 32, 16, torch.float32, device)
    with pytest.raises(ValueError, match="top_k: 5"):
        ops.moe(x, logits, gate_up, down, top_k=5, renormalize=True)
    with pytest.raises(ValueError, match="gate_up: shape"):
        ops.moe(x, logits, gate_up[:, :16], down, top_k=1, renormalize=True)
    with pytest.raises(TypeError, match=r"down: torch\.float16"):
        ops.moe(x, logits, gate_up, down.half(), top_k=1, renormalize=True)
