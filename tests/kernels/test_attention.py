"""Paged attention kernels against the definition: scattered pages, uneven lengths, prefixes, windows, grouped heads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from backends.torch.kernels import decode_attention as decode
from backends.torch.kernels import prefill_attention as prefill
from backends.torch.kernels.common import arch
from backends.torch.ops import reference
from backends.torch.ops import triton as ops

from .tensors import close, randn


@dataclass
class Paged:
    """A cache in which requests' pages lie scattered, and rows in no order. Unused slots hold NaN."""

    keys: Tensor
    values: Tensor
    table: Tensor
    rows: Tensor
    seq_lens: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.table, self.rows, self.seq_lens

    def without_nan(self) -> Paged:
        return Paged(self.keys.nan_to_num(), self.values.nan_to_num(), self.table, self.rows, self.seq_lens)


def paged(
    lengths: list[int], page: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Paged:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page) for length in lengths]
    spare = 3
    free = torch.randperm(sum(counts) + spare, generator=generator)
    rows = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    # Entries past a request's pages are out of any bound: to follow one is to fail.
    table = torch.full((len(lengths) + 2, max(counts, default=1) + 1), 1 << 28, dtype=torch.int32)
    slots = (sum(counts) + spare) * page
    keys, values = (torch.full((slots, kv_heads, width), float("nan")) for _ in range(2))
    for row, length, count in zip(rows.tolist(), lengths, counts, strict=True):
        mine, free = free[:count], free[count:]
        table[row, :count] = mine.int()
        at = torch.arange(length)
        used = mine[at // page] * page + at % page
        keys[used] = torch.randn((length, kv_heads, width), generator=generator)
        values[used] = torch.randn((length, kv_heads, width), generator=generator)
    return Paged(
        keys.to(device, dtype),
        values.to(device, dtype),
        table.to(device),
        rows.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def check_decode(
    lengths,
    *,
    page=16,
    heads=2,
    kv_heads=1,
    width=16,
    window=None,
    dtype=torch.float32,
    device=None,
    programs=5,
    block_n=16,
    bundle=None,
    queries=1,
    seed=0,
):
    cache = paged(lengths, page, kv_heads, width, dtype, device, seed)
    q = randn((len(lengths) * queries, heads, width), dtype, device, seed + 1)
    options = {"page_size": page, "scale": width**-0.5, "window": window}
    config = decode.decode_config(arch(q.device), width, q.element_size(), heads // kv_heads, kv_heads, queries)
    config = config._replace(block_n=block_n, bundle=bundle or config.bundle)
    result = decode.decode_attention(
        q, *cache.arguments(), **options, queries=queries, programs=programs, config=config
    )
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * queries
    clean = cache.without_nan().arguments()
    expected = reference.prefill_attention(q, *clean[:4], starts, clean[4], **options, max_extend=queries)
    close(result, expected)


def check_prefill(
    prefixes,
    extends,
    *,
    page=16,
    heads=2,
    kv_heads=1,
    width=16,
    window=None,
    dtype=torch.float32,
    device=None,
    block_m=16,
    block_n=16,
    seed=0,
    slack=0,
):
    lengths = [p + e for p, e in zip(prefixes, extends, strict=True)]
    cache = paged(lengths, page, kv_heads, width, dtype, device, seed)
    starts = torch.tensor([0, *extends]).cumsum(0).int().to(device)
    q = randn((sum(extends), heads, width), dtype, device, seed + 1)
    options = {"page_size": page, "scale": width**-0.5, "window": window, "max_extend": max(extends) + slack}
    table = (*cache.arguments()[:4], starts, cache.seq_lens)
    clean = (*cache.without_nan().arguments()[:4], starts, cache.seq_lens)
    result = prefill.prefill_attention(q, *table, **options, block_m=block_m, block_n=block_n)
    close(result, reference.prefill_attention(q, *clean, **options))


LENGTHS = [1, 15, 16, 17, 33, 64, 100]


@pytest.mark.parametrize("page", [1, 3, 4, 8, 16, 64])
def test_decode_agrees_at_any_page_size_and_over_uneven_lengths(page, dtype, device):
    check_decode(LENGTHS, page=page, dtype=dtype, device=device)


@pytest.mark.parametrize("page, block_n", [(4, 32), (16, 64), (12, 32)])
def test_decode_agrees_where_a_block_holds_several_pages(page, block_n, device):
    check_decode(LENGTHS, page=page, block_n=block_n, window=37, device=device)


@pytest.mark.parametrize("heads, kv_heads, width", [(2, 2, 16), (8, 4, 16), (12, 4, 32), (16, 2, 64)])
def test_decode_agrees_when_two_kv_heads_share_a_tile(heads, kv_heads, width, dtype, device):
    check_decode([5, 48, 31, 200], heads=heads, kv_heads=kv_heads, width=width, bundle=2, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "queries, heads, kv_heads, bundle, window",
    [(2, 2, 1, 1, None), (4, 4, 2, 2, None), (4, 4, 2, 2, 3), (5, 3, 3, 1, 20), (7, 4, 2, 1, 3)],
)
def test_a_request_may_have_several_queries(queries, heads, kv_heads, bundle, window, device):
    shape = {"heads": heads, "kv_heads": kv_heads, "bundle": bundle, "window": window, "device": device}
    check_decode([7, 33, 130], queries=queries, **shape)
    check_decode([17, 16 + queries, 64], queries=queries, programs=40, **shape)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (4, 1), (8, 2), (7, 1), (14, 2), (8, 1), (32, 1)])
def test_decode_agrees_for_every_ratio_of_heads(heads, kv_heads, matrix_dtype, device):
    check_decode([5, 48, 31], heads=heads, kv_heads=kv_heads, dtype=matrix_dtype, device=device)


@pytest.mark.parametrize("width", [8, 64, 80, 96, 128, 256])
def test_decode_agrees_for_every_head_size(width, dtype, device):
    check_decode([20, 33], width=width, dtype=dtype, device=device)


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 16, 40])
def test_decode_agrees_however_many_programs_share_the_work(programs, device):
    check_decode([1, 200, 16, 3, 90], heads=4, kv_heads=2, programs=programs, device=device)


def test_one_long_request_among_short_ones_is_cut_into_many_pieces(device):
    check_decode([2, 700, 5, 1], programs=12, page=1, device=device)
    check_decode([700], programs=12, heads=4, kv_heads=2, device=device)


@pytest.mark.parametrize("programs", [2, 3, 6])
def test_a_border_that_falls_between_two_requests_cuts_neither(programs, device):
    # Twelve units of four requests and a bundle: borders fall between pairs, inside them, or both.
    check_decode([48] * 4, programs=programs, device=device)
    check_decode([16, 80, 16, 80], programs=programs, device=device)


@pytest.mark.parametrize("window", [1, 3, 16, 17, 40, 1000])
def test_decode_sees_no_further_back_than_its_window(window, matrix_dtype, device):
    check_decode(LENGTHS, window=window, dtype=matrix_dtype, device=device)


def test_decode_agrees_through_the_operator_and_its_own_configuration(dtype, device):
    cache = paged([130, 7], 16, 2, 64, dtype, device)
    q = randn((2, 8, 64), dtype, device, 9)
    options = {"page_size": 16, "scale": 0.2}
    expected = reference.decode_attention(q, *cache.without_nan().arguments(), **options)
    close(ops.decode_attention(q, *cache.arguments(), **options), expected)


def test_decode_reads_queries_out_of_a_fused_projection(device):
    cache = paged([9, 30], 16, 1, 16, torch.float32, device)
    q = randn((2, 4 * 16), torch.float32, device, 10)[:, 16:48].view(2, 2, 16)
    options = {"page_size": 16, "scale": 0.25}
    expected = reference.decode_attention(q, *cache.without_nan().arguments(), **options)
    close(ops.decode_attention(q, *cache.arguments(), **options), expected)


def test_the_result_of_a_request_does_not_depend_on_its_row_or_place_in_the_batch(device):
    cache = paged([40, 9, 77], 16, 1, 16, torch.float32, device)
    q = randn((3, 2, 16), torch.float32, device, 11)
    options = {"page_size": 16, "scale": 0.25}
    order = torch.tensor([2, 0, 1], device=device)
    straight = ops.decode_attention(q, *cache.arguments(), **options)
    moved = ops.decode_attention(
        q[order], cache.keys, cache.values, cache.table, cache.rows[order], cache.seq_lens[order], **options
    )
    close(moved, straight[order])


def test_rows_that_pad_a_batch_with_length_zero_give_zeros_and_disturb_no_one(device):
    cache = paged([40, 9], 16, 1, 16, torch.float32, device)
    q = randn((4, 2, 16), torch.float32, device, 12)
    options = {"page_size": 16, "scale": 0.25}
    alone = ops.decode_attention(q[1:3].contiguous(), *cache.arguments(), **options)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    lengths = torch.cat((zero, cache.seq_lens, zero))
    rows = torch.cat((cache.rows[:1], cache.rows, cache.rows[:1]))
    padded = ops.decode_attention(q, cache.keys, cache.values, cache.table, rows, lengths, **options)
    close(padded[1:3], alone)
    assert torch.equal(padded[[0, 3]], torch.zeros_like(padded[[0, 3]]))


@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_prefill_without_a_prefix_agrees_at_any_page_size(page, dtype, device):
    check_prefill([0, 0, 0], [1, 16, 41], page=page, dtype=dtype, device=device)


@pytest.mark.parametrize("prefix", [1, 15, 16, 17, 50])
def test_a_chunk_sees_its_prefix_and_itself(prefix, dtype, device):
    check_prefill([prefix], [23], dtype=dtype, device=device)


def test_uneven_requests_share_a_launch(dtype, device):
    check_prefill([0, 33, 7, 64, 16], [40, 1, 17, 5, 16], heads=4, kv_heads=2, dtype=dtype, device=device)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (2, 2), (4, 1), (7, 1), (14, 2), (8, 1), (32, 1)])
def test_prefill_agrees_for_every_ratio_of_heads(heads, kv_heads, matrix_dtype, device):
    check_prefill([5, 0], [9, 3], heads=heads, kv_heads=kv_heads, dtype=matrix_dtype, device=device)


@pytest.mark.parametrize("width", [8, 64, 80, 96, 128, 256])
def test_prefill_agrees_for_every_head_size(width, dtype, device):
    check_prefill([10], [20], width=width, dtype=dtype, device=device)


@pytest.mark.parametrize("window", [1, 3, 16, 17, 40, 1000])
def test_prefill_sees_no_further_back_than_its_window(window, matrix_dtype, device):
    check_prefill([0, 60], [50, 20], window=window, heads=1, dtype=matrix_dtype, device=device)


@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16), (64, 64), (16, 64)])
@pytest.mark.parametrize("window", [None, 20])
def test_prefill_agrees_for_every_shape_of_tile(block_m, block_n, window, device):
    check_prefill([37, 0], [45, 70], block_m=block_m, block_n=block_n, window=window, heads=1, device=device)


def test_a_bound_above_the_longest_extension_does_no_harm(device):
    check_prefill([3, 20], [7, 30], slack=100, device=device)


def test_prefill_agrees_through_the_operator_and_its_own_configuration(dtype, device):
    cache = paged([150, 40], 16, 2, 64, dtype, device)
    starts = torch.tensor([0, 100, 140], dtype=torch.int32, device=device)
    q = randn((140, 4, 64), dtype, device, 13)
    options = {"page_size": 16, "scale": 0.125, "max_extend": 100}
    table = cache.arguments()[:4]
    clean = cache.without_nan().arguments()[:4]
    expected = reference.prefill_attention(q, *clean, starts, cache.seq_lens, **options)
    close(ops.prefill_attention(q, *table, starts, cache.seq_lens, **options), expected)


@pytest.mark.parametrize("seed", range(6))
def test_attention_agrees_on_random_batches(seed, device):
    pick = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=pick))

    kv_heads, page = draw(1, 2), draw(1, 20)
    heads, window = kv_heads * draw(1, 5), draw(1, 60) if draw(0, 1) else None
    count = draw(1, 5)
    shape = {"heads": heads, "kv_heads": kv_heads, "page": page, "window": window, "device": device, "seed": seed}
    check_decode([draw(1, 90) for _ in range(count)], programs=draw(1, 9), **shape)
    check_prefill([draw(0, 60) for _ in range(count)], [draw(1, 40) for _ in range(count)], **shape)


def test_attention_names_the_arguments_it_does_not_take(device):
    cache = paged([5], 16, 2, 16, torch.float32, device)
    q = torch.ones((1, 4, 16), device=device)
    options = {"page_size": 16, "scale": 1.0}
    with pytest.raises(ValueError, match="q: 3 heads are not a multiple of the 2 KV heads"):
        ops.decode_attention(q[:, :3], *cache.arguments(), **options)
    with pytest.raises(TypeError, match=r"k_cache: torch\.float32 where torch\.float16"):
        ops.decode_attention(q.half(), *cache.arguments(), **options)
    with pytest.raises(TypeError, match=r"seq_lens: torch\.int64"):
        ops.decode_attention(q, *cache.arguments()[:4], cache.seq_lens.long(), **options)
    with pytest.raises(ValueError, match="window: 0"):
        ops.decode_attention(q, *cache.arguments(), **options, window=0)
    with pytest.raises(ValueError, match="q_starts: shape"):
        starts = torch.zeros(1, dtype=torch.int32, device=device)
        ops.prefill_attention(q, *cache.arguments()[:4], starts, cache.seq_lens, max_extend=1, **options)


@pytest.fixture
def scratch_of_nan():
    """Memory that is allocated and not written holds NaN, and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("programs, queries", [(1, 1), (6, 1), (40, 1), (9, 3)])
def test_pieces_that_no_program_wrote_reach_no_result(programs, queries, scratch_of_nan, device):
    shape = {"heads": 4, "kv_heads": 2, "bundle": 2, "programs": programs, "queries": queries, "device": device}
    check_decode([3, 100, 17, 40], **shape)
    check_decode([9, 130], window=20, **shape)
