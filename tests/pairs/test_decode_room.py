"""Who gets pages on a decode instance: the rule of room, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.disaggregated.decode_scheduler import DecodeScheduler
from workbench.scheduler.disaggregated.letters import (
    HandoverEnded,
    HandsShaken,
    KVArrived,
    Letter,
    PagesSetAside,
    Shake,
    Withdrawn,
)
from workbench.scheduler.messages import Abort, Generate
from workbench.scheduler.request import Finish, Pair, SamplingParams

PREFILL, HERE = 0, 1


def decode(**settings: object) -> DecodeScheduler:
    """A decode instance with 1000 tokens of KV, 100 of which are reserved for each request."""
    base = {"kv_tokens": 1000, "max_context": 900, "reserved_decode_tokens": 100, "max_running": 8}
    config = SchedulerConfig(**{**base, **settings}).for_role("decode")  # type: ignore[arg-type]
    scheduler = DecodeScheduler(config)
    scheduler.receive([HandsShaken(PREFILL)])
    return scheduler


def come(scheduler: DecodeScheduler, number: int, tokens: int, max_new: int = 10) -> None:
    pair = Pair((number, 0), PREFILL, HERE)
    prompt = np.arange(tokens, dtype=np.int32)
    scheduler.receive([Generate(f"r{number}", prompt, SamplingParams(max_new, ignore_eos=True), pair=pair)])


def given(scheduler: DecodeScheduler) -> list[int]:
    """Look at the queues; returns the numbers of the requests that got pages now."""
    scheduler.poll()
    scheduler.check()
    return [
        order.message.room[0]
        for order in scheduler.take_orders()
        if isinstance(order, Letter) and isinstance(order.message, PagesSetAside)
    ]


def test_the_first_that_does_not_fit_blocks_those_behind_it():
    scheduler = decode()
    for number, tokens in enumerate((300, 300, 200, 20)):
        come(scheduler, number, tokens)
    # 300 + 100 twice leaves 200 of 1000, and the third needs 300; the fourth would fit.
    assert given(scheduler) == [0, 1]
    assert given(scheduler) == []
    scheduler.receive([HandoverEnded((0, 0), Finish("aborted", "transfer_failed"))])
    assert given(scheduler) == [2, 3]


def test_a_request_alone_is_let_in_without_a_reserve():
    scheduler = decode(reserved_decode_tokens=5000)
    come(scheduler, 0, 800)
    come(scheduler, 1, 10)
    assert given(scheduler) == [0]


def test_room_for_the_output_bound_is_what_all_that_run_would_free():
    scheduler = decode(reserved_decode_tokens=10)
    come(scheduler, 0, 200, max_new=300)
    assert given(scheduler) == [0]
    scheduler.receive([KVArrived((0, 0), 7, 0)])
    assert given(scheduler) == [] and scheduler.slots[0].running.count == 1
    # 800 are left. The one that runs has 200 and may reach 500: 300 are kept for it, more than its reserve of 10. Of the
    # others one may take 500, and its prompt and bound together no more than that and the 200 that the first would free.
    come(scheduler, 1, 400, max_new=450)
    assert given(scheduler) == []
    scheduler.receive([Abort("r1")])
    come(scheduler, 2, 400, max_new=290)
    assert given(scheduler) == [2]


def test_rows_beyond_those_that_run_bound_how_many_are_on_their_way():
    scheduler = decode(max_running=2, spare_rows=1)
    for number in range(5):
        come(scheduler, number, 10)
    assert given(scheduler) == [0, 1, 2]
    for number in range(3):
        scheduler.receive([KVArrived((number, 0), 7, 0)])
    given(scheduler)
    assert scheduler.slots[0].running.count == 2 and len(scheduler.arrived) == 1


def test_hands_are_shaken_once_with_each_instance_and_nobody_waits_for_another_ones():
    config = SchedulerConfig(kv_tokens=1000, max_context=900, reserved_decode_tokens=0).for_role("decode")
    scheduler = DecodeScheduler(config)
    for number, peer in enumerate((5, 6, 5)):
        prompt = np.arange(10, dtype=np.int32)
        scheduler.receive([Generate(f"r{number}", prompt, SamplingParams(5), pair=Pair((number, 0), peer, HERE))])
    assert [order.peer for order in scheduler.take_orders() if isinstance(order, Shake)] == [5, 6]
    scheduler.receive([HandsShaken(6)])
    assert given(scheduler) == [1]
    scheduler.receive([HandsShaken(5)])
    assert given(scheduler) == [0, 2]


@pytest.mark.parametrize("page_size", [1, 16])
def test_an_aborted_request_keeps_its_pages_until_nothing_more_is_written_into_them(page_size):
    scheduler = decode(page_size=page_size)
    come(scheduler, 0, 100)
    assert given(scheduler) == [0]
    held = scheduler.kv.used_tokens
    scheduler.receive([Abort("r0")])
    assert [order.message for order in scheduler.take_orders()] == [Withdrawn((0, 0))]
    assert [req.rid for req in scheduler.take_ended()] == ["r0"]
    scheduler.check()
    assert scheduler.kv.used_tokens == held > 0
    scheduler.receive([HandoverEnded((0, 0), Finish("aborted", "withdrawn"))])
    scheduler.check()
    assert scheduler.kv.used_tokens == 0 and scheduler.kv.table.free_rows == scheduler.kv.table.rows


def test_what_the_prefix_cache_has_is_neither_given_pages_nor_sent():
    scheduler = decode(decode_cache=True, page_size=16)
    come(scheduler, 0, 100, max_new=1)
    given(scheduler)
    scheduler.receive([KVArrived((0, 0), 7, 0)])
    given(scheduler)  # its one token is all it wanted: its prompt stays
    come(scheduler, 1, 150)
    scheduler.poll()
    (order,) = scheduler.take_orders()
    assert isinstance(order, Letter) and isinstance(order.message, PagesSetAside)
    # 6 whole pages of the 100 tokens; 10 pages hold 150.
    assert (order.message.cached_tokens, len(order.message.pages)) == (96, 4)
