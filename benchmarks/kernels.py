"""How near the kernels come to what the GPU can do. Needs a GPU; ``benchmarks/gpu.py`` runs the same measurements.

    python benchmarks/kernels.py

Prints each kernel's time (the median of many replays of a CUDA graph, the cache flushed in between; three times over), and
how much of it its bytes would take at the copy bandwidth of the same GPU, or its operations at the matrix rate. Nothing is
asserted.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from backends.torch.cuda_graphs import without_collection

FLUSH_BYTES = 256 << 20
"""Written between two timings: several times the cache of any GPU."""


@dataclass(slots=True)
class Timed:
    """One kernel at one size."""

    name: str
    seconds: list[float]
    """One median a repetition."""
    least: float
    """Seconds that the bytes or operations alone would take on this device."""
    bound: str
    """``bytes`` or ``operations``: what ``least`` is made of."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"share_of_bound": self.least / self.median}

    def line(self) -> str:
        """For a person."""
        spread = (max(self.seconds) - min(self.seconds)) / self.median
        return (
            f"{self.name:48} {self.median * 1e6:10.1f} us (+-{spread / 2:4.1%}), {self.least / self.median:6.1%} of what "
            f"its {self.bound} allow"
        )


class Bench:
    """Where and how often to time. ``small`` takes sizes that a CPU (the Triton interpreter) can run: it tests the code."""

    def __init__(
        self, device: str, ops: ModuleType, *, small: bool = False, repetitions: int = 3, replays: int = 20
    ) -> None:
        self.device, self.ops, self.small = torch.device(device), ops, small
        self.repetitions, self.replays = repetitions, 1 if small else replays
        # The interpreter multiplies bfloat16 matrices wrongly.
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.copy = self.matrix = 0.0
        """Bytes (read and written) and operations a second, once measured."""

    def randn(self, *shape: int) -> Tensor:
        """Random numbers in the dtype that is measured."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def seconds(self, step: Callable[[], object]) -> list[float]:
        """Times of ``step`` on the device, without what the host spends on launching it; one median a repetition."""
        if self.device.type == "cpu":
            step()
            return [min(_wall(step) for _ in range(self.replays)) for _ in range(self.repetitions)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles before the capture
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with without_collection(), torch.cuda.graph(graph):
            step()
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        found = []
        for _ in range(self.repetitions):
            times = []
            for _ in range(self.replays):
                flush.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            found.append(statistics.median(times))
        return found

    def limits(self) -> dict[str, float]:
        """Measure the copy bandwidth and the rate of matrix products; the bounds of all that follows."""
        size = 1 << (20 if self.small else 30)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        # Bytes read and written; a kernel that only reads is held against the same number.
        self.copy = 2 * size / statistics.median(self.seconds(lambda: target.copy_(source)))
        side = 256 if self.small else 8192
        a, b = self.randn(side, side), self.randn(side, side)
        self.matrix = 2 * side**3 / statistics.median(self.seconds(lambda: a @ b))
        return {"copy_bytes_per_s": self.copy, "matrix_flop_per_s": self.matrix}

    def bytes(self, name: str, step: Callable[[], object], moved: float) -> Timed:
        """Time a kernel that is bound by the bytes it moves."""
        return Timed(name, self.seconds(step), moved / self.copy, "bytes")

    def operations(self, name: str, step: Callable[[], object], work: float) -> Timed:
        """Time a kernel that is bound by its operations."""
        return Timed(name, self.seconds(step), work / self.matrix, "operations")


def _wall(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def cache(bench: Bench, lengths: list[int], page: int, kv_heads: int, width: int) -> tuple[Tensor, ...]:
    """Keys, values, page table, rows and lengths of requests whose pages lie scattered."""
    device = bench.device
    counts = [-(-length // page) for length in lengths]
    pages = torch.randperm(sum(counts), device=device).to(torch.int32)
    table = torch.zeros((len(lengths), max(counts)), dtype=torch.int32, device=device)
    for row, mine in enumerate(pages.split(counts)):
        table[row, : len(mine)] = mine
    slots = sum(counts) * page
    keys, values = bench.randn(slots, kv_heads, width), bench.randn(slots, kv_heads, width)
    rows = torch.arange(len(lengths), device=device)
    return keys, values, table, rows, torch.tensor(lengths, dtype=torch.int32, device=device)


def elementwise(bench: Bench) -> Iterator[Timed]:
    """Norms, inputs of attention and activation, at the width of a 14B model, a decode's tokens and a prefill's."""
    for tokens in (4,) if bench.small else (256, 8192):
        yield from _elementwise(bench, tokens)


def _elementwise(bench: Bench, n: int) -> Iterator[Timed]:
    ops, device = bench.ops, bench.device
    hidden, inner, heads, kv_heads, width = (64, 96, 4, 2, 16) if bench.small else (5120, 17408, 40, 8, 128)
    x, residual, weight = bench.randn(n, hidden), bench.randn(n, hidden), bench.randn(hidden)
    item = x.element_size()
    name = f"add_rms_norm {n} x {hidden}"
    yield bench.bytes(name, lambda: ops.add_rms_norm(x, residual, weight, 1e-6), 4 * x.numel() * item)
    q, k, v = bench.randn(n, heads + 2 * kv_heads, width).split((heads, kv_heads, kv_heads), 1)
    keys, values = bench.randn(2 * n, kv_heads, width), bench.randn(2 * n, kv_heads, width)
    norms, table = (bench.randn(width), bench.randn(width)), torch.randn((1000, width), device=device)
    positions, slots = torch.arange(n, device=device) % 1000, torch.randperm(2 * n, device=device)[:n]
    moved = 2 * (q.numel() + 2 * k.numel()) * item
    yield bench.bytes(
        f"attention_inputs {n} x {heads}:{kv_heads} x {width}",
        lambda: ops.attention_inputs(q, k, v, *norms, 1e-6, positions, table, keys, values, slots),
        moved,
    )
    gate_up = bench.randn(n, 2 * inner)
    yield bench.bytes(f"silu_and_mul {n} x {inner}", lambda: ops.silu_and_mul(gate_up), 3 * n * inner * item)


def decode(bench: Bench) -> Iterator[Timed]:
    """One query a request over its context."""
    uneven = [200 + 37 * i % 3000 for i in range(63)] + [16_000]
    sizes = {
        "64 x 1000": [1000] * 64,
        "256 x 1000": [1000] * 256,
        "64 uneven": uneven,
        "1 x 32000": [32_000],
        "8 x 500": [500] * 8,
    }
    heads, kv_heads, width = (4, 2, 16) if bench.small else (32, 8, 128)
    for name, lengths in ({"3 uneven": [20, 5, 33]} if bench.small else sizes).items():
        for page in (1, 16):
            arguments = cache(bench, lengths, page, kv_heads, width)
            q = bench.randn(len(lengths), heads, width)

            def step(q: Tensor = q, arguments: tuple[Tensor, ...] = arguments, page: int = page) -> Tensor:
                return bench.ops.decode_attention(q, *arguments, page_size=page, scale=0.09)

            moved = 2 * sum(lengths) * kv_heads * width * q.element_size()
            yield bench.bytes(f"decode {name}, page {page}", step, moved)


def prefill(bench: Bench) -> Iterator[Timed]:
    """New tokens over their prefix and themselves."""
    sizes = {
        "1 x 4096": ([0], [4096]),
        "1 x 8192": ([0], [8192]),
        "8 x 1024": ([0] * 8, [1024] * 8),
        "2048 after 8192": ([8192], [2048]),
        "32 x 16 after 4000": ([4000] * 32, [16] * 32),
    }
    heads, kv_heads, width = (4, 2, 16) if bench.small else (32, 8, 128)
    for name, (prefixes, extends) in ({"2 uneven": ([0, 7], [20, 9])} if bench.small else sizes).items():
        lengths = [p + e for p, e in zip(prefixes, extends, strict=True)]
        keys, values, table, rows, seq_lens = cache(bench, lengths, 16, kv_heads, width)
        starts = torch.tensor([0, *extends]).cumsum(0).int().to(bench.device)
        arguments = (bench.randn(sum(extends), heads, width), keys, values, table, rows, starts, seq_lens)

        def step(arguments: tuple[Tensor, ...] = arguments, longest: int = max(extends)) -> Tensor:
            return bench.ops.prefill_attention(*arguments, max_extend=longest, page_size=16, scale=0.09)

        seen = sum(e * p + e * (e + 1) / 2 for p, e in zip(prefixes, extends, strict=True))
        yield bench.operations(f"prefill {name}", step, 4 * seen * heads * width)


def sampling(bench: Bench) -> Iterator[Timed]:
    """A token a row, by what the filters ask."""
    rows, vocab = (2, 200) if bench.small else (256, 152_064)
    device = bench.device
    logits = torch.randn((rows, vocab), device=device) * 3
    number = torch.arange(rows, device=device)
    for name, heat, k, p, told in (
        ("greedy", 0.0, 0, 1.0, {"all_greedy": True}),
        ("unfiltered", 1.0, 0, 1.0, {"filtered": False}),
        ("top_k 50, top_p 0.9", 1.0, 50, 0.9, {}),
        ("top_p 0.9", 0.7, 0, 0.9, {}),
    ):
        arguments = (
            torch.full((rows,), heat, device=device),
            torch.full((rows,), k, dtype=torch.int32, device=device),
            torch.full((rows,), p, device=device),
            torch.zeros(rows, device=device),
            number,
            number,
        )

        def step(arguments: tuple[Tensor, ...] = arguments, told: dict[str, bool] = told) -> Tensor:
            return bench.ops.sample(logits, *arguments, **told)

        yield bench.bytes(f"sample {rows} x {vocab}, {name}", step, logits.nbytes)


def experts(bench: Bench) -> Iterator[Timed]:
    """A mixture of gated experts."""
    count, inner, hidden, top_k = (4, 16, 32, 2) if bench.small else (128, 768, 2048, 8)
    gate_up, down = bench.randn(count, 2 * inner, hidden), bench.randn(count, hidden, inner)
    item = down.element_size()
    for tokens in (5,) if bench.small else (16, 64, 256, 8192):
        x, router = bench.randn(tokens, hidden), bench.randn(tokens, count)

        def step(x: Tensor = x, router: Tensor = router) -> Tensor:
            return bench.ops.moe(x, router, gate_up, down, top_k=top_k, renormalize=True)

        touched = len(router.float().topk(top_k).indices.unique())
        bytes_s = touched * 3 * inner * hidden * item / bench.copy
        work_s = tokens * top_k * 6 * inner * hidden / bench.matrix
        name = f"moe {tokens} tokens, {count} experts of {inner}, top {top_k}"
        yield Timed(name, bench.seconds(step), max(bytes_s, work_s), "bytes" if bytes_s > work_s else "operations")


def eight_bits(bench: Bench) -> Iterator[Timed]:
    """Products with FP8 weights, at the gate and up projections of a 14B model."""
    from backends.torch import fp8

    outputs, inputs = (64, 48) if bench.small else (34_816, 5120)
    weight = torch.randn((outputs, inputs), device=bench.device)
    for block in (None, (128, 128)):
        how = fp8.Fp8(block)
        values, scales = fp8.quantise(weight, how)
        rows, columns = fp8.row_scales(scales, outputs, how).contiguous(), how.of(outputs, inputs)[1]
        for tokens in (5,) if bench.small else (16, 64, 256, 8192):
            x = bench.randn(tokens, inputs)

            def step(x: Tensor = x, values: Tensor = values, rows: Tensor = rows, columns: int = columns) -> Tensor:
                return bench.ops.fp8_linear(x, values, rows, columns)

            bytes_s, work_s = values.nbytes / bench.copy, 2 * tokens * outputs * inputs / bench.matrix
            name = f"fp8_linear {tokens} x {inputs} x {outputs}, {'blocks' if block else 'one scale'}"
            yield Timed(name, bench.seconds(step), max(bytes_s, work_s), "bytes" if bytes_s > work_s else "operations")


GROUPS = {
    "decode": decode,
    "prefill": prefill,
    "elementwise": elementwise,
    "sampling": sampling,
    "experts": experts,
    "fp8": eight_bits,
}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU")
    from backends.torch.ops import triton as ops

    bench = Bench("cuda", ops)
    limits = bench.limits()
    print(
        f"{torch.cuda.get_device_name()}: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 products "
        f"{limits['matrix_flop_per_s'] / 1e12:.0f} TFLOP/s"
    )
    for group in GROUPS.values():
        for timed in group(bench):
            print(timed.line())


if __name__ == "__main__":
    main()
