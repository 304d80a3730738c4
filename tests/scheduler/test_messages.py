"""Traps of messages, of time and of settings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.scheduler.by_hand import (
    all_finished,
    every_loop,
    finish_all,
    generate,
    rids,
    scheduler,
    step,
    words,
)
from tests.world import Job, simulate
from workbench.scheduler.config import CHANGEABLE, ConfigError, SchedulerConfig
from workbench.scheduler.messages import Abort, Pause, Resume
from workbench.scheduler.request import Req, SamplingParams

# -- messages and time -------------------------------------------------------------------------------------------------


def test_a_message_of_an_unknown_type_is_a_clear_error():
    with pytest.raises(TypeError, match="no handler for a message of type dict"):
        scheduler().receive([{"generate": "a"}])


def test_an_abort_of_an_unknown_or_finished_request_is_ignored():
    s = scheduler()
    s.receive([generate("a", words(0, 10), 1), Abort("nobody")])
    step(s)
    s.receive([Abort("a")])
    assert s.take_ended() == [] and s.idle


def test_an_abort_in_the_queue_takes_the_request_out_of_it():
    s = scheduler(max_running=1)
    s.receive([generate("a", words(0, 10), 3), generate("b", words(50, 10), 3), Abort("b", "why not")])
    (ended,) = s.take_ended()
    assert ended.finish.status == "aborted:why not" and ended.output_len == 0
    assert {rid for batch in finish_all(s) for rid in rids(batch)} == {"a"}


@every_loop
def test_while_paused_nothing_starts_and_nothing_spins(loop):
    job = Job("a", words(0, 100), 5, arrival_s=0.1, eos=False)
    run = simulate([job], loop, messages=[(0.05, Pause()), (3.0, Resume())])
    assert run.scheduled_s["a"] == 3.0
    all_finished(run, [job])
    asleep = simulate([job], loop, messages=[(0.125, Pause())])
    assert not asleep.ended and len(asleep.batches) < 5


@every_loop
def test_a_request_that_waits_too_long_is_aborted_and_a_running_one_is_not(loop):
    jobs = [Job("a", words(0, 100), 30, eos=False), Job("b", words(200, 10), 3, eos=False)]
    run = simulate(jobs, loop, max_running=1, queue_timeout=0.1)
    assert run.ended["a"].finish.status == "finished"
    assert run.ended["b"].finish.status == "aborted:queue_timeout"
    assert "b" not in run.scheduled_s and run.end_s["b"] < run.end_s["a"]


@every_loop
def test_a_request_that_takes_too_long_is_aborted_wherever_it_is(loop):
    jobs = [Job("a", words(0, 100), 90, eos=False), Job("b", words(200, 10), 3, eos=False)]
    run = simulate(jobs, loop, max_running=1, request_timeout=0.1)
    for rid in "ab":
        assert run.ended[rid].finish.status == "aborted:request_timeout"
        assert 0.1 <= run.end_s[rid] < 0.2
    assert run.ended["a"].output_len == len(run.outputs["a"]) > 0


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[
            ({name: 0}, f"{name}: 0 is less than 1")
            for name in (
                "kv_tokens",
                "max_context",
                "page_size",
                "max_running",
                "slots",
                "max_prefill_tokens",
                "max_batch_tokens",
                "chunk",
                "max_passed_over",
                "max_prefill_streak",
                "share_in_batch_tokens",
                "preempt_threshold",
            )
        ],
        ({"queue_timeout": 0}, "queue_timeout: 0 is not positive and finite"),
        ({"request_timeout": -1.5}, "request_timeout: -1.5 is not positive and finite"),
        ({"request_timeout": math.nan}, "request_timeout: nan is not positive and finite"),
        ({"conservativeness": 0.0}, "conservativeness: 0.0 is not positive and finite"),
        ({"batching": "decode-first"}, "batching: 'decode-first' is not one of prefill-first, mixed"),
        ({"cache": "lru"}, "cache: 'lru' is not one of radix, blocks, none"),
        ({"evict": "mru"}, "evict: 'mru' is not one of lru, lfu, fifo"),
        ({"kv_tokens": 15, "page_size": 16}, "kv_tokens: 15 holds no page of 16 tokens"),
        ({"chunk": 15, "page_size": 16}, "chunk: 15 is smaller than a page of 16 tokens"),
        (
            {"batching": "mixed", "max_batch_tokens": 7, "max_running": 8},
            "max_batch_tokens: 7 cannot give each of 8 running requests a token; raise it or lower max_running",
        ),
        (
            {"batching": "mixed", "max_batch_tokens": 15, "page_size": 16, "max_running": 8},
            "max_batch_tokens: 15 is smaller than a page of 16",
        ),
        ({"mixed_chunk": True, "batching": "mixed"}, "mixed_chunk: needs prefill-first batching with a chunk size"),
        ({"mixed_chunk": True, "chunk": None}, "mixed_chunk: needs prefill-first batching with a chunk size"),
        (
            {"mixed_chunk": True, "chunk": 8, "max_running": 8},
            "chunk: 8 leaves no room for a prompt beside 8 decodes (mixed_chunk)",
        ),
        (
            {"preempt_threshold": 1},
            "preempt_threshold: has no effect here: it needs policy 'priority' and prefill-first batching",
        ),
        (
            {"preempt_threshold": 1, "policy": "priority", "batching": "mixed"},
            "preempt_threshold: has no effect here: it needs policy 'priority' and prefill-first batching",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_one_line_that_names_it(settings, message):
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(**{"kv_tokens": 1000, "max_context": 500, **settings})
    assert str(caught.value) == message


def test_a_slot_has_its_share_of_the_places_and_at_least_one():
    shares = [SchedulerConfig(100, 50, max_running=n, slots=4).max_running_per_slot for n in (1, 4, 7, 8)]
    assert shares == [1, 1, 1, 2]


def test_a_request_knows_at_which_length_it_stops():
    req = Req("a", np.zeros(10, np.int32), SamplingParams(5), 5, 0)
    assert req.end_len == 14  # the fifth token is never an input


def test_a_change_that_would_do_nothing_is_refused_but_not_what_stays_as_it_was():
    config = SchedulerConfig(kv_tokens=1000, max_context=500)
    with pytest.raises(ConfigError, match=r"^max_batch_tokens: has no effect here: it needs mixed batching$"):
        config.changed({"max_batch_tokens": 512}, config)
    same = {name: getattr(config, name) for name in CHANGEABLE}
    assert config.changed(same, config) == config
