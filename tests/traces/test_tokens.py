"""Tokens that a trace without text stands for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces.written import json_lines
from traces import TraceRequest, open_trace
from traces.requests.content import Blocks, Synthetic, synthetic_tokens

VOCAB = 128_256

contents = st.builds(
    lambda cuts, ids, size: Synthetic(
        spans=((0, "a"), *((cut, f"b{cut}") for cut in sorted(cuts))),
        blocks=Blocks(np.array(ids, np.int64), size, "s") if ids is not None else None,
    ),
    st.sets(st.integers(1, 300), max_size=3),
    st.none() | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6),
    st.integers(1, 70),
)


@given(contents, st.integers(0, 400), st.integers(0, 400), st.integers(4, 2**31 - 1), st.integers(0, 2**32))
def test_any_slice_of_synthetic_tokens_is_the_slice_of_the_whole(
    content: Synthetic, start: int, size: int, vocab: int, seed: int
) -> None:
    whole = synthetic_tokens(content, 0, 800, vocab, seed)
    assert np.array_equal(synthetic_tokens(content, start, start + size, vocab, seed), whole[start : start + size])
    assert whole.dtype == np.int32 and whole.min() >= 3 and whole.max() < vocab


def test_requests_share_no_synthetic_tokens_by_chance_and_a_seed_changes_them() -> None:
    a, b = (TraceRequest(name, 0.0, 1000, 10) for name in "ab")
    assert (a.prompt_tokens(VOCAB) == b.prompt_tokens(VOCAB)).mean() < 0.01
    assert (a.prompt_tokens(VOCAB) == a.prompt_tokens(VOCAB, seed=1)).mean() < 0.01
    assert len(set(a.prompt_tokens(VOCAB).tolist())) > 950


def test_synthetic_ids_spread_evenly_over_the_vocabulary() -> None:
    tokens = TraceRequest("a", 0.0, 100_000, 1).prompt_tokens(1003)
    counts = np.bincount(tokens, minlength=1003)
    assert counts[:3].sum() == 0 and counts[3:].min() > 50 and counts[3:].max() < 160


def test_a_vocabulary_with_nothing_to_synthesise_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 ids, not 3"):
        TraceRequest("a", 0.0, 1, 1).prompt_tokens(3)


def session(tmp_path: Path, *turns: tuple[int, int], **first: object) -> list[np.ndarray]:
    """[prompt, output, prompt, output, ...] of a session of our own format with only lengths."""
    records = [
        {"input_length": i, "output_length": o, "session_id": "s"} | ({"arrival_s": 0} | first if not n else {})
        for n, (i, o) in enumerate(turns)
    ]
    path = tmp_path / "t.jsonl"
    path.write_text(json_lines(*records))
    return [t for r in open_trace(path) for t in (r.prompt_tokens(VOCAB), r.output_tokens(VOCAB))]


def test_a_later_turn_holds_the_conversation_so_far(tmp_path: Path) -> None:
    p0, o0, p1, o1, p2, _ = session(tmp_path, (100, 20), (150, 30), (180, 5), hash_ids=[4], block_size=64)
    assert np.array_equal(p1[:120], np.concatenate([p0, o0]))
    assert np.array_equal(p2, np.concatenate([p1, o1]))


def test_a_shorter_later_turn_holds_the_conversations_beginning_and_goes_its_own_way(tmp_path: Path) -> None:
    p0, o0, p1, o1, p2, _ = session(tmp_path, (100, 50), (120, 30), (200, 5))
    assert np.array_equal(p1, np.concatenate([p0, o0])[:120])
    assert (o1 == o0[20:50]).mean() < 0.1
    assert np.array_equal(p2[:150], np.concatenate([p1, o1]))


def test_equal_hash_ids_mean_equal_tokens_only_within_a_scope(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    base = {"arrival_s": 0, "input_length": 10, "output_length": 1, "hash_ids": [1, 2], "block_size": 5}
    path.write_text(json_lines(*(base | more for more in ({}, {}, {"hash_scope": "x"}))))
    a, b, c = (request.prompt_tokens(VOCAB) for request in open_trace(path))
    assert np.array_equal(a, b) and not np.any(a == c)


def test_a_prompt_of_120_thousand_tokens_is_made_by_array_operations() -> None:
    blocks = Blocks(np.arange(235), 512)
    for content in (Synthetic(((0, "a"),)), Synthetic(((0, "a"),), blocks)):
        request = TraceRequest("a", 0.0, 120_000, 1, content=content)
        lines = 0

        def count(frame: FrameType, event: str, _: object) -> Any:
            nonlocal lines
            lines += event == "line"
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            request.prompt_tokens(VOCAB)
        finally:
            sys.settrace(before)
        # Lines of Python that ran, turns of loops included: some for a block of 512 tokens at most, none for a token.
        assert 0 < lines < 2_000


@settings(max_examples=20)
@given(st.integers(1, 2000))
def test_given_token_ids_stay_as_they_are(vocab: int) -> None:
    from traces.requests.content import TokenIds

    ids = np.arange(vocab, dtype=np.int32)
    request = TraceRequest("a", 0.0, vocab, 3, content=TokenIds(ids, None, "t"))
    assert np.array_equal(request.prompt_tokens(vocab), ids)
    assert len(request.output_tokens(2003)) == 3
