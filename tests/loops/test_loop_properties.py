"""What holds for every workload under every loop, on random ones: the seeds are fixed, so every run tests the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.simulated.host import FREE_HOST, HostModel
from tests.world import Job, LinearCost, Run, simulate
from workbench.recording.recorder import Recorder
from workbench.scheduler.messages import Abort, FlushCache, Pause, Resume

HOSTS = (FREE_HOST, HostModel(), HostModel(schedule_s=0.02))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]

drafting = pytest.mark.parametrize("draft_tokens", [0, 1, 2, 3, 4])
"""Steps that bring each request one token, and steps that bring it a run of them: see tests/verifier.py."""


def thorough(examples: int):
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=SLOW)


def shared_prefix(which: int) -> list[int]:
    return [10 + (which * 7919 + i * i * 31 + i) % 90 for i in range(60)]


@st.composite
def some_jobs(
    draw: st.DrawFn, most: int = 14, at_once: bool = False, by_eos: bool = True, prompts_alone: bool = True
) -> list[Job]:
    """Requests with partly shared prompts, some arriving together, and some of which want no output (``prompts_alone``)."""
    jobs = []
    at_s = 0.0
    for i in range(draw(st.integers(1, most))):
        if not at_once:
            at_s += draw(st.sampled_from([0.0, 0.0, 0.003, 0.05]))
        rng = draw(st.randoms(use_true_random=False))
        own = [rng.randint(10, 99) for _ in range(draw(st.integers(1, 40)))]
        prompt = shared_prefix(draw(st.integers(0, 1)))[: draw(st.integers(0, 40))] + own
        writes = draw(st.integers(1, 30))
        bounds = [writes, writes + 5, 60, 4096, *([writes, 0] if prompts_alone else [])]
        bound = draw(st.sampled_from(bounds)) if by_eos else writes
        jobs.append(
            Job(
                f"r{i}",
                prompt,
                writes,
                bound=bound,
                arrival_s=at_s,
                priority=draw(st.integers(0, 3)),
                eos=by_eos,
                namespace=draw(st.sampled_from(["", "", "", "b"])),
                slo_ttft_s=draw(st.sampled_from([None, 0.1, 1.0])),
            )
        )
    return jobs


@st.composite
def some_settings(draw: st.DrawFn, loop: str, draft_tokens: int = 0) -> dict[str, object]:
    """Settings that work together, tight more often than not."""
    page_size = draw(st.sampled_from([1, 1, 2, 4, 16]))
    max_running = draw(st.sampled_from([1, 2, 3, 8]))
    chosen: dict[str, object] = {
        "page_size": page_size,
        "max_running": max_running,
        "slots": draw(st.sampled_from([1, 2, 3])) if loop == "pipeline" else 1,
        "batching": draw(st.sampled_from(["prefill-first", "prefill-first", "mixed"])),
        "kv_tokens": draw(st.sampled_from([96, 160, 400, 4096])),
        "max_context": draw(st.sampled_from([128, 2048])),
        "chunk": draw(st.sampled_from([16, 32, None, 8192])),
        "chunk_depth": draw(st.sampled_from([None, None, 8, 40])),
        "max_batch_tokens": draw(st.sampled_from([16, 64, 2048])),
        "policy": draw(st.sampled_from(["fcfs", "lpm", "dfs-weight", "lof", "sjf", "edf", "random", "priority"])),
        "cache": draw(st.sampled_from(["radix", "radix", "none"])),
        "evict": draw(st.sampled_from(["lru", "lfu", "fifo"])),
        "max_prefill_streak": draw(st.sampled_from([None, 1, 3])),
        "max_passed_over": draw(st.sampled_from([1, 64, None])),
        "share_in_batch_tokens": draw(st.sampled_from([None, 4, 32])),
    }
    step_tokens = max_running * (1 + draft_tokens)
    if draft_tokens:
        chosen["draft_tokens"] = draft_tokens
        chosen["max_batch_tokens"] = max(int(chosen["max_batch_tokens"]), step_tokens)
    if chosen["batching"] == "prefill-first" and chosen["chunk"] is None:
        chosen["chunk_depth"] = None
    if chosen["policy"] == "priority":
        threshold = draw(st.sampled_from([None, 1, 2]))
        chosen["preempt_threshold"] = threshold if chosen["batching"] == "prefill-first" else None
    chunk = chosen["chunk"]
    if chosen["batching"] == "prefill-first" and isinstance(chunk, int) and chunk >= step_tokens + page_size:
        chosen["mixed_chunk"] = draw(st.booleans())
    if chosen["policy"] != "dfs-weight" and not chosen.get("preempt_threshold") and draw(st.integers(0, 5)) == 5:
        chosen["cache"] = "blocks"
    if draw(st.sampled_from(["ours", "in turn"])) == "in turn":
        chosen |= draw(in_turn_rules(chosen))
    return chosen


@st.composite
def in_turn_rules(draw: st.DrawFn, chosen: dict[str, object]) -> dict[str, object]:
    """Mixed steps in the order of admission, and the prefix cache of blocks, with the rules that go with them."""
    policy = chosen["policy"] if chosen["policy"] != "dfs-weight" else "priority"
    # A step always has a token for each of those that may run.
    step_tokens = int(chosen["max_running"]) * (1 + int(chosen.get("draft_tokens", 0)))
    return {
        "batching": "mixed",
        "mixed_chunk": False,
        "preempt_threshold": None,
        "policy": policy,
        "mixed_order": "admission",
        "cache": draw(st.sampled_from(["blocks", "blocks", "blocks", "radix", "none"])),
        "max_batch_tokens": max(int(chosen["max_batch_tokens"]), step_tokens),
        "share_in_batch_tokens": draw(st.sampled_from([None, None, 4])),
        "blank_pages": draw(st.sampled_from(["free", "queue"])),
        "admit_for": draw(st.sampled_from(["chunk", "prompt"])),
        "preempt_first": draw(st.sampled_from(["newest", "priority"])),
        "after_own_preemption": draw(st.sampled_from(["stop", "go-on"])),
        "preemption_gap": draw(st.booleans()),
        "long_prefill_tokens": draw(st.sampled_from([None, None, 5, 20])),
        "long_prefill_alone": draw(st.sampled_from(["bounded", "free"])),
        "give_back": draw(st.sampled_from(["landed", "ended", "at_once"])),
        "aborted_kv": draw(st.sampled_from(["keep", "drop"])),
        "reserved_pages": draw(st.sampled_from([0, 1])),
    }


@st.composite
def some_trouble(draw: st.DrawFn, jobs: list[Job]) -> tuple[list[tuple[float, object]], dict[str, object]]:
    """Aborts, flushes, a pause and timeouts at random times."""
    at = st.floats(0, 0.6, allow_nan=False)
    messages: list[tuple[float, object]] = []
    if draw(st.booleans()):
        messages += [(draw(at), Abort(f"r{draw(st.integers(0, len(jobs)))}")) for _ in range(3)]
    if draw(st.integers(0, 3)) == 0:
        messages.append((draw(at), FlushCache()))
    if draw(st.integers(0, 3)) == 0:
        paused = draw(at)
        messages += [(paused, Pause()), (paused + 0.1, Resume())]
    timeouts: dict[str, object] = {}
    if draw(st.integers(0, 3)) == 0:
        timeouts["queue_timeout"] = 0.1
    if draw(st.integers(0, 3)) == 0:
        timeouts["request_timeout"] = 0.3
    return messages, timeouts


def check_the_end(jobs: list[Job], run: Run) -> None:
    """Everything that must hold once nothing is left to do. Ending once and the pools at every step: see the world."""
    assert set(run.ended) == {job.rid for job in jobs}
    check_the_pools(run)
    for job in jobs:
        req, got, script = run.ended[job.rid], run.outputs.get(job.rid, []), job.script()[1].tolist()
        assert req.finish is not None
        assert req.cached_tokens < len(job.prompt)
        assert req.output_len == len(got)
        if req.finish.kind == "rejected":
            assert not got and not req.scheduled
        elif req.finish.kind == "aborted":
            assert got == script[: len(got)]
        else:
            assert got == script[: min(job.writes, req.max_new)]
        if got:
            assert job.arrival_s <= run.first_s[job.rid] <= run.end_s[job.rid]


def check_the_record(jobs: list[Job], run: Run, recorder: Recorder) -> None:
    """Every token but a request's first has one gap, and the gaps of all add up to the time between first and last."""
    columns = recorder.request_columns()
    written = [len(run.outputs.get(job.rid, [])) for job in jobs]
    assert columns["output_tokens"].tolist() == written
    gaps_s, counts = recorder.inter_token_gaps()
    assert counts.sum() == sum(max(tokens - 1, 0) for tokens in written)
    assert (gaps_s[counts > 0] >= 0).all()
    if run.runs and not any(req.finish.kind == "aborted" for req in run.ended.values()):
        # An aborted request's last token came before it ended; the others' came with their end.
        spans_s = [run.end_s[job.rid] - run.first_s[job.rid] for job in jobs if job.rid in run.first_s]
        assert (gaps_s * counts).sum() == pytest.approx(sum(spans_s))


def check_the_pools(run: Run) -> None:
    """Nothing is lost and nothing is held."""
    scheduler = run.scheduler
    kv = scheduler.kv
    assert kv.available_pages == kv.pool.total
    assert kv.cache.counts.protected_pages == 0
    assert kv.table.free_rows == kv.table.rows
    assert not scheduler.lifecycle.by_id and not scheduler.queue.waiting and not scheduler.flights
    assert not scheduler.slots.partial


LOOP_OPTIONS = {"normal": [None], "overlap": [None, {"overlap_prefills": False}], "pipeline": [None]}


@drafting
@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
@pytest.mark.slow
def test_every_request_ends_once_with_its_own_tokens_and_nothing_is_lost(loop, draft_tokens):
    runs: list[int] = []

    @thorough(30 if draft_tokens else 150)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = data.draw(some_jobs())
        config = data.draw(some_settings(loop, draft_tokens))
        messages, timeouts = data.draw(some_trouble(jobs))
        stages = min(int(config["slots"]), data.draw(st.sampled_from([1, 2, 3])))  # or more micro-batches than stages
        recorder = Recorder(lambda: 0.0)
        run = simulate(
            jobs,
            loop,
            host=data.draw(st.sampled_from(HOSTS)),
            messages=messages,
            stages=stages,
            loop_options=data.draw(st.sampled_from(LOOP_OPTIONS[loop])),
            recorder=recorder,
            **config,
            **timeouts,
        )
        check_the_end(jobs, run)
        check_the_record(jobs, run, recorder)
        runs.extend(run.runs)

    check()
    assert {*runs} == {*range(1, draft_tokens + 2)} if draft_tokens else not runs


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.slow
def test_skipped_steps_are_the_same_as_going_one_by_one(loop):
    taken = []

    @thorough(150)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = [
            replace(job, writes=6 * job.writes, bound=job.bound and 6 * job.bound) for job in data.draw(some_jobs(8))
        ]
        messages, timeouts = data.draw(some_trouble(jobs))
        options = {
            "cost": data.draw(st.sampled_from([None, LinearCost(0.001, decode_s=1e-5)])),
            "host": data.draw(st.sampled_from(HOSTS)),
            "messages": messages,
            "loop_options": data.draw(st.sampled_from(LOOP_OPTIONS[loop])),
            **data.draw(some_settings(loop)),
            **timeouts,
        }
        one_by_one = simulate(jobs, loop, **options)
        skipped = simulate(jobs, loop, **options, skip=True)
        assert skipped.rows == one_by_one.rows
        assert skipped.first_s == one_by_one.first_s
        assert skipped.end_s == one_by_one.end_s
        assert skipped.scheduled_s == one_by_one.scheduled_s
        assert skipped.ratios == one_by_one.ratios
        assert left_behind(skipped) == left_behind(one_by_one)
        check_the_pools(skipped)
        taken.append(len(skipped.skipped_s) / max(len(skipped.rows), 1))

    check()
    assert sum(share > 0.3 for share in taken) > 30, "too few examples skip steps"


def left_behind(run: Run) -> tuple[object, ...]:
    """Everything that the past may change about the future: which page holds what, and what each request became."""
    scheduler = run.scheduler
    nodes = [(node.pages.tolist(), node.key.tolist(), node.locks) for node in scheduler.kv.cache.nodes()]
    reqs = [(rid, req.finish, req.output_len, req.cached_tokens, req.retractions) for rid, req in run.ended.items()]
    return scheduler.assembly.step, scheduler.kv.pool.free_pages().tolist(), nodes, reqs


@drafting
@pytest.mark.slow
def test_all_loops_emit_the_same_tokens_under_random_eos(draft_tokens):
    @thorough(15 if draft_tokens else 70)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        same_tokens_in_all_loops(data, draft_tokens)

    check()


def same_tokens_in_all_loops(data: st.DataObject, draft_tokens: int, rules: Mapping[str, object] = {}) -> None:
    jobs = data.draw(some_jobs())
    config = {**data.draw(some_settings("normal", draft_tokens)), **rules}
    host = data.draw(st.sampled_from(HOSTS))
    runs = [simulate(jobs, "normal", host=host, **config), simulate(jobs, "overlap", host=host, **config)]
    runs += [simulate(jobs, "pipeline", host=host, **{**config, "slots": slots}) for slots in (1, 2)]
    for run in runs:
        check_the_end(jobs, run)
    for run in runs[1:]:
        for job in jobs:
            kinds = {runs[0].ended[job.rid].finish.kind, run.ended[job.rid].finish.kind}
            # Whether a request that is too large for the pool ends for want of KV may depend on timing; nothing else may.
            if kinds <= {"length", "stop", "rejected"}:
                assert len(kinds) == 1
                assert run.outputs.get(job.rid) == runs[0].outputs.get(job.rid)


@drafting
@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_rows(loop, draft_tokens):
    @thorough(6 if draft_tokens else 25)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = data.draw(some_jobs())
        config = data.draw(some_settings(loop, draft_tokens))
        messages, timeouts = data.draw(some_trouble(jobs))
        host = data.draw(st.sampled_from(HOSTS))
        one, two = (
            simulate([replace(job) for job in jobs], loop, host=host, messages=messages, **config, **timeouts)
            for _ in range(2)
        )
        assert one.rows == two.rows
        assert one.end_s == two.end_s and one.first_s == two.first_s and one.outputs == two.outputs

    check()


def composition(run: Run) -> list[tuple]:
    """What each batch was made of, without its times."""
    return [tuple(row[:4]) + tuple(row[7:11]) for row in run.rows]


@thorough(60)
@given(st.data())
@pytest.mark.slow
def test_overlap_saves_at_most_the_cpu_time_it_can_hide(data):
    # Everyone is there from the start, has room, and stops by length: both loops run the same batches.
    jobs = data.draw(some_jobs(at_once=True, by_eos=False))
    host = data.draw(st.sampled_from(HOSTS))
    chunk = data.draw(st.sampled_from([16, 64, 8192]))
    page_size = data.draw(st.sampled_from([1, 4]))
    normal, overlap = (
        simulate(jobs, loop, host=host, chunk=chunk, page_size=page_size, max_running=64, kv_tokens=2048)
        for loop in ("normal", "overlap")
    )
    assert composition(normal) == composition(overlap)
    saved = max(normal.end_s.values()) - max(overlap.end_s.values())
    cpu = sum(sum(row[14:]) for row in normal.rows)
    assert -1e-9 <= saved <= cpu + 1e-9


@thorough(60)
@given(st.data())
def test_no_stage_runs_two_batches_at_a_time_and_no_batch_starts_before_the_stage_before_is_done(data):
    jobs = data.draw(some_jobs())
    loop = data.draw(st.sampled_from(["normal", "overlap", "pipeline"]))
    settings = data.draw(some_settings(loop, data.draw(st.sampled_from([0, 0, 0, 1, 4]))))
    run = simulate(jobs, loop, host=data.draw(st.sampled_from(HOSTS)), **settings)
    free: dict[int, float] = {}
    ended: dict[int, float] = {}
    for row in run.rows:
        step, stage, start, end = row[0], row[2], row[5], row[6]
        assert start >= free.get(stage, 0.0) and end > start
        if stage:
            assert start >= ended[step]
        free[stage] = ended[step] = end
    assert [row[0] for row in run.rows if row[2] == 0] == list(range(len(run.batches)))


@thorough(40)
@given(st.data())
def test_a_free_cpu_leaves_nothing_for_overlap_to_hide(data):
    jobs = data.draw(some_jobs(at_once=True, by_eos=False))
    normal, overlap = (simulate(jobs, loop, max_running=64, kv_tokens=2048) for loop in ("normal", "overlap"))
    assert composition(normal) == composition(overlap)
    assert normal.end_s == overlap.end_s and normal.first_s == overlap.first_s
