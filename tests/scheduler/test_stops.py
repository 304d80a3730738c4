"""Which samples end a request, against looking at each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.scheduler.request import Req, SamplingParams
from workbench.scheduler.stops import chosen, stacked, stop_ids_of, stopped

IDS = st.sampled_from([-2, 0, 1, 7, 255, 256, 65_536, 2**31 - 1])
"""Ids whose bytes turn up between those of others."""


def reqs_ending_at(ids: list[tuple[int, ...]]) -> list[Req]:
    prompt = np.array([1], np.int32)
    return [Req(f"r{i}", prompt, SamplingParams(4), 4, i, stop_ids=each) for i, each in enumerate(ids)]


some_ids = st.one_of(
    st.tuples(st.integers(1, 6), st.lists(IDS, max_size=1)).map(lambda drawn: [tuple(drawn[1])] * drawn[0]),
    st.lists(st.lists(IDS, max_size=3, unique=True).map(tuple), min_size=1, max_size=6),
)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(some_ids, st.sampled_from([np.int32, np.int64]), st.data())
def test_those_end_whose_sample_is_one_of_their_own_ids(ids, dtype, data):
    stop_ids = stop_ids_of(reqs_ending_at(ids))
    steps = np.array(
        data.draw(st.lists(st.lists(IDS, min_size=len(ids), max_size=len(ids)), min_size=1, max_size=5)), dtype
    )
    expected = [[i for i, token in enumerate(step) if token in ids[i]] for step in steps.tolist()]
    assert [list(stopped(stop_ids, step)) for step in steps] == expected
    together = [k * len(ids) + i for k, hits in enumerate(expected) for i in hits]
    assert list(stopped(stop_ids, steps.ravel())) == together


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(some_ids, some_ids, st.data())
def test_two_groups_one_above_the_other_end_as_each_did_and_so_do_some_of_them(upper, lower, data):
    both = [*upper, *lower]
    stop_ids = stacked(stop_ids_of(reqs_ending_at(upper)), stop_ids_of(reqs_ending_at(lower)), len(upper), len(lower))
    tokens = np.array(data.draw(st.lists(IDS, min_size=len(both), max_size=len(both))), np.int32)
    some = data.draw(st.lists(st.integers(0, len(both) - 1), unique=True, min_size=1).map(sorted))
    hits = [i for i, token in enumerate(tokens.tolist()) if token in both[i]]
    assert list(stopped(stop_ids, tokens)) == hits
    assert list(stopped(chosen(stop_ids, some), tokens[some])) == [some.index(i) for i in hits if i in some]


@pytest.mark.parametrize("ids", [(), (7,)])
def test_nobody_above_or_below_changes_nothing(ids):
    stop_ids = stop_ids_of(reqs_ending_at([ids, ids]))
    assert stacked(stop_ids, None, 2, 0) == stacked(None, stop_ids, 0, 2) == stop_ids
