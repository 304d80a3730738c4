"""Asking a scheduler how it stands, and changing its settings while it runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loops.test_loop_properties import check_the_end, check_the_pools, some_jobs, thorough
from tests.world import Job, simulate
from workbench.scheduler.config import CHANGEABLE, SchedulerConfig
from workbench.scheduler.messages import GetState, Pause, Resume, SetState
from workbench.scheduler.scheduler import Scheduler

VALUES = {
    "chunk": st.sampled_from([4, 16, 64, None]),
    "chunk_depth": st.sampled_from([None, 8]),
    "conservativeness": st.sampled_from([0.1, 1, 2.0]),
    "max_batch_tokens": st.integers(1, 64),
    "max_passed_over": st.sampled_from([None, 1, 64]),
    "max_prefill_streak": st.sampled_from([None, 1, 3]),
    "max_prefill_tokens": st.integers(1, 100),
    "max_running": st.integers(1, 9),
    "mixed_chunk": st.booleans(),
    "policy": st.sampled_from(["fcfs", "lpm", "priority", "random", "nosuch"]),
    "preempt_threshold": st.sampled_from([None, 1]),
    "share_in_batch_tokens": st.sampled_from([None, 4]),
}


@st.composite
def a_change(draw: st.DrawFn) -> tuple[float, dict[str, Any]]:
    """When, and which settings."""
    names = draw(st.sets(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3))
    return draw(st.floats(0, 0.4)), {name: draw(VALUES[name]) for name in sorted(names)}


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
@pytest.mark.slow
def test_settings_may_change_at_any_moment_and_every_request_still_ends_once_with_its_tokens(loop):
    @given(
        some_jobs(most=10),
        st.sampled_from(["prefill-first", "mixed"]),
        st.integers(1, 2),
        st.lists(a_change(), max_size=8),
        st.booleans(),
    )
    @thorough(80)
    def holds(
        jobs: list[Job], batching: str, page_size: int, changes: list[tuple[float, dict[str, Any]]], skip: bool
    ) -> None:
        refused: list[str | None] = []
        messages = [(at_s, SetState(given_, refused.append)) for at_s, given_ in changes]
        run = simulate(
            jobs,
            loop,
            messages=messages,
            batching=batching,
            page_size=page_size,
            kv_tokens=400,
            chunk=64,
            max_running=8,
            slots=2 if loop == "pipeline" else 1,
            max_batch_tokens=64,
            skip=skip and loop != "pipeline",
        )
        assert len(refused) == len(changes) and all(line is None or "\n" not in line for line in refused)
        if skip:  # skipped steps have no outbox that collects tokens
            assert sorted(run.ended) == sorted(job.rid for job in jobs)
            check_the_pools(run)
        else:
            check_the_end(jobs, run)

    holds()


def test_a_change_counts_from_the_next_batch_on_and_the_state_says_so():
    states: list[dict[str, Any]] = []
    refused: list[str | None] = []
    messages = [
        (0.0, GetState(states.append)),
        (0.001, SetState({"chunk": 10, "policy": "lpm"}, refused.append)),
        (0.002, GetState(states.append)),
    ]
    run = simulate([Job("a", list(range(100)), 3)], messages=messages, chunk=40)
    assert refused == [None]
    assert [batch.worker.prefill_tokens for batch in run.batches if batch.prefill] == [40, 10, 10, 10, 10, 10, 10]
    before, after = states
    assert before["settings"] | {"chunk": 10, "policy": "lpm"} == after["settings"]
    assert set(after["settings"]) == set(CHANGEABLE)
    assert (before["waiting"], after["prefilling"], after["batches_in_flight"]) == (1, 1, 0)
    assert after["kv_tokens"] == 4096 and after["kv_used_tokens"] == 40


def test_raising_a_limit_lets_in_who_was_turned_away():
    jobs = [Job(f"r{i}", [i] * 5, 40) for i in range(4)]
    lowered = [
        (0.0, SetState({"max_running": 1}, lambda why: None)),
        (0.1, SetState({"max_running": 4}, lambda why: None)),
    ]
    run = simulate(jobs, messages=lowered, max_running=4)
    together = [batch.worker.running for batch in run.batches]
    assert together[0] == 1 and max(together) == 4
    assert sorted(run.scheduled_s.values())[1] > 0.1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kv_tokens": 9}, "kv_tokens: cannot be changed while the scheduler runs; chunk, chunk_depth, "),
        ({"chunk": "9"}, "chunk: '9' is not int or null"),
        ({"mixed_chunk": 1}, "mixed_chunk: 1 is not bool"),
        ({"max_running": True}, "max_running: True is not int"),
        ({"max_running": 9}, "max_running: 9 is more than the 8 it was started with"),
        ({"chunk": None}, "a step of 16384 prompt tokens is more than the 64 it was started with"),
        ({"chunk": 0}, "chunk: 0 is less than 1"),
        ({"policy": "os:system"}, "policy: 'os:system' is not one of fcfs, "),
        ({"chunk": 32, "conservativeness": -1.0}, "conservativeness: -1.0 is not positive"),
    ],
)
def test_what_cannot_be_changed_is_refused_in_one_line_and_nothing_of_it_is_taken(settings, line):
    scheduler = Scheduler(SchedulerConfig(400, 200, max_running=8, chunk=64))
    before = scheduler.snapshot()
    refused: list[str | None] = []
    scheduler.receive([SetState(settings, refused.append)])
    assert refused[0] is not None and refused[0].startswith(line)
    assert scheduler.snapshot() == before


def test_a_paused_scheduler_answers_too():
    states: list[dict[str, Any]] = []
    run = simulate(
        [Job("a", [1] * 5, 4, arrival_s=0.2)],
        messages=[(0.1, Pause()), (0.3, GetState(states.append)), (0.4, Resume())],
    )
    assert states[0]["paused"] and states[0]["waiting"] == 1
    assert run.end_s["a"] > 0.4
