"""Sessions: a request continues what the ones before it have said, whatever loop, memory and client did to them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loops.test_loop_properties import check_the_pools, some_settings, thorough
from tests.scheduler.by_hand import EOS, every_loop, finish_all, form, generate, process, scheduler, step, words
from tests.world import Job, Run, simulate
from workbench.scheduler.messages import Abort, CloseSession, FlushCache, OpenSession, Stop
from workbench.scheduler.scheduler import Scheduler
from workbench.scheduler.sessions import MAX_SESSIONS, Sessions


def opened(*names: str, **settings: object) -> Scheduler:
    s = scheduler(**settings)
    for name in names or ("chat",):
        assert ask(s, OpenSession, name) is None
    return s


def ask(s: Scheduler, kind: type, name: str) -> str | None:
    said: list[str | None] = []
    s.receive([kind(name, said.append)])
    (refused,) = said
    assert refused is None or "\n" not in refused
    return refused


def turn(rid: str, prompt: list[int], new: int, **more: object):
    return generate(rid, prompt, new, session="chat", **more)


def history(s: Scheduler, name: str = "chat") -> list[int]:
    return s.sessions.tokens_of(name).tolist()


def refused(s: Scheduler, message: object) -> str:
    s.receive([message])
    (req,) = s.take_ended()
    return req.finish.status


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_a_turn_gets_the_tokens_of_the_turn_before_and_finds_them_in_the_cache():
    s = opened()
    s.receive([turn("a", words(0, 10), 3)])
    for token in (5, 6, 7):
        step(s, token)
    assert history(s) == [*words(0, 10), 5, 6, 7] and s.idle
    s.receive([turn("b", words(50, 4), 2)])
    batch = form(s)
    (req,) = batch.reqs
    assert req.prompt.tolist() == [*words(0, 10), 5, 6, 7, *words(50, 4)]
    assert req.cached_tokens == 12, "all but the last token, which was never an input"
    process(s, batch, 8)
    step(s, 9)
    assert history(s) == [*words(0, 10), 5, 6, 7, *words(50, 4), 8, 9]


def test_under_overlap_the_sample_after_the_stop_is_no_part_of_the_history():
    s = opened()
    s.receive([turn("a", words(0, 10), 20)])
    first, second = form(s), form(s)
    process(s, first, 5)
    third = form(s)
    assert [req.rid for req in process(s, second, EOS).ended] == ["a"]
    assert history(s) == [*words(0, 10), 5, EOS]
    # Its row is still read by a batch in flight when the next turn comes.
    s.receive([turn("b", words(50, 4), 1)])
    fourth = form(s)
    process(s, third, 99)
    process(s, fourth, 6)
    assert history(s) == [*words(0, 10), 5, EOS, *words(50, 4), 6]
    assert finish_all(s) == []


def test_a_row_given_to_another_does_not_change_a_history():
    s = opened(max_running=1)
    s.receive([turn("a", words(0, 10), 2), generate("b", words(50, 20), 2)])
    finish_all(s)
    assert history(s) == [*words(0, 10), 7, 7]


@pytest.mark.parametrize("chunk", [4, 8192])
@pytest.mark.parametrize(("steps", "flying"), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (4, 2)])
def test_an_abort_at_any_moment_leaves_a_session_as_it_was(chunk, steps, flying):
    s = opened(chunk=chunk)
    s.receive([turn("a", words(0, 10), 2)])
    finish_all(s)
    before = history(s)
    s.receive([turn("b", words(50, 10), 20)])
    for _ in range(steps):
        step(s)
    batches = [form(s) for _ in range(flying)]
    s.receive([Abort("b")])
    for batch in batches:
        process(s, batch)
    assert s.idle and history(s) == before
    s.receive([turn("c", words(90, 3), 1)])
    finish_all(s)
    assert history(s) == [*before, *words(90, 3), 7]


def test_a_second_request_of_a_session_is_rejected_while_one_is_open():
    s = opened("chat", "other")
    s.receive([turn("a", words(0, 10), 5)])
    assert refused(s, turn("b", words(50, 4), 5)) == "rejected:session_busy"
    s.receive([generate("c", words(70, 4), 5, session="other"), generate("d", words(90, 4), 5)])
    finish_all(s)
    assert history(s) == words(0, 10) + [7] * 5
    assert history(s, "other") == words(70, 4) + [7] * 5
    s.receive([turn("e", words(50, 4), 1)])
    assert form(s).reqs[0].rid == "e"


def test_a_request_of_a_session_that_is_not_open_is_rejected():
    s = opened()
    assert refused(s, generate("a", words(0, 5), 1, session="nobody")) == "rejected:unknown_session"
    assert ask(s, CloseSession, "chat") is None
    assert refused(s, turn("b", words(0, 5), 1)) == "rejected:unknown_session"
    assert s.idle


def test_a_rejected_request_leaves_its_session_as_it_was_and_free():
    s = opened(max_context=40)
    s.receive([turn("a", words(0, 20), 5)])
    finish_all(s)
    before = history(s)
    assert refused(s, turn("b", words(50, 14), 1)) == "rejected:prompt_exceeds_context", "25 before its own 14"
    assert refused(s, turn("c", words(50, 3), -1)) == "rejected:output_bound_below_zero"
    s.receive([generate("d", words(60, 3), 1)])
    assert refused(s, turn("d", words(50, 3), 1)) == "rejected:duplicate_id"
    assert history(s) == before
    s.receive([turn("e", words(50, 13), 1)])
    finish_all(s)
    assert history(s) == [*before, *words(50, 13), 7]


def test_a_request_goes_on_when_its_session_is_closed_and_says_nothing_to_a_new_one_of_that_name():
    s = opened()
    s.receive([turn("a", words(0, 10), 4)])
    step(s)
    assert ask(s, CloseSession, "chat") is None
    assert ask(s, OpenSession, "chat") is None
    s.receive([turn("b", words(50, 5), 2)])
    batches = finish_all(s)
    assert {req.rid: req.finish.kind for batch in batches for req in batch.reqs} == {"a": "length", "b": "length"}
    s.receive([Stop("a", 1)])
    assert history(s) == [*words(50, 5), 7, 7]
    assert list(s.sessions._by_last_rid) == ["b"], "what is closed is not kept"


def test_opening_twice_closing_twice_and_opening_too_many_are_refused_in_one_line():
    s = opened()
    assert ask(s, OpenSession, "chat") == "session 'chat' is open already"
    assert ask(s, CloseSession, "chat") is None
    assert ask(s, CloseSession, "chat") == "session 'chat' is not open"
    few = Sessions(most=2)
    assert [few.open(name) for name in "abc"] == [
        None,
        None,
        "2 sessions are open, and there can be no more: close some",
    ]
    assert few.close("a") is None and few.open("c") is None
    assert MAX_SESSIONS == 4096


def test_the_state_counts_open_sessions_and_a_flush_leaves_them_alone():
    s = opened("a", "chat")
    s.receive([turn("x", words(0, 10), 2)])
    finish_all(s)
    s.receive([FlushCache()])
    assert s.snapshot()["sessions"] == 2
    s.receive([turn("y", words(50, 5), 1)])
    batch = form(s)
    assert batch.reqs[0].cached_tokens == 0 and batch.reqs[0].input_len == 17


def test_what_only_the_beginning_of_a_text_has_is_left_out_of_later_turns():
    s = opened()
    s.receive([turn("a", [1, *words(10, 5)], 9, bos_tokens=1), Abort("a")])
    s.receive([turn("b", [1, *words(10, 5)], 1, bos_tokens=1)])
    finish_all(s)
    assert history(s) == [1, *words(10, 5), 7]
    s.receive([turn("c", [1, *words(20, 3)], 1, bos_tokens=1)])
    finish_all(s)
    assert history(s) == [1, *words(10, 5), 7, *words(20, 3), 7]
    s.receive([turn("d", [1], 2, bos_tokens=1)])  # says nothing new: the model goes on
    finish_all(s)
    assert history(s) == [1, *words(10, 5), 7, *words(20, 3), 7, 7, 7]


def test_a_stop_from_outside_ends_the_history_with_the_token_that_completed_it():
    s = opened()
    s.receive([turn("a", words(0, 10), 20)])
    for token in range(100, 105):
        step(s, token)
    flying = form(s)
    s.receive([Stop("a", 3)])
    (req,) = s.take_ended()
    assert req.output_len == 5 and history(s) == [*words(0, 10), 100, 101, 102]
    process(s, flying, 105)
    assert history(s) == [*words(0, 10), 100, 101, 102]


def test_a_stop_that_comes_after_the_end_still_cuts_the_history_unless_another_turn_has_finished():
    s = opened()
    s.receive([turn("a", words(0, 10), 4)])
    finish_all(s)
    s.receive([Stop("a", 2)])
    assert history(s) == [*words(0, 10), 7, 7]
    s.receive([turn("b", words(50, 5), 4)])
    finish_all(s)
    whole = history(s)
    s.receive([Stop("a", 1), Stop("nobody", 1)])
    assert history(s) == whole == [*words(0, 10), 7, 7, *words(50, 5), 7, 7, 7, 7]


@every_loop
@pytest.mark.parametrize("skip", [False, True])
def test_turns_follow_each_other_under_every_loop(loop, skip):
    jobs = [
        Job(f"r{i}", words(100 * i, 10), 30, bound=40, arrival_s=i, session="chat", output=words(1000 * i + 500, 30))
        for i in range(3)
    ]
    run = simulate(jobs, loop, messages=all_open("chat"), skip=skip and loop != "pipeline")
    assert history(run.scheduler) == [token for job in jobs for token in [*job.prompt, *job.script()[1]]]
    assert [run.ended[job.rid].cached_tokens for job in jobs] == [0, 39, 79]


@every_loop
def test_a_turn_that_lost_its_kv_on_the_way_leaves_the_same_history(loop):
    jobs = [
        Job(f"r{i}", words(100 * i, 10), 20, arrival_s=0.005 * i, session=f"s{i}", output=words(1000 * i + 500, 20))
        for i in range(3)
    ]
    run = simulate(jobs, loop, messages=all_open("s0", "s1", "s2"), kv_tokens=84, conservativeness=0.001)
    assert sum(req.retractions for req in run.ended.values()) > 0
    for i, job in enumerate(jobs):
        assert history(run.scheduler, f"s{i}") == [*job.prompt, *job.script()[1]]


def test_a_turn_that_lost_its_kv_in_the_very_step_of_its_end_leaves_the_same_history():
    jobs = [
        Job(f"r{i}", words(100 * i, 6), n, 25, 0.02 * i, session=f"s{i}", output=words(1000 * i + 500, n))
        for i, n in enumerate((23, 19, 20))
    ]
    run = simulate(jobs, "overlap", messages=all_open("s0", "s1", "s2"), kv_tokens=51, conservativeness=0.001)
    retracted = run.ended["r1"]
    assert retracted.retractions == 1 and len(retracted.tokens) == 6 + 19, "it ended without a row"
    for i, job in enumerate(jobs):
        assert history(run.scheduler, f"s{i}") == [*job.prompt, *job.script()[1]]


@every_loop
def test_a_request_that_takes_too_long_leaves_its_session_to_the_next(loop):
    jobs = [
        Job("a", words(0, 100), 90, eos=False, session="chat"),
        Job("b", words(200, 10), 3, eos=False, session="chat", arrival_s=0.3),
    ]
    run = simulate(jobs, loop, messages=all_open("chat"), request_timeout=0.1)
    assert run.ended["a"].finish.status == "aborted:request_timeout" and run.outputs["a"]
    assert history(run.scheduler) == [*words(200, 10), *run.outputs["b"]]


def all_open(*names: str) -> list[tuple[float, object]]:
    return [(-1.0, OpenSession(name, lambda refused: None)) for name in names]


# -- against a model ---------------------------------------------------------------------------------------------------


@st.composite
def some_turns(draw: st.DrawFn, crowd: bool) -> list[Job]:
    """Requests of a few sessions and of none, that often come before the one before has ended; a crowd of them writes
    more than a small KV pool holds."""
    jobs = []
    at_s = 0.0
    for i in range(draw(st.integers(8 if crowd else 1, 14))):
        at_s += 0.3 * (i % 4 == 0) if crowd else draw(st.sampled_from([0.0, 0.02, 0.1, 0.4]))
        writes = draw(st.integers(10, 20) if crowd else st.integers(1, 12))
        bound = draw(st.sampled_from([writes, writes + 3, 40]))
        eos = draw(st.booleans())
        name = "vwxy"[i % 4] if crowd else draw(st.sampled_from(["", "x", "x", "y", "z"]))
        jobs.append(
            Job(
                f"r{i}",
                words(1000 * i, draw(st.integers(1, 6 if crowd else 20))),
                writes,
                bound if eos else writes,
                at_s,
                eos=eos,
                output=words(1000 * i + 500, writes),
                session=name,
                bos_tokens=draw(st.integers(0, 1)),
            )
        )
    return jobs


@st.composite
def some_ends(draw: st.DrawFn, jobs: list[Job]) -> list[tuple[float, object]]:
    """Aborts, stops from outside and flushes, in the course of a request or any time."""
    messages: list[tuple[float, object]] = []
    for _ in range(draw(st.integers(0, 6))):
        job = draw(st.sampled_from(jobs))
        at_s = job.arrival_s + draw(st.floats(0, 0.3))
        kind = draw(st.sampled_from(["abort", "stop", "stop", "flush"]))
        if kind == "stop":
            messages.append((at_s, Stop(job.rid, draw(st.sampled_from([None, 0, 1, 3, 6])))))
        else:
            messages.append((at_s, Abort(job.rid) if kind == "abort" else FlushCache()))
    return messages


@st.composite
def some_openings(draw: st.DrawFn, said: list[str | None]) -> list[tuple[float, object]]:
    messages: list[tuple[float, object]] = [(-1.0, OpenSession(name, said.append)) for name in "vwxy"]
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from([OpenSession, CloseSession]))
        messages.append((draw(st.floats(0, 1.5)), kind(draw(st.sampled_from("xyz")), said.append)))
    return messages


class Naive:
    """What sessions are: a list of tokens each, told from the messages in order and from what clients got."""

    def __init__(self, run: Run, jobs: Sequence[Job]) -> None:
        self.run = run
        self.jobs = {job.rid: job for job in jobs}
        self.open: dict[str, list[int]] = {}
        self.asked: dict[str, str] = {}
        """By session, its last request that was not rejected, until its end counts."""
        self.last: dict[str, str] = {}
        """By session, the request it goes on from."""
        self.stopped: dict[str, int] = {}
        self.refused: list[bool] = []

    def take(self, message: object) -> None:
        if isinstance(message, OpenSession | CloseSession):
            name = message.session
            self.refused.append((name in self.open) == isinstance(message, OpenSession))
            if isinstance(message, CloseSession):
                self.open.pop(name, None)
                self.asked.pop(name, None)
                self.last.pop(name, None)
            else:
                self.open.setdefault(name, [])
        elif isinstance(message, Stop):
            self.stop(message.rid, message.output_tokens)
        elif hasattr(message, "prompt") and message.session:
            self.generate(self.jobs[message.rid])

    def stop(self, rid: str, output_tokens: int | None) -> None:
        if output_tokens is None:
            return
        if rid in self.asked.values():
            self.stopped[rid] = min(output_tokens, self.stopped.get(rid, output_tokens))
        for name in [name for name, last in self.last.items() if last == rid]:
            del self.open[name][len(self.run.ended[rid].prompt) + output_tokens :]

    def generate(self, job: Job) -> None:
        req = self.run.ended[job.rid]
        if job.session not in self.open:
            assert req.finish.status == "rejected:unknown_session"
            return
        if req.finish.status == "rejected:session_busy":
            assert self.run.end_s[self.asked[job.session]] >= job.arrival_s
            return
        before = self.settle(job.session)
        own = list(job.prompt)[job.bos_tokens if before else 0 :]
        assert req.prompt.tolist() == before + own
        if req.finish.kind != "rejected":
            self.asked[job.session] = job.rid

    def settle(self, name: str) -> list[int]:
        """The history of a session whose last request has ended."""
        rid = self.asked.pop(name, None)
        if rid is not None and self.run.ended[rid].finish.status == "finished":
            self.last[name] = rid
            output = self.run.outputs.get(rid, [])
            self.open[name] = self.run.ended[rid].prompt.tolist() + output[: self.stopped.get(rid)]
        return self.open[name]


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.slow
def test_every_session_has_exactly_what_its_finished_requests_said(loop, crowd):
    seen = {"busy": 0, "turns": 0, "stopped": 0} | ({"retractions": 0} if crowd else {})

    @given(st.data())
    @thorough(130)
    def holds(data: st.DataObject) -> None:
        jobs = data.draw(some_turns(crowd))
        said: list[str | None] = []
        messages = data.draw(some_openings(said)) + data.draw(some_ends(jobs))
        config = data.draw(some_settings(loop))
        if crowd:
            config |= {"kv_tokens": 64, "conservativeness": 0.001, "max_running": 8, "chunk": 32, "page_size": 1}
        if data.draw(st.integers(0, 3)) == 0:
            config["request_timeout"] = 0.2
        run = simulate(jobs, loop, messages=messages, **config)
        assert set(run.ended) == {job.rid for job in jobs}
        check_the_pools(run)
        naive = Naive(run, jobs)
        for _, message in sorted([(job.arrival_s, job.message()) for job in jobs] + messages, key=lambda item: item[0]):
            naive.take(message)
        assert [line is not None for line in said] == naive.refused
        assert run.scheduler.snapshot()["sessions"] == len(naive.open)
        for name in naive.open:
            assert history(run.scheduler, name) == naive.settle(name)
        for req in run.ended.values():
            assert req.output_len == len(run.outputs.get(req.rid, []))
            seen["busy"] += req.finish.detail == "session_busy"
            seen["turns"] += req.session is not None and req.finish.status == "finished"
            if crowd:
                seen["retractions"] += req.retractions if req.session is not None else 0
        seen["stopped"] += len(naive.stopped)

    holds()
    assert min(seen.values()) > 15, f"too few examples have what this test is about: {seen}"
