"""Which rows are adjusted, and what the sampler may take of memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from backends.torch.ops import reference  # noqa: E402
from backends.torch.row_entries import RowEntries  # noqa: E402
from backends.torch.sampler import Sampler  # noqa: E402
from workbench.scheduler.batch import ModelWorkerBatch, NewRequest  # noqa: E402
from workbench.scheduler.request import SamplingParams  # noqa: E402

ROWS, VOCAB = 6, 50
PAIRS = st.lists(st.tuples(st.integers(-2, VOCAB + 2), st.floats(-5, 5, width=32)), max_size=4)


@given(st.lists(st.tuples(st.integers(0, ROWS - 1), PAIRS), max_size=12), st.permutations(range(ROWS)))
def test_rows_have_what_they_were_given_last_in_whatever_order_they_run(puts: list[Any], order: list[int]) -> None:
    entries, wanted = RowEntries(ROWS, VOCAB), {}
    for row, pairs in puts:
        entries.put(row, [token for token, _ in pairs], [value for _, value in pairs])
        wanted[row] = [(token, value) for token, value in pairs if 0 <= token < VOCAB]
    running = np.array(order[:4])
    found = sorted(zip(*(column.tolist() for column in entries.of(running)), strict=True))
    assert found == sorted((i, *pair) for i, row in enumerate(running.tolist()) for pair in wanted.get(row, ()))


def test_the_rehearsal_does_whatever_requests_may_ask_for_and_leaves_nothing_behind() -> None:
    calls: dict[str, Any] = {}

    def noted(name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            calls[name] = args, named
            return getattr(reference, name)(*args, **named)

        return call

    ops = SimpleNamespace(**{name: noted(name) for name in ("penalize", "forbid", "sample", "logprobs")})
    sampler = Sampler(ROWS + 1, VOCAB, (2,), torch.device("cpu"), ops)
    with sampler.with_tables():
        held = sampler._counts
        assert held is not None and held.shape == (ROWS + 1, VOCAB)
        sampler.rehearse(torch.randn(ROWS, VOCAB))
        assert sampler._counts is held
    assert set(calls) == {"penalize", "forbid", "sample", "logprobs"}
    # The gathered rows of both tables, beside the tables themselves.
    logits, counts, in_prompt = calls["penalize"][0][:3]
    assert logits.shape == counts.shape == in_prompt.shape == (ROWS, VOCAB)
    assert calls["sample"][1] == {"all_greedy": False, "filtered": True}
    assert calls["logprobs"][0][0].data_ptr() != logits.data_ptr()  # the logits before they were changed are kept
    assert sampler._counts is None and sampler._in_prompt is None


def sampled(params: list[SamplingParams], logits: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """(what the operators got, tokens) of a first step of requests in rows 4, 3, ..."""
    seen: dict[str, Any] = {}

    def sample(logits: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        seen.update(sample=logits, parameters=args[:5], **named)
        return reference.sample(logits, *args, **named)

    def logprobs(logits: torch.Tensor, *args: Any) -> Any:
        seen.update(logprobs=logits)
        return reference.logprobs(logits, *args)

    ops = SimpleNamespace(sample=sample, logprobs=logprobs, penalize=reference.penalize)
    sampler = Sampler(ROWS + 1, VOCAB, (2,), torch.device("cpu"), ops)
    rows, ids = np.arange(len(params), 0, -1), np.array([5, 6], np.int32)
    sampler.start(tuple(NewRequest(int(row), f"r{row}", 2, ids, p) for row, p in zip(rows, params, strict=True)))
    lens = np.full(len(rows), 2)
    batch = ModelWorkerBatch(
        *(0, "prefill", rows, 0, lens, lens, len(rows), len(rows), int(lens.sum()), 0, int(lens.sum())),
        *(None, None, (), None, None, (), 0, 0, len(rows)),
    )
    tokens, _ = sampler.sample(logits, batch, torch.from_numpy(rows), torch.from_numpy(lens))
    seen["tables"] = (sampler._temperature, sampler._top_k, sampler._top_p, sampler._min_p, sampler._seeds)
    return seen, tokens


GREEDY = SamplingParams(9, temperature=0.0)


def test_rows_that_are_all_greedy_gather_no_parameters_and_keep_the_dtype_of_their_logits() -> None:
    logits = torch.randn(3, VOCAB).bfloat16()
    seen, tokens = sampled([GREEDY] * 3, logits)
    assert seen["all_greedy"] and seen["sample"] is logits and "logprobs" not in seen
    for mine, table in zip(seen["parameters"], seen["tables"], strict=True):
        assert mine.data_ptr() == table.data_ptr() and len(mine) == 3
    assert tokens.tolist() == logits.argmax(-1).tolist()
    seen, _ = sampled([GREEDY, replace(GREEDY, temperature=0.5, top_p=0.9)], logits[:2])
    assert not seen["all_greedy"] and seen["sample"].dtype == torch.bfloat16
    assert seen["parameters"][0].tolist() == [0.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "asked",
    [
        {"logit_bias": ((7, 100.0), (VOCAB + 3, 5.0))},
        {"min_new_tokens": 4, "stop_token_ids": (9, VOCAB + 1)},
        {"repetition_penalty": 1.3},
    ],
)
def test_only_what_is_changed_is_sampled_in_full_precision_and_log_probabilities_are_those_before(asked, dtype) -> None:
    logits = torch.randn(2, VOCAB).to(dtype)
    logits[0, 2] = logits[1, 9] = 50.0  # both stop
    before = logits.clone()
    seen, tokens = sampled([replace(GREEDY, logprobs=2), replace(GREEDY, **asked)], logits)
    assert seen["sample"].dtype == torch.float32
    assert torch.equal(seen["logprobs"], before)
    assert tokens[0] == 2
    if "logit_bias" in asked:
        assert tokens[1] == 7
    elif "min_new_tokens" in asked:
        assert tokens[1] not in (2, 9)
    changed = (seen["sample"] != before.float()).nonzero().tolist()
    assert changed and all(row == 1 for row, _ in changed)
