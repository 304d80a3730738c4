"""A profile for tests whose times a reader can work out: every operator is linear in every variable."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from backends.simulated.cost.tables.own_profile import write_profile
from workbench.scheduler.batch import ModelWorkerBatch

DATA = Path(os.environ.get("WORKBENCH_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
LLAMA = DATA / "profiles/llmservingsim/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16"
needs_data = pytest.mark.skipif(not LLAMA.is_dir(), reason=f"the reference profiles are not at {DATA}")
MODEL, GPU = "Qwen/Qwen3-0.6B", "h100"
LAYERS = 28
TOKENS = (1, 64, 256, 1024, 2048)
CONTEXTS = (16, 256, 1024, 4096)
DECODES = (1, 8, 64, 256)


def layer_s(tokens: float) -> float:
    return 20e-6 + 0.1e-6 * tokens


def head_s(sequences: float) -> float:
    return 100e-6 + 1e-6 * sequences


def attention_s(prompt: float, cached: float, decodes: float, context: float) -> float:
    return 5e-6 + 0.01e-6 * prompt + 1e-11 * prompt * cached + 1e-10 * decodes * context


def attention_rows() -> list[tuple[float, ...]]:
    alone = [(0, 0, n, kv, attention_s(0, 0, n, kv)) for n in DECODES for kv in CONTEXTS]
    chunks, prefixes = (16, 512, 2048), (0, 1024, 4096)
    bare = [(c, p, 0, 0, attention_s(c, p, 0, 0)) for c in chunks for p in prefixes]
    both = [
        (c, p, n, kv, attention_s(c, p, n, kv)) for c in chunks for p in prefixes for n in DECODES for kv in CONTEXTS
    ]
    return alone + bare + both


def linear_profile(folder: Path, model: str = MODEL, gpu: str = GPU, tp: int = 1, **meta: object) -> Path:
    """Write the profile and return its folder."""
    write_profile(
        folder,
        tp,
        {"model": model, "gpu": gpu, "dtype": "bf16", "engine": "by hand", **meta},
        {
            "layer": [("mlp", n, layer_s(n)) for n in TOKENS],
            "head": [("lm_head", n, head_s(n)) for n in (1, 256)],
            "attention": attention_rows(),
        },
    )
    return folder


def batch(lens: list[int], new: tuple[int, ...] = ()) -> ModelWorkerBatch:
    """A step of requests that are ``lens`` tokens long after it; the first compute ``new`` prompt tokens."""
    seq, extend, prompts = np.array(lens, np.int64), np.array(new, np.int64), len(new)
    decodes = len(seq) - prompts
    return ModelWorkerBatch(
        0,
        "decode" if not prompts else "mixed" if decodes else "prefill",
        np.arange(len(seq)),
        0,
        seq,
        np.concatenate((extend, np.ones(decodes, np.int64))),
        prompts,
        len(seq),
        int(extend.sum()),
        decodes,
        int(seq.sum()),
        None,
        None,
        (),
        None,
        None,
        (),
        0,
        0,
        0,
    )
