"""One instance prefills and another decodes, for real: what comes out is what one that does both writes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.handover.halves import Answer, Pair
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


TIGHT: dict[str, Any] = {
    "page_size": 4,
    "max_context": 200,
    "chunk": 24,
    "max_running": 12,
}
DECODES: dict[str, Any] = {"kv_tokens": 320, "reserved_decode_tokens": 8}
"""Too little for as many as may run: some are retracted."""


def run_pair(
    model: Path,
    asked: list[list[int]],
    tokens: int,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[list[Answer], list[Answer], int]:
    """What the two write, and how often a request lost its KV where it was decoded. Nothing may be left of any."""
    run = {"model": str(model), "kv_tokens": 512, **TIGHT, **settings.pop("run", {})}
    pair = Pair(run, prefill=prefill, decode={**DECODES, **(decode or {})}, **settings)
    try:
        numbers = [pair.submit(prompt, greedy(tokens)) for prompt in asked]
        found = pair.decode.read(*(decode for _, decode in numbers))
        handed = pair.prefill.read(*(prefill for prefill, _ in numbers))
        for half in pair.halves:
            half.await_rest()
        return found, handed, pair.decode.beat().retractions
    finally:
        pair.close()


@pytest.fixture(scope="module")
def sixty(model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what one instance that does both writes."""
    asked = prompts(60)
    return asked, colocated(model, asked, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "transfer", "prefill_tp", "decode_tp", "retraction"),
    [
        ("normal", "tcp", 1, 1, "prefill"),
        ("overlap", "shm", 1, 1, "host"),
        ("overlap", "tcp", 1, 2, "host"),
        ("normal", "shm", 2, 1, "host"),
        ("overlap", "shm", 1, 1, "prefill"),
    ],
)
def test_sixty_requests_with_chunks_prefixes_and_retractions_are_written_as_by_one_instance(
    model: Path, sixty: Any, loop: str, transfer: str, prefill_tp: int, decode_tp: int, retraction: str
) -> None:
    asked, wanted = sixty
    found, handed, retractions = run_pair(
        model,
        asked,
        40,
        prefill={"tp": prefill_tp},
        decode={"tp": decode_tp, "decode_retraction": retraction},
        run={"loop": loop},
        kv_transfer=transfer,
    )
    assert [answer.tokens for answer in found] == wanted
    assert {answer.kind for answer in found} == {"length"}
    assert {(answer.kind, *answer.tokens) for answer in handed} == {("handed_over",)}
    assert any(answer.cached_tokens for answer in found), "no prefix was found"
    assert any(len(prompt) > 24 for prompt in asked), "no chunks"
    assert retractions, "nobody was retracted"


@pytest.mark.parametrize(("loop", "cache"), [("normal", False), ("overlap", True)])
def test_a_pair_writes_what_one_instance_does(model: Path, loop: str, cache: bool) -> None:
    asked = prompts(6)
    found, handed, _ = run_pair(model, asked, 12, decode={"decode_cache": cache}, run={"loop": loop})
    assert [answer.tokens for answer in found] == colocated(model, asked, 12)
    assert [answer.kind for answer in found] == ["length"] * 6
    assert [(answer.kind, answer.tokens) for answer in handed] == [("handed_over", [])] * 6


@pytest.mark.slow
def test_stages_of_a_prefill_instance_each_send_their_layers(model: Path) -> None:
    asked = prompts(6)
    found, _, _ = run_pair(model, asked, 12, prefill={"pp": 2})
    assert [answer.tokens for answer in found] == colocated(model, asked, 12)


def test_log_probabilities_come_with_every_token_the_first_included(model: Path) -> None:
    asked, params = prompts(3), greedy(5, logprobs=3)
    backend = live.backend_of(str(model), rows=16, kv_tokens=1024, page_size=4)
    try:
        wanted = live.serve(backend, [live.messages(asked, params)], page_size=4).logprobs
    finally:
        backend.close()
    pair = Pair({"model": str(model), "kv_tokens": 512, **TIGHT})
    try:
        numbers = [pair.submit(prompt, params) for prompt in asked]
        found = pair.decode.read(*(decode for _, decode in numbers))
        pair.prefill.read(*(prefill for prefill, _ in numbers))
    finally:
        pair.close()
    for i, answer in enumerate(found):
        assert len(answer.logprobs) == len(answer.tokens) == 5
        for told, (sampled, top, ids) in zip(answer.logprobs, wanted[f"r{i}"], strict=True):
            assert told.top_ids == ids
            assert [told.logprob, *told.top_logprobs] == pytest.approx([sampled, *top], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "the weights there and here differ"),
        ({"dtype": "bf16"}, "kv_dtype is fp32 there and bf16 here"),
        ({"page_size": 8}, "page_size is 4 there and 8 here"),
    ],
)
def test_a_model_that_is_not_the_same_is_told_apart(
    model: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], line: str
) -> None:
    run = {"model": str(model / "config.json"), "kv_tokens": 512, "dtype": "fp32", **TIGHT}
    pair = Pair(run, decode=changes, load_format="dummy")
    try:
        (answer,) = pair.decode.read(pair.decode.submit([5, 6, 7], greedy(4), 1, pair.prefill))
        pair.decode.await_rest()
    finally:
        pair.close()
    assert (answer.kind, answer.detail) == ("aborted", "prefill_gone")
    assert [told for told in capfd.readouterr().err.splitlines() if line in told]
