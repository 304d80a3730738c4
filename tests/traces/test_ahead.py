"""Tokens that are made for several requests at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import TraceRequest
from traces.files.errors import TraceError
from traces.requests.ahead import LONG_TOKENS, MOST_REQUESTS, with_tokens
from traces.requests.content import Blocks, Synthetic, TokenIds

IDS = np.arange(5, 12, dtype=np.int32)
CONTENTS = {
    "its own": None,
    "blocks": Synthetic(((0, "a"),), Blocks(np.arange(3), 4)),
    "two spans": Synthetic(((0, "a"), (5, "b"))),
    "given": TokenIds(IDS, IDS, "trace.jsonl"),
}


@st.composite
def requests(draw: st.DrawFn) -> list[TraceRequest]:
    found = []
    for number in range(draw(st.integers(0, 3 * MOST_REQUESTS))):
        kind = draw(st.sampled_from(["its own", "its own", "its own", *CONTENTS]))
        length = len(IDS) if kind == "given" else draw(st.sampled_from([1, 700, LONG_TOKENS - len(IDS), LONG_TOKENS]))
        session = draw(st.sampled_from([None, None, "s"]))
        request = TraceRequest(f"r{number}", 0.0, length, len(IDS), session_id=session)
        request.content = CONTENTS[kind] or request.content
        found.append(request)
    return found


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(requests(), st.integers(4, 2**31 - 1), st.integers(0, 9))
def test_tokens_made_together_are_those_of_each_request_alone(trace, vocab, seed):
    seen = []
    for request, tokens in with_tokens(trace, vocab, seed):
        seen.append(request)
        if tokens is not None:
            for made, alone in zip(tokens, request.tokens(vocab, seed), strict=True):
                assert made.dtype == np.int32 and np.array_equal(made, alone)
    assert seen == trace


def test_those_of_long_requests_sessions_blocks_and_given_ids_are_left_for_later():
    short, long = TraceRequest("short", 0.0, 9, 9), TraceRequest("long", 0.0, LONG_TOKENS, 9)
    others = [TraceRequest("turn", 0.0, 9, 9, session_id="s"), long]
    for kind in ("blocks", "two spans", "given"):
        others.append(TraceRequest(kind, 0.0, 7, 7, content=CONTENTS[kind]))
    made = {request.request_id: tokens for request, tokens in with_tokens([short, *others], 1000)}
    assert [name for name, tokens in made.items() if tokens is not None] == ["short"]


def test_no_more_is_read_ahead_than_is_made_together():
    read = []

    def trace() -> Iterator[TraceRequest]:
        for number in range(10_000):
            read.append(number)
            yield TraceRequest(f"r{number}", 0.0, 1, 1)

    next(with_tokens(trace(), 1000))
    assert len(read) == MOST_REQUESTS


def test_a_fault_in_the_trace_comes_after_the_requests_before_it():
    def trace() -> Iterator[TraceRequest]:
        for number in range(5):
            yield TraceRequest(f"r{number}", 0.0, 10, 10)
        raise TraceError("trace.jsonl", 6, "input_length", "'x' is not a whole number")

    seen = []
    with pytest.raises(TraceError, match="line 6"):
        for request, _ in with_tokens(trace(), 1000):
            seen.append(request.request_id)
    assert seen == [f"r{number}" for number in range(5)]
