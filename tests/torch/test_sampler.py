"""Which rows are adjusted, and what the sampler may take of memory."""

from __future__ import annotations

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

    ops = SimpleNamespace(**{name: noted(name) for name in ("penalize", "sample", "logprobs")})
    sampler = Sampler(ROWS + 1, VOCAB, (2,), torch.device("cpu"), ops)
    sampler.rehearse(torch.randn(ROWS, VOCAB))
    assert set(calls) == {"penalize", "sample", "logprobs"}
    # The gathered rows of both tables, beside the tables themselves.
    logits, counts, in_prompt = calls["penalize"][0][:3]
    assert logits.shape == counts.shape == in_prompt.shape == (ROWS, VOCAB)
    assert calls["sample"][1] == {"all_greedy": False, "filtered": True}
    assert calls["logprobs"][0][0].data_ptr() != logits.data_ptr()  # the logits before they were changed are kept
    assert sampler._counts is None and sampler._in_prompt is None
