"""Rows that may sample only what a mask allows, on a real runner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.torch.ops import reference as reference_ops  # noqa: E402
from backends.torch.vocabulary_masks import forbid  # noqa: E402
from tests.constrained import constrain, follows, packed  # noqa: E402
from tests.torch.live import backend_of, greedy, messages, serve  # noqa: E402
from tests.torch.tiny import VOCAB, make, prompts, reference  # noqa: E402
from workbench.scheduler.batch import KVCopy, ModelWorkerBatch, NewRequest  # noqa: E402

NEW = 12
PROMPTS = prompts((21, 5, 34, 17))
CONSTRAINED = {"r1", "r2"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> tuple[str, list[list[int]]]:
    """(folder of a random model, transformers' greedy continuations of PROMPTS)."""
    folder = tmp_path_factory.mktemp("llama")
    made = make("LlamaForCausalLM", folder)
    return str(folder), [reference(made, prompt, NEW)[0] for prompt in PROMPTS]


def check(monkeypatch: Any, model: Any, loop: str, page_size: int = 1, **options: Any) -> None:
    folder, expected = model
    constrain(monkeypatch, CONSTRAINED, VOCAB)
    # One that is constrained draws at random, with a filter and penalties, and wants log probabilities.
    drawn = replace(greedy(NEW), temperature=1.5, top_p=0.9, repetition_penalty=1.2, seed=3, logprobs=2)
    params = [greedy(NEW), greedy(NEW), drawn, greedy(NEW)]
    backend = backend_of(folder, page_size=page_size, **options)
    try:
        groups = [[message] for message in messages(PROMPTS, params)]
        run = serve(backend, groups, loop, max_running=8, slots=options.get("pp", 1), page_size=page_size, chunk=16)
        backend.launch(batch(masked=np.array([0])))  # nobody samples it, and closing does not wait for that
    finally:
        backend.close()
    assert {rid: len(tokens) for rid, tokens in run.outputs.items()} == {f"r{i}": NEW for i in range(len(PROMPTS))}
    for i, prompt in enumerate(PROMPTS):
        written = run.outputs[f"r{i}"]
        pairs = zip([prompt[-1], *written], written, strict=False)
        if f"r{i}" in CONSTRAINED:
            assert all(follows(token, before) for before, token in pairs), f"r{i}: {written}"
        else:
            assert written == expected[i], f"r{i}"
            assert not all(follows(token, before) for before, token in pairs), "the model keeps to the rule by itself"
    masked = [batch.worker.masked is not None for batch in run.batches]
    assert any(masked) and not all(masked)


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
def test_masked_rows_write_what_is_allowed_and_the_others_what_they_would_have(
    monkeypatch: Any, model: Any, loop: str
) -> None:
    check(monkeypatch, model, loop)


@pytest.mark.parametrize("loop, tp, pp", [("overlap", 2, 1), ("pipeline", 1, 2)])
@pytest.mark.slow
def test_the_ranks_of_a_group_sample_with_the_same_masks(
    monkeypatch: Any, model: Any, loop: str, tp: int, pp: int
) -> None:
    check(monkeypatch, model, loop, page_size=4, tp=tp, pp=pp)


def test_a_bit_a_token_forbids_what_is_not_set_up_to_the_last_token() -> None:
    random = np.random.default_rng(0)
    for vocab in (1, 31, 32, 33, 200):
        logits = torch.randn(4, vocab)
        allowed = random.random((2, vocab)) < 0.5
        before = logits.clone()
        forbid(logits, np.array([3, 1]), packed(allowed), reference_ops)
        assert torch.equal(logits[[0, 2]], before[[0, 2]])
        for row, bits in ((3, allowed[0]), (1, allowed[1])):
            at = torch.from_numpy(bits)
            assert torch.equal(logits[row, at], before[row, at])
            assert (logits[row, ~at] == float("-inf")).all()


def batch(**more: Any) -> ModelWorkerBatch:
    """One prompt of three tokens."""
    ids = np.array([5, 6, 7], np.int32)
    made = ModelWorkerBatch(
        *(0, "prefill", np.arange(1), 0, np.array([3]), np.array([3]), 1, 1, 3, 0, 3, ids, None),
        *((NewRequest(0, "r0", 3, ids, greedy(4)),), None, None, (), 3, 0, 1),
    )
    return made._replace(**more)


def test_masks_of_another_shape_are_refused_before_anything_is_sampled(model: Any) -> None:
    backend = backend_of(model[0])
    forward = backend.launch(batch(masked=np.array([0])))
    for masks in (np.zeros((1, 6), np.int32), np.zeros((2, 7), np.int32), np.zeros((1, 7), np.int64)):
        with pytest.raises(ValueError, match=r"1 rows over 200 tokens need int32\[1, 7\]"):
            backend.sample(forward, masks)
    backend.sample(forward, packed(np.arange(VOCAB)[None] == 42))
    assert forward.output().tokens.tolist() == [42]
    backend.close()


def test_what_a_model_cannot_do_yet_is_refused_by_name(model: Any) -> None:
    backend = backend_of(model[0])
    pages = np.arange(2, dtype=np.int32)
    with pytest.raises(
        NotImplementedError, match=r"kv_copies: the torch backend does not copy KV pages \(send\) with a batch"
    ):
        backend.launch(batch(kv_copies=(KVCopy("send", pages), KVCopy("load", pages))))
    with pytest.raises(NotImplementedError, match="query_lens: the torch backend decodes one token a row"):
        backend.launch(batch(num_prefill=0, prefill_tokens=0, decode_tokens=3))
    backend.close()
