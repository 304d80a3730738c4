"""What holds for every workload on instances that prefill and instances that decode: the seeds are fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loops.test_loop_properties import HOSTS, shared_prefix, some_jobs, thorough
from tests.pairs.pair_world import Kinds, PairWorld
from tests.world import Job
from workbench.recording.recorder import RequestRow

LONG_S = 2000.0
"""Longer than any run takes: what goes on then goes on for ever."""
Trouble = list[tuple[float, str, str]]


@st.composite
def some_long_jobs(draw: st.DrawFn) -> list[Job]:
    """Short prompts with long outputs: more than a small pool holds at a time."""
    jobs = []
    for i in range(draw(st.integers(3, 8))):
        prompt = [10 + (i * 31 + n) % 80 for n in range(draw(st.integers(1, 24)))]
        writes = draw(st.integers(30, 100))
        jobs.append(Job(f"r{i}", prompt, writes, draw(st.sampled_from([writes, 120])), 0.01 * draw(st.integers(0, 5))))
    return jobs


@st.composite
def some_alike_jobs(draw: st.DrawFn) -> list[Job]:
    """Prompts that begin alike, or are the same, and come together."""
    jobs = []
    for i in range(draw(st.integers(3, 8))):
        own = [10 + (i * 31 + n) % 80 for n in range(draw(st.sampled_from([0, 0, 1, 20])))]
        prompt = shared_prefix(draw(st.integers(0, 1)))[: draw(st.sampled_from([20, 40, 60]))] + own
        jobs.append(Job(f"r{i}", prompt, 2, arrival_s=draw(st.sampled_from([0.0, 0.0, 0.011, 0.03])), eos=False))
    return jobs


@st.composite
def some_kinds(draw: st.DrawFn, role: str, loop: str) -> Kinds:
    """Instances of a role, with little room more often than not."""
    max_running = draw(st.sampled_from([1, 2, 3, 8]))
    settings: dict[str, object] = {
        "max_running": max_running,
        "kv_tokens": draw(st.sampled_from([96, 160, 400, 4096])),
        "max_context": draw(st.sampled_from([128, 2048])),
        "batching": draw(st.sampled_from(["prefill-first", "prefill-first", "mixed"])),
        "cache": draw(st.sampled_from(["radix", "radix", "none", "blocks"])),
    }
    if draw(st.booleans()):  # as presets of engines have it
        settings |= {
            "stops_known": draw(st.sampled_from(["launch", "result"])),
            "leaves": draw(st.sampled_from(["ended", "decode"])),
            "give_back": draw(st.sampled_from(["landed", "ended", "at_once"])),
            "abort_running": draw(st.sampled_from(["now", "result"])),
            "share_prompts": draw(st.sampled_from(["launch", "result"])),
            "share_chunks": draw(st.booleans()),
            "charge": draw(st.sampled_from(["tokens", "pages"])),
            "in_flight_token": draw(st.sampled_from(["keep", "lose"])),
        }
    if role == "prefill":
        settings |= {
            "chunk": draw(st.sampled_from([16, 32, None, 8192])),
            "max_batch_tokens": draw(st.sampled_from([16, 64, 2048])),
            "policy": draw(st.sampled_from(["fcfs", "lpm", "sjf", "priority"])),
        }
        if settings["batching"] == "mixed" and draw(st.booleans()):
            settings |= {"mixed_order": "admission", "long_prefill_tokens": draw(st.sampled_from([None, 8]))}
    else:
        settings |= {
            "reserved_decode_tokens": draw(st.sampled_from([0, 0, 0, 1, 8, 512])),
            "spare_rows": draw(st.sampled_from([None, 0, 1])),
            "decode_cache": draw(st.booleans()),
            "decode_retraction": draw(st.sampled_from(["host", "prefill"])),
        }
    stages = 1
    if role == "prefill" and draw(st.sampled_from([False, False, True])):
        loop, stages = "pipeline", draw(st.sampled_from([2, 3]))
        settings["slots"] = stages + draw(st.sampled_from([0, 0, 1]))
    host = draw(st.sampled_from(HOSTS))
    return Kinds(draw(st.sampled_from([1, 2, 2])), loop, host=host, stages=stages, settings=settings)


@st.composite
def some_trouble(draw: st.DrawFn, jobs: list[Job]) -> Trouble:
    """Requests that are aborted, transfers that are lost and instances that die, at any moment."""
    count = draw(st.integers(0, 4))
    moments = st.floats(0.0, 0.4, allow_nan=False)
    ids = st.sampled_from([job.rid for job in jobs])
    found: Trouble = [
        (draw(moments), draw(st.sampled_from(["abort", "abort", "lose"])), draw(ids)) for _ in range(count)
    ]
    return found + [(draw(moments), "kill", str(draw(st.integers(0, 3)))) for _ in range(draw(st.integers(0, 2)))]


@st.composite
def some_worlds(draw: st.DrawFn, loop: str, jobs: list[Job], **more: object) -> PairWorld:
    common: dict[str, object] = {
        "page_size": draw(st.sampled_from([1, 1, 4, 16])),
        "first_token": draw(st.sampled_from(["decode", "prefill"])),
        "transfer_timeout": draw(st.sampled_from([300.0, 0.1, 0.03])),
        "handshake_timeout": draw(st.sampled_from([300.0, 300.0, 0.1])),
        "queue_timeout": draw(st.sampled_from([None, None, 0.1])),
        "request_timeout": draw(st.sampled_from([None, None, 0.3])),
    }
    return PairWorld(
        jobs,
        draw(some_kinds("prefill", loop)),
        draw(some_kinds("decode", loop)),
        link_bytes_s=draw(st.sampled_from([inf, 1e7, 1e6])),
        latency_s=draw(st.sampled_from([0.0, 0.0001, 0.02])),
        **common,
        **more,
    )


def events_of(world: PairWorld, trouble: Trouble) -> list[tuple[float, Callable[[], None]]]:
    acts = {
        "abort": world.abort,
        "lose": world.lose,
        "kill": lambda number: world.kill(int(number) % len(world.halves)),
    }
    return [(at_s, lambda kind=kind, of=of: acts[kind](of)) for at_s, kind, of in trouble]


def check_the_end(world: PairWorld) -> None:
    """Everything that must hold once nothing is left to do."""
    assert not world.recorder.by_id, "a request never ended"
    for half in world.halves:
        if half.number in world.wires.gone:
            continue
        scheduler = half.scheduler
        kv = scheduler.kv
        assert kv.available_pages == kv.pool.total and kv.table.free_rows == kv.table.rows
        assert not scheduler.lifecycle.by_id and not scheduler.flights and not scheduler.slots.partial
        assert not scheduler.queue.waiting and not scheduler.queue.elsewhere
        if half.memory is not None:
            to_come = {copy.name for copy in scheduler.assembly.copies if copy.direction == "forget"}
            assert {name for name, _ in half.memory.host} <= to_come, "the host's memory keeps what nobody will load"
        rooms = [req.pair.room for req in half.ended if req.pair is not None]
        assert len(set(rooms)) == len(rooms), "a half of a request ended twice"
    for job in world.jobs.values():
        row, got = world.row(job.rid), world.outputs.get(job.rid, [])
        script = job.script()[1].tolist()
        if row.status == "finished":
            bound = job.bound if job.bound is not None else job.writes
            capacity = world.halves[row.instance].scheduler.capacity
            assert got == script[: len(got)] and row.output_tokens == len(got)
            assert len(got) == min(job.writes, capacity.output_bound(len(job.prompt), bound))
        elif row.status.startswith("rejected"):
            assert not got
        else:
            assert row.status.startswith("aborted:")
            assert got == script[: len(got)]


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.slow
def test_every_request_ends_once_with_its_own_tokens_and_kv_whatever_happens_on_the_way(loop):
    seen: set[str] = set()

    @thorough(150)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = data.draw(some_jobs())
        world = data.draw(some_worlds(loop, jobs))
        world.run(events_of(world, data.draw(some_trouble(jobs))), until_s=LONG_S)
        check_the_end(world)
        seen.update(row.status for row in world.recorder.rows)

    check()
    ways = ("client", "queue_timeout", "request_timeout", "handshake_timeout", "transfer_timeout")
    assert seen >= {"finished", *(f"aborted:{way}" for way in ways)}


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.slow
def test_alike_prompts_in_a_tight_pool_are_sent_whole_though_they_share_lose_and_move_pages(loop):
    lost = []

    @thorough(100)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = data.draw(some_alike_jobs())
        settings: dict[str, object] = {
            "kv_tokens": data.draw(st.sampled_from([80, 112, 160])),
            "max_running": 8,
            "chunk": 16,
            "max_batch_tokens": data.draw(st.sampled_from([16, 40])),
            "batching": data.draw(st.sampled_from(["prefill-first", "mixed", "mixed"])),
            "cache": data.draw(st.sampled_from(["radix", "radix", "none", "blocks"])),
        }
        if settings["batching"] == "mixed":
            settings |= {"mixed_order": "admission", "long_prefill_tokens": data.draw(st.sampled_from([None, 8, 12]))}
        world = PairWorld(
            jobs,
            Kinds(1, loop, settings=settings),
            Kinds(2, loop),
            link_bytes_s=data.draw(st.sampled_from([1e5, 1e6])),
            page_size=data.draw(st.sampled_from([1, 4])),
        )
        world.run(until_s=LONG_S)
        check_the_end(world)
        lost.append(any(batch.retracted for batch in world.prefill[0].batches))

    check()
    assert sum(lost) > 5, "too few prompts lose their KV"


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("retraction", ["host", "prefill"])
@pytest.mark.slow
def test_nothing_starves_and_who_is_retracted_goes_on_with_its_own_kv(loop, retraction):
    retracted = []

    @thorough(40)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = data.draw(some_long_jobs())
        decode = data.draw(some_kinds("decode", loop))
        settings = {"kv_tokens": 160, "reserved_decode_tokens": 0, "decode_retraction": retraction, "max_running": 8}
        world = PairWorld(
            jobs,
            data.draw(some_kinds("prefill", loop)),
            replace(decode, settings={**decode.settings, **settings}),
            link_bytes_s=data.draw(st.sampled_from([inf, 1e6])),
            latency_s=data.draw(st.sampled_from([0.0, 0.001])),
            page_size=data.draw(st.sampled_from([1, 4, 16])),
        )
        world.run(until_s=LONG_S)
        check_the_end(world)
        for row in world.recorder.rows:
            # One that is too long for the pool ends when it is alone there.
            assert row.status in ("finished", "aborted:kv_exhausted") or row.status.startswith("rejected:prompt")
            retracted.append(row.retractions)

    check()
    assert sum(map(bool, retracted)) > 20, "too few are retracted"


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.slow
def test_skipped_steps_of_a_decode_instance_are_the_same_as_going_one_by_one(loop):
    skipped = []

    @thorough(40)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        jobs = [
            replace(job, writes=6 * job.writes, bound=job.bound and 6 * job.bound) for job in data.draw(some_jobs(6))
        ]
        kinds = data.draw(some_kinds("prefill", loop)), data.draw(some_kinds("decode", loop))
        options = {
            "link_bytes_s": data.draw(st.sampled_from([inf, 1e6])),
            "latency_s": data.draw(st.sampled_from([0.0, 0.001])),
            "page_size": data.draw(st.sampled_from([1, 4, 16])),
        }
        trouble = data.draw(some_trouble(jobs))
        one, two = (PairWorld(jobs, *kinds, skip=skip, **options) for skip in (False, True))
        for world in (one, two):
            world.run(events_of(world, trouble), until_s=LONG_S)
        for before, after in zip(one.halves, two.halves, strict=True):
            assert after.rows == before.rows
        assert [left_behind(row) for row in two.recorder.rows] == [left_behind(row) for row in one.recorder.rows]
        skipped.append(sum(len(half.batches) for half in one.decode) - sum(len(half.batches) for half in two.decode))

    check()
    assert sum(steps > 10 for steps in skipped) > 10, "too few examples skip steps"


def left_behind(row: RequestRow) -> tuple[object, ...]:
    return row.request_id, row.status, row.output_tokens, row.first_token_s, row.finish_s, row.retractions, row.handover
