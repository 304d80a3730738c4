"""Sampling without a sort against its definition: filters, ties, noise, greedy rows; penalties and log probabilities."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from backends.torch.kernels import sampling as kernels
from backends.torch.ops import reference
from backends.torch.ops import triton as ops

from .tensors import randn

FEW = 128
"""Tokens a step of the kernels' loops in these tests, so that small vocabularies take several."""


def batch(rows, device, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    """Sampling tensors of ``rows`` rows; numbers stand for every row, lists for one row each."""

    def column(value, dtype):
        values = value if isinstance(value, list) else [value] * rows
        return torch.tensor(values, dtype=dtype, device=device)

    generator = torch.Generator().manual_seed(seed)
    return (
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        torch.randint(-(2**62), 2**62, (rows,), generator=generator).to(device),
        torch.randint(0, 100_000, (rows,), generator=generator).to(device),
    )


def drawn(logits, arguments, *, all_greedy=False, filtered=True, block=FEW):
    return kernels.sample(logits, *arguments, all_greedy=all_greedy, filtered=filtered, block=block)


def agrees(logits, arguments):
    assert drawn(logits, arguments).tolist() == reference.sample(logits, *arguments).tolist()


@triton.jit
def _noise_kernel(seeds, positions, bits, noise, COUNT: tl.constexpr):
    key = kernels.noise_key(tl.load(seeds), tl.load(positions))
    token = tl.arange(0, COUNT)
    tl.store(bits + token, kernels.noise_bits(key, token).to(tl.int64))
    tl.store(noise + token, kernels.gumbel(key, token))


@pytest.mark.parametrize("seed, position", [(0, 0), (1, 7), (-1, 2**31), (2**63 - 1, 100_000), (-(2**63), 3)])
def test_noise_has_the_bits_and_the_values_of_the_reference(seed, position, device):
    seeds = torch.tensor([seed], device=device)
    positions = torch.tensor([position], device=device)
    bits = torch.empty(4096, dtype=torch.int64, device=device)
    noise = torch.empty(4096, dtype=torch.float32, device=device)
    _noise_kernel[(1,)](seeds, positions, bits, noise, COUNT=4096)
    token = torch.arange(4096, device=device)
    expected = reference._mix((seeds ^ reference._mix(positions)) ^ reference._mix(token + 0x9E3779B9))
    assert torch.equal(bits, expected)
    in_powers_of_two = reference.gumbel(seeds, positions, 4096)[0] * 1.4426950408889634
    torch.testing.assert_close(noise, in_powers_of_two, rtol=1e-4, atol=1e-4)


def test_noise_is_finite_and_distributed_as_gumbel(device):
    noise = reference.gumbel(torch.arange(64, device=device), torch.arange(64, device=device), 20_000).double()
    assert noise.isfinite().all()
    # Mean is Euler's constant, variance pi^2 / 6; 1.28 million draws leave errors of 0.001 and 0.003.
    assert abs(noise.mean().item() - 0.577216) < 0.006
    assert abs(noise.var().item() - 1.644934) < 0.02
    # Above 10 lie exp(-10) of them, that is 58.
    assert 25 < (noise > 10).sum().item() < 100


@pytest.mark.parametrize("vocab", [1, 31, 64, 65, 200, 1000])
def test_unfiltered_draws_agree_with_and_without_being_told(vocab, device):
    logits = randn((6, vocab), torch.float32, device, vocab) * 3
    arguments = batch(6, device, temperature=[0.0, 0.1, 0.7, 1.0, 2.0, 10.0])
    expected = reference.sample(logits, *arguments).tolist()
    assert drawn(logits, arguments).tolist() == expected
    assert drawn(logits, arguments, filtered=False).tolist() == expected
    assert reference.sample(logits, *arguments, filtered=False).tolist() == expected


@pytest.mark.parametrize("top_k", [1, 2, 5, 16, 50, 299, 300, 1000])
def test_top_k_agrees(top_k, device):
    logits = randn((3, 300), torch.float32, device, top_k) * 2
    agrees(logits, batch(3, device, temperature=1.5, top_k=top_k, seed=top_k))


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_agrees(top_p, device):
    logits = randn((5, 300), torch.float32, device, 5) * 2
    agrees(logits, batch(5, device, temperature=[0.3, 0.7, 1.0, 2.0, 5.0], top_p=top_p, seed=3))


@pytest.mark.parametrize("min_p", [1e-6, 0.02, 0.3, 1.0])
def test_min_p_agrees(min_p, device):
    logits = randn((5, 300), torch.float32, device, 6) * 2
    agrees(logits, batch(5, device, temperature=[0.3, 0.7, 1.0, 2.0, 5.0], min_p=min_p, seed=4))


@pytest.mark.parametrize("seed", range(8))
def test_all_filters_together_agree_row_by_row(seed, device):
    pick = torch.Generator().manual_seed(seed)
    rows, vocab = 6, int(torch.randint(2, 400, (), generator=pick))

    def choose(options):
        return [options[int(i)] for i in torch.randint(0, len(options), (rows,), generator=pick)]

    logits = randn((rows, vocab), torch.float32, device, seed) * float(torch.rand((), generator=pick) * 5)
    arguments = batch(
        rows,
        device,
        temperature=choose([0.0, 0.2, 0.8, 1.0, 3.0]),
        top_k=choose([0, 1, 4, 20, 100]),
        top_p=choose([1.0, 0.95, 0.6, 0.05]),
        min_p=choose([0.0, 0.0, 0.05, 0.5]),
        seed=seed,
    )
    agrees(logits, arguments)


def test_flat_logits_with_narrow_filters_reject_many_winners_and_still_agree(device):
    logits = randn((3, 500), torch.float32, device, 7) * 1e-3
    agrees(logits, batch(3, device, top_k=[0, 0, 300], top_p=[0.01, 1.0, 0.02], min_p=[0.0, 0.9975, 0.0], seed=5))


@pytest.mark.parametrize("arguments", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}, {"top_k": 3, "top_p": 0.5}])
def test_ties_at_a_threshold_are_all_kept(arguments, device):
    logits = torch.zeros((1, 128), device=device)
    logits[:, [5, 70, 71, 100]] = 4.0
    logits = logits.expand(16, -1).contiguous()
    sampling = batch(16, device, seed=8, **arguments)
    tokens = drawn(logits, sampling)
    assert tokens.tolist() == reference.sample(logits, *sampling).tolist()
    assert set(tokens.tolist()) == {5, 70, 71, 100}


def test_equal_logits_are_all_kept_by_any_top_k(device):
    agrees(torch.full((8, 100), 2.5, device=device), batch(8, device, top_k=3, seed=9))


def test_of_equal_largest_logits_greedy_takes_the_first(device):
    logits = torch.zeros((3, 200), device=device)
    logits[0, [130, 190]] = logits[1, [64, 63]] = 1.0
    arguments = batch(3, device, temperature=0.0)
    assert drawn(logits, arguments).tolist() == [130, 63, 0]
    assert drawn(logits, arguments, all_greedy=True).tolist() == [130, 63, 0]


def test_greedy_and_drawing_rows_mix(device):
    logits = randn((4, 250), torch.float32, device, 10)
    arguments = batch(4, device, temperature=[0.0, 1.0, 0.0, 1.0], top_k=[5, 5, 0, 0], seed=10)
    tokens = drawn(logits, arguments)
    assert tokens[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    agrees(logits, arguments)


def test_forbidden_tokens_are_never_drawn(device):
    logits = randn((3, 300), torch.float32, device, 11)
    allowed = torch.tensor([3, 64, 65, 299], device=device)
    masked = torch.full_like(logits, float("-inf"))
    masked[:, allowed] = logits[:, allowed]
    for filters in ({}, {"top_k": 2}, {"top_k": 100}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 200, "top_p": 0.9}):
        arguments = batch(3, device, temperature=[0.0, 1.0, 3.0], seed=11, **filters)
        tokens = drawn(masked, arguments).tolist()
        assert tokens == reference.sample(masked, *arguments).tolist()
        assert set(tokens) <= set(allowed.tolist())


def test_a_single_allowed_token_is_drawn_by_any_parameters(device):
    logits = torch.full((6, 150), float("-inf"), device=device)
    logits[:, 77] = -3.0
    arguments = batch(
        6,
        device,
        temperature=[0.0, 1.0, 1.0, 1.0, 1.0, 0.01],
        top_k=[0, 0, 1, 9, 0, 0],
        top_p=[1.0, 1.0, 1.0, 0.5, 0.5, 1.0],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.5, 0.0],
    )
    assert drawn(logits, arguments).tolist() == [77] * 6


def test_the_draw_of_a_request_does_not_depend_on_its_batch(device):
    logits = randn((6, 300), torch.float32, device, 12)
    arguments = batch(6, device, top_k=[0, 3, 0, 50, 0, 0], top_p=[1.0, 1.0, 0.4, 0.9, 1.0, 1.0], seed=12)
    together = drawn(logits, arguments)
    order = torch.tensor([4, 2, 0, 5], device=device)
    apart = drawn(logits[order], tuple(a[order] for a in arguments))
    assert apart.tolist() == together[order].tolist()


def test_logits_far_apart_and_low_temperatures_do_not_overflow(device):
    logits = randn((4, 200), torch.float32, device, 13) * 1e4
    agrees(logits, batch(4, device, temperature=[1e-5, 0.01, 1.0, 100.0], top_p=0.9, seed=13))
    agrees(logits, batch(4, device, temperature=[1e-5, 0.01, 1.0, 100.0], top_k=10, seed=14))


def test_draws_follow_the_filtered_distribution(device):
    # The definition is checked for its distribution, the kernel for agreeing with it: that takes far fewer draws.
    rows = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -8.0], device=device)
    arguments = list(batch(rows, device, top_k=4, top_p=0.9, seed=15))
    arguments[4] = torch.arange(rows, device=device)
    logits_of_rows = logits.expand(rows, -1).contiguous()
    tokens = reference.sample(logits_of_rows, *arguments)
    assert drawn(logits_of_rows[:24], [a[:24] for a in arguments]).tolist() == tokens[:24].tolist()
    # Of the top 4 (0, 4, 1, 2), token 2 comes after a share of 0.922.
    expected = logits[[0, 4, 1]].softmax(0)
    counts = torch.bincount(tokens, minlength=6).float() / rows
    assert set(tokens.tolist()) == {0, 1, 4}
    torch.testing.assert_close(counts[[0, 4, 1]], expected, atol=0.015, rtol=0.0)


def test_sampling_agrees_through_the_operator_and_its_own_configuration(device):
    logits = randn((3, 5000), torch.float32, device, 16)[:, :4990]
    arguments = batch(3, device, top_k=[0, 20, 0], top_p=[1.0, 0.9, 0.8], seed=16)
    assert ops.sample(logits, *arguments).tolist() == reference.sample(logits, *arguments).tolist()
    assert ops.sample(logits, *arguments, all_greedy=True).tolist() == logits.argmax(-1).tolist()
    assert ops.sample(logits[:0], *batch(0, device)).tolist() == []


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.7}, {"min_p": 0.05}])
def test_logits_are_sampled_in_the_dtype_they_come_in(filters, dtype, device):
    logits = randn((4, 300), dtype, device, 19) * 3
    arguments = batch(4, device, temperature=[0.0, 0.7, 1.0, 2.0], seed=19, **filters)
    tokens = drawn(logits, arguments).tolist()
    assert tokens == reference.sample(logits, *arguments).tolist()
    assert tokens == reference.sample(logits.float(), *arguments).tolist()
    expected = reference.logprobs(logits, arguments[5] % 300, 5)
    for result, wanted in zip(kernels.logprobs(logits, arguments[5] % 300, 5, block=FEW), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [1, 100, 5000])
def test_penalties_agree(vocab, device):
    logits = randn((5, vocab), torch.float32, device, 17) * 3
    generator = torch.Generator().manual_seed(17)
    counts = torch.randint(0, 4, (5, vocab), generator=generator, dtype=torch.int32).to(device)
    in_prompt = (torch.rand((5, vocab), generator=generator) < 0.3).to(device)
    table = [[1.0, 0.0, 0.0], [1.3, 0.5, 0.2], [0.8, 0.0, 0.0], [1.0, -1.0, 0.0], [1.0, 0.0, 0.7]]
    numbers = torch.tensor(table, device=device).unbind(1)
    expected, result = logits.clone(), logits.clone()
    reference.penalize(expected, counts, in_prompt, *numbers)
    ops.penalize(result, counts, in_prompt, *numbers)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(result[0], logits[0])


@pytest.mark.parametrize("top", [0, 1, 5, 20])
@pytest.mark.parametrize("vocab", [20, 300])
def test_log_probabilities_agree(vocab, top, device):
    logits = randn((4, vocab), torch.float32, device, 18) * 4
    tokens = torch.tensor([0, vocab - 1, 7, 7], device=device)
    expected = reference.logprobs(logits, tokens, top)
    chosen, values, ids = kernels.logprobs(logits, tokens, top, block=FEW)
    torch.testing.assert_close(chosen, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, expected[2])


def test_equal_log_probabilities_are_listed_by_token(device):
    logits = torch.zeros((1, 200), device=device)
    logits[0, [150, 20]] = 1.0
    _, values, ids = kernels.logprobs(logits, torch.tensor([3], device=device), 5, block=FEW)
    assert ids.tolist() == [[20, 150, 0, 1, 2]]
    assert values[0, 0] == values[0, 1]


def test_log_probabilities_of_forbidden_tokens_are_minus_infinity(device):
    logits = torch.full((1, 100), float("-inf"), device=device)
    logits[0, 40] = 2.0
    chosen, values, ids = ops.logprobs(logits, torch.tensor([3], device=device), 3)
    assert chosen.tolist() == [float("-inf")]
    assert values.tolist() == [[0.0, float("-inf"), float("-inf")]]
    assert ids.tolist() == [[40, 0, 1]]


def test_arguments_that_do_not_fit_are_named(device):
    logits = torch.zeros((2, 10), device=device)
    arguments = batch(2, device)
    with pytest.raises(TypeError, match=r"logits: torch\.float64"):
        ops.sample(logits.double(), *arguments)
    with pytest.raises(TypeError, match=r"logits: torch\.float16"):
        ops.penalize(logits.half(), *[arguments[5]] * 5)
    with pytest.raises(TypeError, match=r"top_k: torch\.int64"):
        ops.sample(logits, arguments[0], arguments[1].long(), *arguments[2:])
    with pytest.raises(ValueError, match="temperature: shape"):
        ops.sample(logits, arguments[0][:1], *arguments[1:])
    with pytest.raises(ValueError, match="top: 11"):
        ops.logprobs(logits, torch.zeros(2, dtype=torch.int64, device=device), 11)
    with pytest.raises(TypeError, match=r"in_prompt: torch\.int32"):
        counts = torch.zeros((2, 10), dtype=torch.int32, device=device)
        ops.penalize(logits, counts, counts, *[arguments[2]] * 3)


@pytest.mark.parametrize("vocab", [1, 31, 33, 300, 5000])
def test_masks_forbid_the_tokens_whose_bits_are_not_set_and_touch_no_others(vocab, dtype, device):
    logits = randn((5, vocab), dtype, device, 12)
    logits[0, 0] = float("nan")
    generator = torch.Generator().manual_seed(vocab)
    words = torch.randint(-(1 << 31), 1 << 31, (3, -(-vocab // 32)), generator=generator, dtype=torch.int64)
    masks, rows = words.to(torch.int32).to(device), torch.tensor([4, 1, 2], device=device)
    expected = logits.clone()
    reference.forbid(expected, rows, masks)
    ops.forbid(logits, rows, masks)
    assert torch.equal(logits.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_masks_of_another_shape_or_dtype_are_refused(device):
    logits, rows = torch.zeros((2, 64), device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="masks: shape"):
        ops.forbid(logits, rows, torch.zeros((1, 3), dtype=torch.int32, device=device))
    with pytest.raises(TypeError, match="masks"):
        ops.forbid(logits, rows, torch.zeros((1, 2), dtype=torch.int64, device=device))
