"""Whatever a request asks of its tokens, a pair writes what one instance does, while others come, go and lose their KV."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.handover.halves import Pair
from tests.handover.test_pairs_of_real_models import model
from tests.torch import live
from workbench.scheduler.request import SamplingParams

__all__ = ["model"]  # a fixture

WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.8, "seed": 5, "top_k": 20},
    {"temperature": 1.0, "seed": 6, "top_p": 0.9, "min_p": 0.01, "logprobs": 0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 0.0, "logit_bias": ((7, 3.0), (9, -50.0))},
    {"temperature": 0.7, "seed": 9, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
]
STOPS = tuple(range(3, 60))
"""So many that outputs soon end with one of them."""


def asked(page: int, count: int, draw: random.Random) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of every kind: whole pages and one token more or less, some that begin alike, ends of every kind."""
    shared = [draw.randrange(3, 200) for _ in range(3 * page)]
    prompts, params = [], []
    for i in range(count):
        tokens = max(page * draw.randint(1, 40 // page) + (0, 0, 1, -1)[i % 4], 1)
        own = [draw.randrange(3, 200) for _ in range(tokens)]
        prompts.append((shared + own if i % 3 == 0 else own)[: len(own) if len(own) > page else None])
        if i % 6 == 1:
            prompts[-1] = prompts[i - 1][: len(prompts[i - 1]) // page * page] or own  # cached whole
        way = WAYS[i % len(WAYS)]
        new_tokens = (1, 2, 24, 30, 0, 17)[(i * 5) % 6]
        if i % 5 == 2:
            params.append(SamplingParams(40, stop_token_ids=STOPS, min_new_tokens=(0, 1, 9)[i % 3], **way))
        else:
            params.append(SamplingParams(new_tokens, ignore_eos=True, **way))
    return prompts, params


@pytest.mark.parametrize(
    ("page", "loop", "cache", "prefill_tp", "decode_tp", "retraction"),
    [
        (1, "normal", True, 1, 1, "host"),
        (16, "overlap", False, 1, 1, "host"),
        (4, "overlap", True, 1, 1, "prefill"),
        pytest.param(4, "overlap", True, 1, 2, "host", marks=pytest.mark.slow),
        pytest.param(4, "normal", True, 2, 1, "prefill", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_one_instance_whatever_is_asked_and_whoever_goes(
    model: Path, page: int, loop: str, cache: bool, prefill_tp: int, decode_tp: int, retraction: str
) -> None:
    draw = random.Random(page)
    prompts, params = asked(page, 36, draw)
    backend = live.backend_of(str(model), rows=40, kv_tokens=8192, page_size=page)
    try:
        wanted = live.serve(backend, [live.messages(prompts, params)], page_size=page, max_running=40)
    finally:
        backend.close()
    run = {"model": str(model), "page_size": page, "max_context": 200, "chunk": 24, "max_running": 12, "loop": loop}
    pair = Pair(
        {**run, "kv_tokens": 512},
        prefill={"tp": prefill_tp},
        decode={
            "tp": decode_tp,
            "kv_tokens": 208,
            "reserved_decode_tokens": 4,
            "decode_cache": cache,
            "decode_retraction": retraction,
        },
    )
    try:
        numbers, gone = [], []
        for i, (prompt, way) in enumerate(zip(prompts, params, strict=True)):
            numbers.append(pair.submit(prompt, way))
            if i % 2:  # one that goes, sooner or later, at either side
                gone.append(pair.submit(prompt[::-1], SamplingParams(60, ignore_eos=True)))
            if i % 3 == 2:
                prefill, decode = gone.pop(draw.randrange(len(gone)))
                if i % 4:
                    pair.decode.cancel(decode)
                else:
                    pair.prefill.cancel(prefill)
        for _, decode in gone:
            pair.decode.cancel(decode)
        found = pair.decode.read(*(decode for _, decode in numbers))
        handed = pair.prefill.read(*(prefill for prefill, _ in numbers))
        for half in pair.halves:
            half.await_rest()
    finally:
        pair.close()
    for i, (answer, way) in enumerate(zip(found, params, strict=True)):
        assert answer.tokens == wanted.outputs.get(f"r{i}", []), (i, way)
        finish = wanted.ended[f"r{i}"].finish
        assert finish is not None and answer.kind == finish.kind, (i, way)
        if way.logprobs is not None:
            assert len(answer.logprobs) == len(answer.tokens)
            for told, (sampled, top, ids) in zip(answer.logprobs, wanted.logprobs.get(f"r{i}", []), strict=True):
                assert told.top_ids == ids[: way.logprobs]
                assert [told.logprob, *told.top_logprobs] == pytest.approx([sampled, *top[: way.logprobs]], abs=1e-4)
    assert {answer.kind for answer in handed} == {"handed_over"}
    assert any(answer.cached_tokens for answer in found), "no prefix was found"
