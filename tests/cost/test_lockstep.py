"""Data-parallel ranks that share their experts take every step together."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from backends.simulated.clock import Clock
from backends.simulated.host import FREE_HOST
from backends.simulated.lockstep import LockStepBackend, LockStepGroup, LockStepInbox
from backends.simulated.sampler import ScriptedSampler
from reports.record.run_record import read_record
from tests.cost.test_profile import ROOT, workbench
from tests.world import Job, Rows, Run, _Outbox
from workbench.instance import LoopSpec, Recipe, start
from workbench.scheduler.config import SchedulerConfig

SAMPLE = ROOT / "traces" / "samples" / "sample.jsonl"


class GroupCost:
    """10 ms, and 1 ms for every rank that has something to run."""

    def __init__(self) -> None:
        self.seen: list[list[bool]] = []

    def group_forward(self, batches):
        self.seen.append([batch is not None for batch in batches])
        return 0.010 + 0.001 * sum(batch is not None for batch in batches)

    def transfer_s(self, batch, stage=0):
        return 0.0


def together(ranks: list[list[Job]], loop: str) -> tuple[list[Run], GroupCost, LockStepGroup]:
    """Run the jobs of each rank in one group."""
    env, cost = Clock(), GroupCost()
    group = LockStepGroup(env, cost, len(ranks))
    runs = []
    for rank, jobs in enumerate(ranks):
        config = SchedulerConfig(kv_tokens=4096, max_context=2048, batching="mixed", max_running=16)
        scripts = {job.rid: job.script() for job in jobs}
        sampler = ScriptedSampler(scripts.__getitem__, config.max_running)
        rows, inbox = Rows(), LockStepInbox(env, group, rank)
        backend = LockStepBackend(env, group, cost, FREE_HOST, sampler, rows.append, rank)

        def mailboxes(scheduler, inbox=inbox, rows=rows):
            return inbox, _Outbox(env, Run(scheduler, rows), True, None)

        instance = start(Recipe(loop=LoopSpec(loop), scheduler=config), backend, mailboxes, backend.now_s)
        runs.append(instance.outbox.run)
        env.run_loop(instance.loop)

        def deliver(jobs=jobs, inbox=inbox):
            for job in sorted(jobs, key=lambda j: j.arrival_s):
                yield env.timeout(max(job.arrival_s - env.now, 0))
                inbox.put(job.message())

        env.process(deliver())
    env.run()
    return runs, cost, group


def job(rid: str, writes: int, arrival_s: float = 0.0) -> Job:
    return Job(rid, list(range(8)), writes, eos=False, arrival_s=arrival_s)


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_ranks_start_and_end_every_step_at_the_same_time(loop):
    runs, cost, group = together([[job("a", 6), job("b", 3)], [job("c", 6)]], loop)
    times = [[(row[5], row[6]) for row in run.rows] for run in runs]
    assert times[0] == times[1] and len(times[0]) == 6
    assert all(end - start == pytest.approx(0.012) for start, end in times[0])
    assert all(all(step) for step in cost.seen) and group.empty_parts == 0


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_a_rank_with_nothing_to_run_takes_part_in_every_step_of_the_others(loop):
    runs, _cost, group = together([[job("a", 5)], []], loop)
    assert runs[0].ended.keys() == {"a"} and not runs[1].rows
    assert group.steps == group.empty_parts == 5
    assert runs[0].end_s["a"] == pytest.approx(5 * 0.011)


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_a_rank_that_wakes_up_joins_a_step_and_never_splits_one(loop):
    runs, cost, _ = together([[job("a", 12)], [job("b", 3, arrival_s=0.030)]], loop)
    spans = sorted({(row[5], row[6]) for run in runs for row in run.rows})
    for (_, end), (begin, _) in pairwise(spans):
        assert begin >= end - 1e-12, "two steps of the group overlap"
    assert sum(all(step) for step in cost.seen) == 3
    assert runs[1].first_s["b"] <= 0.030 + 3 * 0.012


def test_every_request_gets_what_it_was_to_write():
    jobs = [[job(f"{rank}-{i}", 2 + (3 * i + rank) % 7, 0.007 * i) for i in range(12)] for rank in range(3)]
    runs, _, _ = together(jobs, "overlap")
    for rank, run in enumerate(runs):
        assert {rid: len(out) for rid, out in run.outputs.items()} == {j.rid: j.writes for j in jobs[rank]}


def test_shared_experts_on_the_command_line(tmp_path):
    flags = ("--model", "Qwen/Qwen3-30B-A3B", "--dp", 2, "--ep", 2, "--requests", 40, "--batching", "mixed")
    done = workbench("simulate", SAMPLE, *flags, "--out", tmp_path / "o", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"]["overlap"]["metrics"]["requests_finished"] == 40
    steps = read_record(tmp_path / "o/overlap").iterations
    by_rank = [
        dict(zip(steps["start_s"][steps["instance"] == n], steps["end_s"][steps["instance"] == n], strict=True))
        for n in (0, 1)
    ]
    shared = by_rank[0].keys() & by_rank[1].keys()
    assert len(shared) > 20 and all(by_rank[0][start] == by_rank[1][start] for start in shared)
    assert np.all(np.diff(sorted(by_rank[0])) > 0)
    odd = workbench("simulate", SAMPLE, "--model", "Qwen/Qwen3-30B-A3B", "--dp", 2, "--ep", 4, "--out", tmp_path / "x")
    assert odd.returncode == 2 and odd.stderr.startswith("error: ep: 4 must equal tp (1) or tp * dp (2)")
