"""What holds for every workload under every loop holds under the rules of engines, too, each alone and all together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loops.test_loop_properties import (
    HOSTS,
    LOOP_OPTIONS,
    check_the_end,
    check_the_pools,
    left_behind,
    same_tokens_in_all_loops,
    some_jobs,
    some_settings,
    some_trouble,
    thorough,
)
from tests.world import Job, simulate
from workbench.scheduler.request import Finish
from workbench.scheduler.rules import EngineRules
from workbench.scheduler.settings import settings_of
from workbench.settings.loading import settings_from

NAMES = ("sglang-0.5.23", "sglang-0.5.10.post1", "mini-sglang-20fcd7f")
ENGINES = [settings_from(None, {"engine": name}) for name in NAMES]
OTHERWISE: list[dict[str, Any]] = [
    {
        name: getattr(engine, name)
        for name, declared in settings_of(EngineRules).items()
        if getattr(engine, name) != declared.default
    }
    for engine in ENGINES
]
"""Rules of engines, where they are not this project's own."""


@st.composite
def some_rules(draw: st.DrawFn) -> dict[str, Any]:
    """All of one, or some of all."""
    if draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from(OTHERWISE))
    return {name: value for rules in OTHERWISE for name, value in rules.items() if draw(st.booleans())}


@pytest.mark.parametrize("draft_tokens", [0, 2])
@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
@pytest.mark.slow
def test_every_request_ends_once_with_its_own_tokens_and_nothing_is_lost(loop, draft_tokens):
    @thorough(8 if draft_tokens else 40)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = data.draw(some_jobs())
        config = {**data.draw(some_settings(loop, draft_tokens)), **data.draw(some_rules())}
        messages, timeouts = data.draw(some_trouble(jobs))
        options = data.draw(st.sampled_from(LOOP_OPTIONS[loop]))
        host = data.draw(st.sampled_from(HOSTS))
        run = simulate(jobs, loop, host=host, messages=messages, loop_options=options, **config, **timeouts)
        check_the_end(jobs, run)

    check()


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.slow
def test_skipped_steps_are_the_same_as_going_one_by_one(loop):
    @thorough(30)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = data.draw(some_jobs(8))
        messages, timeouts = data.draw(some_trouble(jobs))
        options = {**data.draw(some_settings(loop)), **data.draw(some_rules()), "messages": messages, **timeouts}
        one_by_one, skipped = simulate(jobs, loop, **options), simulate(jobs, loop, **options, skip=True)
        assert skipped.rows == one_by_one.rows
        assert skipped.end_s == one_by_one.end_s and skipped.ratios == one_by_one.ratios
        assert left_behind(skipped) == left_behind(one_by_one)
        check_the_pools(skipped)

    check()


@pytest.mark.slow
def test_all_loops_emit_the_same_tokens_under_random_eos():
    @thorough(20)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        same_tokens_in_all_loops(data, 0, data.draw(some_rules()))

    check()


@pytest.mark.parametrize("in_flight_token", ["keep", "lose"])
@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
def test_one_that_outgrows_the_pool_in_the_order_of_admission_is_cut_off_and_not_written_for_ever(
    loop, in_flight_token
):
    rules = {"batching": "mixed", "mixed_order": "admission", "in_flight_token": in_flight_token}
    jobs = [Job("a", list(range(10, 40)), 40)]
    run = simulate(jobs, loop, page_size=16, kv_tokens=48, **rules)
    assert run.ended["a"].finish == Finish("aborted", "kv_exhausted")
    assert run.outputs["a"] == jobs[0].script()[1].tolist()[:19]
