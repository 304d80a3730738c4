"""How near the kernels come to what the GPU can do. Needs a GPU.

    python benchmarks/kernels.py

Prints each kernel's time (the median of many replays of a CUDA graph, the cache flushed in between), and how much of it
its bytes would take at the copy bandwidth of the same GPU, or its operations at the matrix rate. Nothing is asserted.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from backends.torch.ops import triton as ops

REPEATS = 20


def seconds(step: Callable[[], object]) -> float:
    """Median time of ``step`` on the device, without what the host spends on launching it."""
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def report(what: str, taken: float, least: float) -> None:
    """One line; ``least``: the seconds that the bytes or operations alone would take."""
    print(f"{what:48} {taken * 1e6:9.1f} us, {least / taken:6.1%} of the bound")


def cache(lengths: list[int], page: int, kv_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, page table, rows and lengths of requests whose pages lie scattered."""
    counts = [-(-length // page) for length in lengths]
    pages = torch.randperm(sum(counts), device="cuda", dtype=torch.int32)
    table = torch.zeros((len(lengths), max(counts)), dtype=torch.int32, device="cuda")
    for row, mine in enumerate(pages.split(counts)):
        table[row, : len(mine)] = mine
    shape = (sum(counts) * page, kv_heads, width)
    keys, values = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    rows = torch.arange(len(lengths), device="cuda")
    return keys, values, table, rows, torch.tensor(lengths, dtype=torch.int32, device="cuda")


def decode(copy: float) -> None:
    uneven = [200 + 37 * i % 3000 for i in range(63)] + [16_000]
    for name, lengths in (("64 x 1000", [1000] * 64), ("256 x 1000", [1000] * 256), ("64 uneven", uneven),
                          ("1 x 32000", [32_000]), ("8 x 500", [500] * 8)):  # fmt: skip
        for page in (1, 16):
            arguments = cache(lengths, page, 8, 128)
            q = torch.randn((len(lengths), 32, 128), device="cuda").bfloat16()

            def step(q: Tensor = q, arguments: tuple[Tensor, ...] = arguments, page: int = page) -> Tensor:
                return ops.decode_attention(q, *arguments, page_size=page, scale=0.09)

            taken = seconds(step)
            moved = 2 * sum(lengths) * 8 * 128 * 2
            report(f"decode {name}, page {page}", taken, moved / copy)


def prefill(matrix: float) -> None:
    for name, prefixes, extends in (("1 x 8192", [0], [8192]), ("8 x 1024", [0] * 8, [1024] * 8),
                                    ("2048 after 8192", [8192], [2048]),
                                    ("32 x 16 after 4000", [4000] * 32, [16] * 32)):  # fmt: skip
        lengths = [p + e for p, e in zip(prefixes, extends, strict=True)]
        keys, values, table, rows, seq_lens = cache(lengths, 16, 8, 128)
        starts = torch.tensor([0, *extends]).cumsum(0).int().cuda()
        q = torch.randn((sum(extends), 32, 128), device="cuda").bfloat16()

        arguments = (q, keys, values, table, rows, starts, seq_lens)

        def step(arguments: tuple[Tensor, ...] = arguments, longest: int = max(extends)) -> Tensor:
            return ops.prefill_attention(*arguments, max_extend=longest, page_size=16, scale=0.09)

        taken = seconds(step)
        seen = sum(e * p + e * (e + 1) / 2 for p, e in zip(prefixes, extends, strict=True))
        work = 4 * seen * 32 * 128
        report(f"prefill {name}", taken, work / matrix)


def sampling(copy: float) -> None:
    logits = torch.randn((256, 152_064), device="cuda") * 3
    number = torch.arange(256, device="cuda")
    for name, heat, k, p, told in (("greedy", 0.0, 0, 1.0, {"all_greedy": True}),
                                   ("unfiltered", 1.0, 0, 1.0, {"filtered": False}),
                                   ("top_k 50, top_p 0.9", 1.0, 50, 0.9, {}), ("top_p 0.9", 0.7, 0, 0.9, {})):  # fmt: skip
        arguments = (
            torch.full((256,), heat, device="cuda"), torch.full((256,), k, dtype=torch.int32, device="cuda"),
            torch.full((256,), p, device="cuda"), torch.zeros(256, device="cuda"), number, number,
        )  # fmt: skip

        def step(arguments: tuple[Tensor, ...] = arguments, told: dict[str, bool] = told) -> Tensor:
            return ops.sample(logits, *arguments, **told)

        taken = seconds(step)
        report(f"sample 256 x 152064, {name}", taken, logits.nbytes / copy)


def experts(copy: float, matrix: float) -> None:
    gate_up = torch.randn((128, 2 * 768, 2048), device="cuda").bfloat16()
    down = torch.randn((128, 2048, 768), device="cuda").bfloat16()
    for tokens in (16, 64, 256, 8192):
        x = torch.randn((tokens, 2048), device="cuda").bfloat16()
        router = torch.randn((tokens, 128), device="cuda").bfloat16()
        taken = seconds(lambda x=x, router=router: ops.moe(x, router, gate_up, down, top_k=8, renormalize=True))
        touched = len(router.float().topk(8).indices.unique())
        least = max(touched * 3 * 768 * 2048 * 2 / copy, tokens * 8 * 6 * 768 * 2048 / matrix)
        report(f"moe {tokens} tokens, 128 experts of 768, top 8", taken, least)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Bytes read and written; a kernel that only reads is held against the same number.
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    a = torch.randn((8192, 8192), device="cuda").bfloat16()
    matrix = 2 * 8192**3 / seconds(lambda: a @ a)
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, bf16 products {matrix / 1e12:.0f} TFLOP/s")
    decode(copy)
    prefill(matrix)
    sampling(copy)
    experts(copy, matrix)


if __name__ == "__main__":
    main()
