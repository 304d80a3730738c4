"""Rules of retraction and of the end that SGLang has and this project's defaults have not, one at a time."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scheduler.by_hand import (
    EOS,
    TOKEN,
    cached,
    extends,
    finish_all,
    form,
    generate,
    next_rids,
    process,
    rids,
    serve,
    step,
    words,
)
from tests.scheduler.by_hand import eager as scheduler
from workbench.scheduler.batch import StepOutput
from workbench.scheduler.messages import Abort
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler

# -- retraction ------------------------------------------------------------------------------------------------------------


def crowded(*, cached_token: bool = False, **settings: object) -> Scheduler:
    """Two requests alike that decode, with room for five more tokens of each, and for one that the cache has."""
    s = scheduler(kv_tokens=31, conservativeness=0.01, **settings)
    if cached_token:
        serve(s, generate("f", [3], 1))
    for rid, start in (("a", 10), ("b", 100)):
        s.receive([generate(rid, words(start, 10), 9)])
        assert rids(step(s)) == [rid]
    return s


def retraction(s: Scheduler) -> tuple[ScheduleBatch, ScheduleBatch]:
    """Go on with a batch in flight until somebody is retracted: the batch in flight by then, and the one after."""
    batch = form(s)
    while not (after := form(s)).retracted:
        process(s, batch)
        batch = after
    return batch, after


@pytest.mark.parametrize(("ties", "stays"), [("first", ["b"]), ("last", ["a"])])
def test_of_equals_the_first_or_the_last_in_the_batch_is_retracted(ties, stays):
    assert rids(retraction(crowded(retract_ties=ties))[1]) == stays


@pytest.mark.parametrize(("rule", "more"), [("keep", 1), ("lose", 0)])
def test_a_token_in_flight_of_who_is_retracted_may_be_lost_and_is_computed_again(rule, more):
    s = crowded(in_flight_token=rule)
    in_flight, after = retraction(s)
    (lost,) = after.retracted
    known = len(lost.tokens)
    process(s, in_flight)
    assert len(lost.tokens) == known + more
    outputs = {req.rid: req.output_len for req in process(s, after).ended}
    while not s.idle:
        batch = s.next_batch()
        if batch is not None:
            outputs |= {req.rid: req.output_len for req in process(s, batch).ended}
    assert outputs == {"a": 9, "b": 9}


@pytest.mark.parametrize(("ahead", "left"), [(None, 1), (20, 0)])
def test_before_a_retraction_everything_may_be_evicted(ahead, left):
    s = crowded(cached_token=True, retract_ahead=ahead)
    retraction(s)
    assert cached(s, [3]) == left


@pytest.mark.parametrize("retracts", [True, False])
def test_a_step_may_be_passed_over_while_somebody_is_about_to_end(retracts):
    s = scheduler(kv_tokens=36, conservativeness=0.01, retract_while_ending=retracts)
    for message in (generate("a", words(0, 10), 6), generate("b", words(100, 10), 8), generate("c", [900], 8)):
        s.receive([message])
        step(s)
    for _ in range(4):
        step(s)
    in_flight = form(s)  # a ends with it, and two more tokens are wanted where there are none
    assert next_rids(s) == (["c"] if retracts else None)
    if not retracts:
        process(s, in_flight)
        assert next_rids(s) == ["b", "c"]


# -- the end ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["now", "result"])
def test_an_abort_may_end_a_running_request_with_its_next_result(when):
    s = scheduler(abort_running=when)
    s.receive([generate("a", words(0, 10), 9), generate("b", words(100, 10), 9)])
    step(s)
    s.receive([Abort("a")])
    batch = form(s)
    assert rids(batch) == (["b"] if when == "now" else ["a", "b"])
    ended = [*process(s, batch).ended]
    if when == "result":
        assert [(req.rid, req.finish.status, req.output_len) for req in ended] == [("a", "aborted:client", 2)]
    assert next_rids(s) == ["b"]


def test_an_abort_with_the_next_result_ends_who_waits_at_once():
    s = scheduler(abort_running="result", max_running=1)
    s.receive([generate("a", words(0, 10), 9), generate("b", words(100, 10), 9)])
    step(s)
    s.receive([Abort("b")])
    assert [req.rid for req in s.take_ended()] == ["b"]


@pytest.mark.parametrize(("when", "batches"), [("now", [[16]]), ("result", [[16], [16], [8]])])
def test_an_abort_may_let_a_prompt_in_part_be_computed_to_its_end(when, batches):
    s = scheduler(chunk=16, abort_running="result", abort_partial=when)
    s.receive([generate("a", words(0, 40), 9)])
    first = extends(step(s))
    s.receive([Abort("a")])
    assert [first, *map(extends, finish_all(s))] == batches


@pytest.mark.parametrize(("known", "batches"), [("launch", 3), ("result", 4)])
def test_who_ends_by_length_may_be_in_one_more_batch_for_nothing(known, batches):
    s = scheduler(stops_known=known)
    s.receive([generate("a", words(0, 10), 3)])
    in_flight, formed, ended = form(s), 1, []
    while in_flight is not None:
        after = s.next_batch()
        formed += after is not None
        ended += process(s, in_flight).ended
        in_flight = after
    assert formed == batches and [(req.finish.status, req.output_len) for req in ended] == [("finished", 3)]
    s.rest()
    assert cached(s, [*words(0, 10), TOKEN, TOKEN, TOKEN]) == 12


@pytest.mark.parametrize(("kept", "tokens"), [("keep", 32), ("drop", 16)])
def test_what_an_aborted_prompt_has_computed_may_be_dropped(kept, tokens):
    s = scheduler(chunk=16, aborted_kv=kept)
    s.receive([generate("a", words(0, 60), 9)])
    step(s)
    step(s)  # the first chunk is in the cache by now, the second is not
    s.receive([Abort("a")])
    assert cached(s, words(0, 60)) == tokens


@pytest.mark.parametrize(("rule", "held"), [("landed", 12), ("ended", 0)])
def test_who_has_ended_may_give_its_kv_back_while_a_batch_in_flight_has_it(rule, held):
    s = scheduler(give_back=rule)
    s.receive([generate("a", words(0, 10), 9)])
    step(s)
    stopping, after = form(s), form(s)
    s.process(stopping, StepOutput(np.array([EOS], np.int32)))
    assert s.kv.used_tokens == held
    s.check()
    process(s, after)
    assert s.kv.used_tokens == 0
    s.rest()
