"""What FP8 weights cost in quality and gain in speed: a section of ``benchmarks/gpu.py``, not a command."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = (("qwen3-0.6b", 25.0), ("qwen3-14b", 75.0))
"""Shapes of the offline benchmark, and about how long each takes until it has run once, in seconds."""


def fp8(run: Any, model: Any, forget: Any, repetitions: int) -> None:
    """Logits of one prompt in FP8 against the plain weights, and the offline benchmark in FP8 under overlap.

    ``run`` is ``benchmarks.gpu``'s, and so are ``model`` (writes a shape's config) and ``forget`` (frees memory).
    """
    from backends.torch.backend import make_backend
    from benchmarks.offline import make_options, requests, run_once

    prompts, outputs = requests(3, 0.01) if run.quick else requests(256, 1.0)
    found: dict[str, Any] = {}
    for shape, need_s in SHAPES:
        if not run.fits(shape, need_s):
            continue
        folder = model(run, shape)
        found[shape] = mine = {"quality": quality(folder, run.device, 8 if run.quick else 512), "overlap": []}
        forget(run)
        alike = mine["quality"]
        run.row(
            f"{shape} FP8 against plain logits of {alike['tokens']} tokens: cosine {alike['cosine_mean']:.4f} "
            f"(least {alike['cosine_least']:.4f}), same first choice {alike['same_choice']:.1%}"
        )
        options = replace(make_options(folder, run.device, prompts, outputs), fp8=True)
        backend = make_backend(options, lambda row: None)
        mine["kv_tokens"] = backend.kv_tokens
        run_once(backend, "overlap", prompts, [min(length, 4) for length in outputs])
        seconds = 0.0
        for repetition in range(repetitions):
            if repetition and not run.fits(f"{shape}, repetition {repetition + 1}", 1.1 * seconds):
                break
            seconds, tokens = run_once(backend, "overlap", prompts, outputs)
            mine["overlap"].append(tokens / seconds)
            run.write("fp8", found)
        backend.close()
        del backend
        forget(run)
        speeds = mine["overlap"]
        run.row(
            f"{shape} FP8 overlap: {statistics.median(speeds):,.0f} output tokens/s "
            f"({min(speeds):,.0f} to {max(speeds):,.0f}, {len(speeds)} times)"
        )


def quality(folder: Path, device: str, tokens: int) -> dict[str, Any]:
    """How near the logits of every token of a random prompt come to those of the plain weights."""
    plain, rounded = (_logits(folder, device, tokens, held).double() for held in (False, True))
    cosine = torch.nn.functional.cosine_similarity(plain, rounded, dim=-1)
    same = (plain.argmax(-1) == rounded.argmax(-1)).double()
    return {
        "tokens": tokens,
        "cosine_mean": float(cosine.mean()),
        "cosine_least": float(cosine.min()),
        "same_choice": float(same.mean()),
    }


@torch.no_grad()
def _logits(folder: Path, device: str, tokens: int, fp8: bool) -> Tensor:
    from backends.torch.forward_batch import ForwardBatch, KVPool
    from backends.torch.loader import load_model
    from backends.torch.ops import load_ops

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, config = load_model(
        str(folder), dtype=dtype, device=device, ops=load_ops("triton", device), load_format="dummy", fp8=fp8
    )
    place = torch.device(device)
    pool = KVPool.allocate(len(model.layers), tokens, model.kv_heads, config.head_dim, dtype, place)
    ids = torch.randint(0, config.vocab, (tokens,), generator=torch.Generator().manual_seed(3)).to(place)
    number = torch.arange(tokens, device=place)
    batch = ForwardBatch(
        input_ids=ids,
        positions=number,
        slots=number,
        rows=torch.zeros(1, dtype=torch.int64, device=place),
        seq_lens=torch.tensor([tokens], dtype=torch.int32, device=place),
        page_table=number.to(torch.int32)[None],
        page_size=1,
        num_prefill=1,
        prefill_tokens=tokens,
        q_starts=torch.tensor([0, tokens], dtype=torch.int32, device=place),
        max_extend=tokens,
    )
    return model.logits(model.forward(batch, pool)).cpu()
