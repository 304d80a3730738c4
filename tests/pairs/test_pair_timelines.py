"""Timelines of one prefill and one decode instance, worked out by hand, to the microsecond, for both loops.

The CPU of each: receive 1 ms, schedule 2, prepare 3, issue 4, process 5. The GPU: 20 ms a step and 0.1 ms a prompt token. A
prefill may start once it is prepared, a decode once it is issued. A token has 1000 bytes of KV. All times below are in ms.

Every request begins alike. Both instances receive it at 0-1. The decode instance then shakes hands, which takes a message
there and one back; receives the answer, 1 ms; and tells the prefill instance which pages are set aside.
"""

from __future__ import annotations

import pytest

from backends.simulated.host import FREE_HOST, HostModel
from tests.loops.test_golden_timelines import A_PROMPT, B_PROMPT, COST, DECODE, HOST, PREFILL, job, us
from tests.pairs.pair_world import Half, Kinds, PairWorld
from tests.world import Job, LinearCost

SEVEN = list(range(600, 700))


def world(
    jobs: list[Job],
    loop: str,
    *,
    mb_s: float = float("inf"),
    latency_ms: float = 0.0,
    host: HostModel = HOST,
    cost: LinearCost = COST,
    **settings: object,
) -> PairWorld:
    both = Kinds(loop=loop, host=host, cost=cost), Kinds(loop=loop, host=host, cost=cost)
    return PairWorld(jobs, *both, link_bytes_s=mb_s * 1e6, latency_s=latency_ms / 1000, **settings).run()


def steps(half: Half) -> list[tuple[int, float, float, float, int]]:
    """(mode, launch, start, end, rows) of every step, in ms."""
    return [
        (row.mode, us(row.launch_s) / 1000, us(row.start_s) / 1000, us(row.end_s) / 1000, row.requests)
        for row in half.rows
    ]


def moments(run: PairWorld, rid: str) -> dict[str, float]:
    """The moments of a request, in ms."""
    row = run.row(rid)
    times = row.handover
    assert times is not None
    found = {
        "pages": times.bootstrap_s,
        "prefill": times.prefill_start_s,
        "prefilled": times.prefill_end_s,
        "transfer": times.transfer_start_s,
        "arrived": times.transfer_end_s,
        "admitted": times.decode_admission_s,
        "first": row.first_token_s,
        "end": row.finish_s,
    }
    return {name: us(at) / 1000 for name, at in found.items()}


def test_alone_under_the_normal_loop_with_an_infinitely_fast_link():
    run = world([job("a", A_PROMPT, 3)], "normal")
    # Decode: receive 0-1, hands are shaken at once, receive 1-2: pages are set aside at 2.
    # Prefill: receive 2-3, schedule 3-5, prepare 5-8; the GPU 8-38; process 38-43. All KV is there at 43.
    # Decode: receive 43-44, the first token is out; schedule 44-46, launch 46-53, GPU 53-73, process 73-78, and 35 more.
    assert steps(run.prefill[0]) == [(PREFILL, 12, 8, 38, 1)]
    assert steps(run.decode[0]) == [(DECODE, 53, 53, 73, 1), (DECODE, 88, 88, 108, 1)]
    assert moments(run, "a") == {
        "pages": 2,
        "prefill": 2,
        "prefilled": 43,
        "transfer": 43,
        "arrived": 43,
        "admitted": 44,
        "first": 44,
        "end": 113,
    }


def test_alone_under_the_overlap_loop_with_an_infinitely_fast_link():
    run = world([job("a", A_PROMPT, 3)], "overlap")
    # As above until the first decode is launched at 53, GPU 53-73. The second: receive 53-54, schedule 54-56, launch 56-63,
    # GPU 73-93, right behind. Process 73-78; receive 78-79; wait until 93; process 93-98.
    assert steps(run.prefill[0]) == [(PREFILL, 12, 8, 38, 1)]
    assert steps(run.decode[0]) == [(DECODE, 53, 53, 73, 1), (DECODE, 63, 73, 93, 1)]
    assert (moments(run, "a")["first"], moments(run, "a")["end"]) == (44, 98)


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_with_a_cpu_that_costs_nothing_decode_starts_when_the_prefills_result_is_there(loop):
    run = world([job("a", A_PROMPT, 3), job("b", B_PROMPT, 2)], loop, host=FREE_HOST, chunk=100)
    # a 0-30, b in two chunks 30-60 and 60-90. a decodes from 30 on, b joins its batch at the next step that begins.
    assert [step[2:4] for step in steps(run.prefill[0])] == [(0, 30), (30, 60), (60, 90)]
    assert [step[2:] for step in steps(run.decode[0])] == [(30, 50, 1), (50, 70, 1), (90, 110, 1)]
    assert moments(run, "a")["prefilled"] == moments(run, "a")["admitted"] == moments(run, "a")["first"] == 30
    assert moments(run, "b")["prefilled"] == moments(run, "b")["admitted"] == moments(run, "b")["first"] == 90


@pytest.mark.parametrize(("loop", "end"), [("normal", 137), ("overlap", 122)])
def test_what_the_wire_takes_comes_on_top_where_nothing_hides_it(loop, end):
    run = world([job("a", A_PROMPT, 3)], loop, mb_s=5, latency_ms=1)
    # Hands: asked at 1, there at 2, back at 3. Receive 3-4, pages known to the other side at 5: three more than above, so
    # the result is processed at 46. 100 tokens take 20 on the wire, and word of them 1: 67. Receive 67-68, and so on.
    assert moments(run, "a") == {
        "pages": 5,
        "prefill": 5,
        "prefilled": 46,
        "transfer": 46,
        "arrived": 67,
        "admitted": 68,
        "first": 68,
        "end": end,
    }


def test_under_the_normal_loop_a_chunk_is_sent_while_the_next_is_computed():
    run = world([job("a", B_PROMPT, 3), job("b", A_PROMPT, 2)], "normal", mb_s=5, latency_ms=1, chunk=100)
    # a's first chunk: GPU 11-41, processed at 46, on the wire 46-66. Its second: receive 46-47, schedule 47-49, prepare
    # 49-52, GPU 52-82, processed at 87, on the wire 87-107, there at 108: of 40 of sending 20 are hidden.
    # b: 87 + 6 = 93, GPU 93-123, processed at 128, on the wire 128-148, there at 149.
    assert [step[2:4] for step in steps(run.prefill[0])] == [(11, 41), (52, 82), (93, 123)]
    # Decode: receive 108-109, schedule 109-111, launch 111-118; a's two steps 118-138 and 153-173, processed at 178.
    # b, there since 149, is received at 178-179 and launched at 188.
    assert steps(run.decode[0]) == [(DECODE, 118, 118, 138, 1), (DECODE, 153, 153, 173, 1), (DECODE, 188, 188, 208, 1)]
    a, b = moments(run, "a"), moments(run, "b")
    assert (a["transfer"], a["prefilled"], a["arrived"], a["first"], a["end"]) == (46, 87, 108, 109, 178)
    assert (b["transfer"], b["prefilled"], b["arrived"], b["first"], b["end"]) == (128, 128, 149, 179, 213)


def test_under_the_overlap_loop_a_chunk_is_sent_once_its_result_has_been_processed():
    run = world([job("a", B_PROMPT, 3), job("b", A_PROMPT, 2)], "overlap", mb_s=5, latency_ms=1, chunk=100)
    # a's first chunk: GPU 11-41, the second 41-71, b's 71-101. The first one's result is there at 41 and processed at 46; by
    # then the second runs. On the wire 46-66. The second is processed at 71-76: on the wire 76-96, there at 97.
    # b: processed at 101-106, on the wire 106-126, there at 127.
    assert [step[2:4] for step in steps(run.prefill[0])] == [(11, 41), (41, 71), (71, 101)]
    # Decode: receive 97-98, schedule 98-100, launch 100-107, GPU 107-127. The next is launched at 117, GPU 127-147. Process
    # 127-132; receive 132-133, b is in; schedule 133-135, launch 135-142, GPU 147-167.
    assert steps(run.decode[0]) == [(DECODE, 107, 107, 127, 1), (DECODE, 117, 127, 147, 1), (DECODE, 142, 147, 167, 1)]
    a, b = moments(run, "a"), moments(run, "b")
    assert (a["transfer"], a["prefilled"], a["arrived"], a["first"], a["end"]) == (46, 76, 97, 98, 152)
    assert (b["transfer"], b["prefilled"], b["arrived"], b["first"], b["end"]) == (106, 106, 127, 133, 172)


def test_transfers_share_the_link_fairly():
    jobs = [job("a", B_PROMPT, 4), job("b", A_PROMPT[:50], 3, arrival_ms=20), job("c", SEVEN, 2, arrival_ms=30)]
    run = world(jobs, "normal", mb_s=2, chunk=100)
    # Chunks: a's first, processed at 43; its second, at 84; b and half of c, at 125; the rest of c, at 161.
    assert [step[2:] for step in steps(run.prefill[0])] == [(8, 38, 1), (49, 79, 1), (90, 120, 2), (131, 156, 1)]
    # 2000 bytes a ms. a's first 100 kB go at 43-93, and until 125 another 64: 36 are left, for which a, b and c have a third
    # each: 54 more, 179. b and c have sent 36 of their 50 then, and half of the link each from there on: b is done 14
    # later, at 193. c's 50 that are left go alone: 25 more, 218.
    assert [moments(run, rid)["arrived"] for rid in "abc"] == [179, 193, 218]
    # Decode: a's steps are launched at 179 + 10 and 35 each after that; b and c join with the next that begins.
    assert [step[2:] for step in steps(run.decode[0])] == [(189, 209, 1), (224, 244, 2), (259, 279, 3)]
    assert [moments(run, rid)["first"] for rid in "abc"] == [180, 215, 250]
    assert [moments(run, rid)["end"] for rid in "abc"] == [284, 284, 284]


def test_the_prefill_side_sends_the_first_token_where_it_is_asked_to():
    run = world([job("a", A_PROMPT, 3)], "normal", mb_s=5, latency_ms=1, first_token="prefill")
    assert (moments(run, "a")["first"], moments(run, "a")["admitted"], moments(run, "a")["end"]) == (46, 68, 137)
    gaps_s, counts = run.recorder.inter_token_gaps()
    assert sorted((us(gap) / 1000, n) for gap, n in zip(gaps_s, counts.tolist(), strict=True) if n) == [
        (35, 1),
        (56, 1),
    ]


def test_chunks_that_ride_through_two_stages_are_sent_as_they_come_out_of_the_last():
    prefill = Kinds(loop="pipeline", host=FREE_HOST, cost=COST, stages=2)
    decode = Kinds(loop="normal", host=FREE_HOST, cost=COST)
    run = PairWorld([job("a", B_PROMPT, 2)], prefill, decode, link_bytes_s=5e6, chunk=100).run()
    stages = [(row.stage, us(row.start_s) / 1000, us(row.end_s) / 1000) for row in run.prefill[0].rows]
    # The second chunk follows the first, which is out at 60 and on the wire 60-80; the second at 90, on the wire 90-110.
    assert sorted(stages) == [(0, 0, 30), (0, 30, 60), (1, 30, 60), (1, 60, 90)]
    a = moments(run, "a")
    assert (a["transfer"], a["prefilled"], a["arrived"], a["first"], a["end"]) == (60, 90, 110, 110, 130)


@pytest.mark.parametrize(("way", "ends"), [("host", {"a": 534, "b": 272}), ("prefill", {"a": 470, "b": 240})])
def test_a_retracted_request_comes_back_through_the_host_or_through_a_prefill_instance(way, ends):
    def free(**settings: object) -> Kinds:
        return Kinds(host=FREE_HOST, cost=LinearCost(0.010, 0.0), settings=settings)

    jobs = [Job("a", list(range(16)), 40, eos=False), Job("b", list(range(50, 66)), 24, eos=False)]
    decode = free(kv_tokens=80, reserved_decode_tokens=0, decode_retraction=way)
    run = PairWorld(jobs, free(), decode, page_size=16).run()
    # Five pages. Both are admitted at 10, and 16 steps later, at 170, each wants a third one: a loses its two. A page is
    # copied in 16, so b goes on at 202, and after the other 7 of its 23 steps ends at 272. a's pages are back at 304: 23
    # more. Through a prefill instance b goes on at once. When it ends, at 240, a's 33 tokens are prefilled in 10, which
    # brings it a token; 22 are left from 250 on.
    assert [run.row(rid).retractions for rid in "ab"] == [1, 0]
    assert {rid: moments(run, rid)["end"] for rid in "ab"} == ends
    copies = [(copy.direction, len(copy.pages)) for batch in run.decode[0].batches for copy in batch.worker.kv_copies]
    assert copies == ([("save", 2), ("load", 2)] if way == "host" else [])


ALIKE = list(range(100, 160))


@pytest.mark.parametrize(
    ("loop", "stages", "mb_s", "b"),
    [("overlap", 1, 1, (50, 60, 110)), ("pipeline", 3, float("inf"), (60, 70, 70))],
)
def test_a_chunk_whose_request_has_lost_its_kv_meanwhile_is_not_sent(loop, stages, mb_s, b):
    settings = {"kv_tokens": 64, "max_batch_tokens": 30, "max_running": 8, "batching": "mixed"}
    prefill = Kinds(
        loop=loop,
        cost=LinearCost(0.010, 0.0),
        stages=stages,
        settings={**settings, "mixed_order": "admission", "cache": "none"},
    )
    jobs = [Job("a", list(range(30)), 2, eos=False), Job("b", ALIKE, 2, eos=False)]
    run = PairWorld(jobs, prefill, Kinds(cost=LinearCost(0.010, 0.0)), link_bytes_s=mb_s * 1e6).run()
    # Steps take 10 a stage. a holds 30 of 64 tokens until it has arrived, and b's first 30 are launched behind it. The
    # second 30 find no room: b loses its KV with a chunk under way. Overlap: a is sent at 10-40, and b's two chunks are
    # computed at 40-60 and sent at 50-110. Three stages: a is out at 30, when b is admitted to another row, before its
    # first chunk is out. Its chunks are out again at 60 and 70.
    times = moments(run, "b")
    assert [len(batch.retracted) for batch in run.prefill[0].batches] != [0] * len(run.prefill[0].batches)
    assert (times["transfer"], times["prefilled"], times["arrived"]) == b


def test_a_prompt_is_sent_from_pages_that_are_computed_though_a_later_batch_has_it_too():
    # Both are launched before a has landed, at 10. b begins with what a is, and pages are looked at as they are sent: taken
    # from b's step, which ends at 20, they would hold nothing yet.
    prefill = Kinds(
        loop="overlap", cost=LinearCost(0.010, 0.0), settings={"chunk": 30, "share_prompts": "result", "max_running": 8}
    )
    jobs = [Job("a", ALIKE[:30], 2, eos=False), Job("b", ALIKE, 2, eos=False)]
    run = PairWorld(jobs, prefill, Kinds(cost=LinearCost(0.010, 0.0))).run()
    assert [step[1:4] for step in steps(run.prefill[0])] == [(0, 0, 10), (0, 10, 20)]
    assert [(moments(run, rid)["transfer"], moments(run, rid)["arrived"]) for rid in "ab"] == [(10, 10), (20, 20)]
