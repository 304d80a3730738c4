"""One instance prefills and another decodes, for real: what comes out is what one that does both writes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.handover.halves import Pair
from tests.torch import live
from tests.torch.live import greedy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama."""
    from tests.torch.tiny import make

    folder = tmp_path_factory.mktemp("model")
    make("LlamaForCausalLM", folder)
    return folder


def prompts(count: int) -> list[list[int]]:
    """Some begin alike."""
    draw = random.Random(3)
    shared = [draw.randrange(3, 200) for _ in range(40)]
    made = []
    for i in range(count):
        own = [draw.randrange(3, 200) for _ in range(draw.randint(3, 60))]
        made.append(shared[: 8 * (i % 6)] + own if i % 2 else own)
    return made


def colocated(model: Path, asked: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """What one instance that does both writes."""
    backend = live.backend_of(str(model), rows=16, kv_tokens=4096, page_size=4)
    try:
        run = live.serve(backend, [live.messages(asked, greedy(tokens))], page_size=4, max_running=16)
    finally:
        backend.close()
    return [run.outputs[f"r{i}"] for i in range(len(asked))]


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_a_pair_writes_what_one_instance_does(model: Path, loop: str) -> None:
    asked = prompts(5)
    pair = Pair({"model": str(model), "kv_tokens": 1024, "page_size": 4, "max_context": 200, "loop": loop, "chunk": 24})
    try:
        numbers = [pair.submit(prompt, greedy(12)) for prompt in asked]
        found = pair.decode.read(*(decode for _, decode in numbers))
        handed = pair.prefill.read(*(prefill for prefill, _ in numbers))
    finally:
        pair.close()
    assert [answer.tokens for answer in found] == colocated(model, asked, 12)
    assert [answer.kind for answer in found] == ["length"] * 5
    assert [(answer.kind, answer.tokens) for answer in handed] == [("handed_over", [])] * 5
