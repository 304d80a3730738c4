"""What ``benchmarks/gpu.py`` checks before it times: operators against their definition, tokens against the CPU's."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from backends.torch.backend import TorchBackend
    from benchmarks.gpu_run import Run

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def full_precision() -> None:
    """Have products of float32 matrices computed in float32: TF32's ten bits would fail a comparison of greedy tokens."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def check_kernels(run: Run) -> None:
    """Every operator of a model's step against its definition, both on this device."""
    from backends.torch.ops import reference, triton
    from benchmarks.kernels import Bench, cache

    full_precision()
    torch.manual_seed(0)
    checked = []
    for dtype in (torch.float32, torch.bfloat16) if run.device == "cuda" else (torch.float32,):
        bench = Bench(run.device, triton, small=run.device == "cpu")
        bench.dtype = dtype
        limit = TOLERANCE[str(dtype).removeprefix("torch.")]
        for name, call in _operator_calls(bench, cache):
            # The kernels may write in place: each set gets the same random numbers anew.
            results = []
            for ops in (triton, reference):
                torch.manual_seed(1)
                results.append(call(ops))
            worst = max(_difference(a, b) for a, b in zip(*results, strict=True))
            checked.append({"operator": name, "dtype": str(dtype), "worst": worst, "limit": limit})
            run.check(f"{name}, {dtype}", worst <= limit, f"differs by {worst:.2g} (relative or absolute)")
    run.write("kernel_checks", checked)
    run.say(f"kernels agree with the definition: {len(checked) - len(run.failed)} of {len(checked)} cases")


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative where numbers are large; infinite for NaN or another shape."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    worst = ((a.double() - b.double()).abs() / (1 + b.double().abs())).max().item()
    return worst if worst == worst else float("inf")


def _operator_calls(bench: Any, cache: Callable[..., Any]) -> Iterator[tuple[str, Callable[[Any], list[Any]]]]:
    """(name, function that runs an operator set on inputs it makes itself and returns the tensors to compare)."""
    device, small = bench.device, bench.small
    heads, kv_heads, width = (4, 2, 16) if small else (32, 8, 128)
    n, hidden = (5, 48) if small else (300, 1024)
    lengths = [20, 5, 33] if small else [1000, 1, 17, 3000, 512]

    def norms(ops: Any) -> list[Any]:
        x, residual, weight = bench.randn(n, hidden), bench.randn(n, hidden), bench.randn(hidden)
        return [ops.rms_norm(x, weight, 1e-6), *ops.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)]

    def inputs(normed: bool) -> Callable[[Any], list[Any]]:
        def call(ops: Any) -> list[Any]:
            q, k, v = bench.randn(n, heads + 2 * kv_heads, width).split((heads, kv_heads, kv_heads), 1)
            keys, values = (torch.zeros((2 * n, kv_heads, width), dtype=q.dtype, device=device) for _ in range(2))
            norms = (bench.randn(width), bench.randn(width)) if normed else (None, None)
            table, slots = torch.randn((n, width), device=device), torch.randperm(2 * n, device=device)[:n]
            number = torch.arange(n, device=device)
            return [ops.attention_inputs(q, k, v, *norms, 1e-6, number, table, keys, values, slots), keys, values]

        return call

    def activation(ops: Any) -> list[Any]:
        return [ops.silu_and_mul(bench.randn(n, 2 * hidden))]

    def decode(page: int) -> Callable[[Any], list[Any]]:
        def call(ops: Any) -> list[Any]:
            arguments = cache(bench, lengths, page, kv_heads, width)
            q = bench.randn(len(lengths), heads, width)
            return [ops.decode_attention(q, *arguments, page_size=page, scale=0.09)]

        return call

    def prefill(ops: Any) -> list[Any]:
        extends = [min(length, 700) for length in lengths]
        keys, values, table, rows, seq_lens = cache(bench, lengths, 16, kv_heads, width)
        starts = torch.tensor([0, *extends]).cumsum(0).int().to(device)
        q = bench.randn(sum(extends), heads, width)
        return [
            ops.prefill_attention(
                q, keys, values, table, rows, starts, seq_lens, max_extend=max(extends), page_size=16, scale=0.09
            )
        ]

    def sampled(ops: Any) -> list[Any]:
        rows, vocab = (2, 200) if small else (64, 151_936)
        logits = torch.randn((rows, vocab), device=device) * 3
        number = torch.arange(rows, device=device)
        return [
            ops.sample(
                logits,
                torch.full((rows,), heat, device=device),
                torch.full((rows,), k, dtype=torch.int32, device=device),
                torch.full((rows,), p, device=device),
                torch.zeros(rows, device=device),
                number,
                number,
            )
            for heat, k, p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 50, 0.9), (0.7, 0, 0.9))
        ]

    def experts(ops: Any) -> list[Any]:
        x, router = bench.randn(n, 64), bench.randn(n, 8).float()
        gate_up, down = bench.randn(8, 64, 64) / 8, bench.randn(8, 64, 32) / 8
        return [ops.moe(x, router, gate_up, down, top_k=2, renormalize=True)]

    yield "norms", norms
    yield "attention_inputs", inputs(False)
    yield "attention_inputs with norms", inputs(True)
    yield "silu_and_mul", activation
    yield "decode_attention, pages of 1", decode(1)
    yield "decode_attention, pages of 16", decode(16)
    yield "prefill_attention", prefill
    yield "sample", sampled

    def in_fp8(ops: Any) -> list[Any]:
        from backends.torch import fp8

        x, products = bench.randn(n, 256), []
        for block in (None, (128, 128)):
            how = fp8.Fp8(block)
            values, scales = fp8.quantise(bench.randn(96, 256).float() / 16, how)
            rows = fp8.row_scales(scales, 96, how).contiguous()
            products.append(ops.fp8_linear(x, values, rows, how.of(96, 256)[1]))
        return products

    yield "moe", experts
    yield "fp8_linear", in_fp8


def check_tokens(run: Run) -> None:
    """A small random model writes the same greedy tokens as the reference operators on the CPU do, in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from backends.torch.backend import make_backend
    from backends.torch.workers import RunnerOptions

    full_precision()
    size = (32, 48, 2, 2, 1, 16, 200) if run.quick else (256, 512, 4, 8, 2, 64, 2000)
    hidden, inner, layers, heads, kv_heads, width, vocab = size
    torch.manual_seed(0)
    # Weights large enough that the most likely token is so by a margin.
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            head_dim=width,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            initializer_range=0.15,
            tie_word_embeddings=False,
        )
    )
    draw = random.Random(1)
    lengths, new = ((6, 3), 3) if run.quick else ((40, 7, 90, 21, 130), 24)
    prompts = [[draw.randrange(3, vocab) for _ in range(length)] for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        wanted: dict[str, list[int]] | None = None
        sizes = (1, 2, 4, 8)
        cases: list[tuple[str, str, str, tuple[int, ...]]] = [
            ("reference operators on the CPU", "cpu", "reference", ())
        ]
        if run.device == "cuda":
            cases += [("kernels", "cuda", "triton", ()), ("kernels in CUDA graphs", "cuda", "triton", sizes)]
        else:
            cases += [("kernels in the interpreter", "cpu", "triton", ())]
            run.skip("greedy tokens with CUDA graphs, launches that wait for nothing", "there is no GPU")
        for name, device, ops, captured in cases:
            options = RunnerOptions(
                folder, device, "float32", ops=ops, rows=8, max_context=256, kv_tokens=2048, capture_sizes=captured
            )
            backend = make_backend(options, lambda row: None)
            for loop in ("normal", "overlap"):
                found = _tokens(backend, loop, prompts, new)
                wanted = wanted or found
                wrong = [rid for rid in wanted if found[rid] != wanted[rid]]
                run.check(f"greedy tokens, {name}, {loop}", not wrong, f"{len(wrong)} of {len(wanted)} requests differ")
            if device == "cuda":
                _check_waits(run, name, backend, prompts, new)
            backend.close()
    run.say(f"greedy tokens of {len(prompts)} prompts compared: {len(cases)} ways, two loops")


ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"logit_bias": ((7, 5.0), (11, -100.0))},
    {"ignore_eos": False, "min_new_tokens": 3, "stop_token_ids": (5, 9)},
    {"logprobs": 3},
    {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.01, "logprobs": 0, "frequency_penalty": 0.1},
)
"""What requests may ask for, each of which takes a way of its own through the sampler."""


def _check_waits(run: Run, name: str, backend: TorchBackend, prompts: list[list[int]], new: int) -> None:
    """Nothing on the way to a launch, of a prefill or a decode, makes the host wait for the device, whatever requests ask
    for: torch raises at what would. (Waiting for the event behind a result is no such thing.)"""
    every = [[*prompts[i % len(prompts)], 3 + i] for i in range(len(ASKED))]
    _tokens(backend, "overlap", every, new, ASKED)  # what is compiled and allocated once may wait
    torch.cuda.set_sync_debug_mode("error")
    problem = ""
    try:
        _tokens(backend, "overlap", prompts, new)
        _tokens(backend, "overlap", every, new, ASKED)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.check(f"launches that wait for nothing, {name}", not problem, problem)


def _tokens(
    backend: TorchBackend, loop: str, prompts: list[list[int]], new: int, asked: Sequence[dict[str, Any]] = ()
) -> dict[str, list[int]]:
    """Each request's continuation: greedy, or as it asks."""
    from benchmarks.open_loop import Arrival, replay

    asked = asked or [{}] * len(prompts)
    arrivals = [Arrival(f"r{i}", 0.0, prompt, new, asked[i]) for i, prompt in enumerate(prompts)]
    return replay(backend, loop, arrivals, max_running=8, keep_tokens=True).tokens
