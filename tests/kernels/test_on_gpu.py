"""What only a GPU can show: CUDA graphs, bfloat16, and the configurations of real sizes."""

from __future__ import annotations

import pytest
import torch

from backends.torch.cuda_graphs import without_collection
from backends.torch.ops import reference
from backends.torch.ops import triton as ops

from .conftest import INTERPRETED
from .tensors import close, randn
from .test_attention import paged
from .test_fp8_linear import held
from .test_moe import layer
from .test_sampling import batch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


def captured(step):
    """A CUDA graph of ``step`` and what it returned; kernels are compiled before the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        result = step()
    return graph, result


def test_a_captured_decode_follows_lengths_that_change_after_the_capture(device):
    cache = paged([1000, 17, 300, 2048], 16, 2, 128, torch.bfloat16, device)
    q = randn((4, 8, 128), torch.bfloat16, device, 1)
    options = {"page_size": 16, "scale": 0.09}
    graph, result = captured(lambda: ops.decode_attention(q, *cache.arguments(), **options))
    for lengths in ([1000, 17, 300, 2048], [1, 1, 1, 1], [999, 16, 64, 2000], [1000, 1, 300, 5]):
        cache.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        close(result, reference.decode_attention(q, *cache.without_nan().arguments(), **options))


def test_captured_experts_follow_a_routing_that_changes_after_the_capture(device):
    x, logits, gate_up, down = layer(64, 16, 256, 128, torch.bfloat16, device)
    options = {"top_k": 2, "renormalize": True}
    graph, result = captured(lambda: ops.moe(x, logits, gate_up, down, **options))
    for spread in (1.0, 0.0, 20.0):
        logits.copy_(randn((64, 16), torch.float32, device, 2) * spread + torch.arange(16, device=device) * 1e-3)
        graph.replay()
        close(result, reference.moe(x, logits, gate_up, down, **options))


def test_captured_sampling_follows_parameters_that_change_after_the_capture(device):
    logits = randn((32, 151_936), torch.float32, device, 3) * 3
    arguments = batch(32, device, seed=1)
    graph, result = captured(lambda: ops.sample(logits, *arguments))
    for filters in ({}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.8}, {"min_p": 0.05}, {"temperature": 0.0}):
        for mine, new in zip(arguments, batch(32, device, seed=2, **filters), strict=True):
            mine.copy_(new)
        graph.replay()
        assert result.tolist() == reference.sample(logits, *arguments).tolist()


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("heads, kv_heads, width", [(32, 8, 128), (14, 2, 64), (16, 8, 256), (8, 8, 80)])
def test_decode_agrees_at_real_sizes(heads, kv_heads, width, page, dtype, device):
    lengths = [1000] * 30 + [1, 7000, 33, 512]
    cache = paged(lengths, page, kv_heads, width, dtype, device)
    q = randn((len(lengths), heads, width), dtype, device, 4)
    options = {"page_size": page, "scale": width**-0.5}
    expected = reference.decode_attention(q, *cache.without_nan().arguments(), **options)
    close(ops.decode_attention(q, *cache.arguments(), **options), expected)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("heads, kv_heads, width", [(32, 8, 128), (14, 2, 64), (16, 8, 256), (8, 8, 80)])
def test_prefill_agrees_at_real_sizes(heads, kv_heads, width, window, dtype, device):
    prefixes, extends = [0, 1500, 37, 4000], [900, 100, 1, 513]
    lengths = [p + e for p, e in zip(prefixes, extends, strict=True)]
    cache = paged(lengths, 16, kv_heads, width, dtype, device)
    starts = torch.tensor([0, *extends]).cumsum(0).int().to(device)
    q = randn((sum(extends), heads, width), dtype, device, 5)
    options = {"page_size": 16, "scale": width**-0.5, "max_extend": 900, "window": window}
    expected = reference.prefill_attention(q, *cache.without_nan().arguments()[:4], starts, cache.seq_lens, **options)
    close(ops.prefill_attention(q, *cache.arguments()[:4], starts, cache.seq_lens, **options), expected)


@pytest.mark.parametrize("tokens", [1, 16, 256, 2048])
def test_experts_agree_at_real_sizes(tokens, dtype, device):
    arguments = layer(tokens, 32, 1024, 768, dtype, device)
    options = {"top_k": 4, "renormalize": True}
    close(ops.moe(*arguments, **options), reference.moe(*arguments, **options))


@pytest.mark.parametrize("block", [None, (128, 128)])
@pytest.mark.parametrize("tokens", [1, 48, 100, 1000])
def test_products_with_fp8_weights_agree_at_real_sizes(tokens, block, dtype, device):
    weight = held(1000, 2048, block, device)
    x = randn((tokens, 2048), dtype, device, 7)
    close(ops.fp8_linear(x, *weight), reference.fp8_linear(x, *weight))


def test_log_probabilities_agree_at_real_sizes(device):
    logits = randn((64, 151_936), torch.float32, device, 6) * 3
    tokens = torch.arange(64, device=device) * 1000
    for result, expected in zip(ops.logprobs(logits, tokens, 20), reference.logprobs(logits, tokens, 20), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
