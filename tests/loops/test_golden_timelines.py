"""Timelines worked out by hand, to the microsecond, for each loop.

The CPU: receive 1 ms, schedule 2, prepare 3, issue 4 (the two halves of launch), process 5; together 15 ms a step.
The GPU: 20 ms a step and 0.1 ms a prompt token, so a prefill of 100 tokens takes 30 ms and every decode 20.

A prefill is issued kernel by kernel: the GPU may start once it is prepared. A decode replays a graph: the GPU may start
once it is prepared and issued. A step's launch time is when it has been issued: for a prefill that is 4 ms after it could
start. All times below are in ms.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from backends.simulated.host import FREE_HOST, HostModel
from tests.world import Job, LinearCost, Run, simulate
from workbench.scheduler.batch import ModelWorkerBatch

HOST = HostModel(
    receive_s=0.001,
    receive_message_s=0,
    schedule_s=0.002,
    schedule_request_s=0,
    schedule_prefill_s=0,
    prepare_s=0.003,
    prepare_request_s=0,
    graph_s=0.004,
    eager_s=0.004,
    eager_layer_s=0,
    process_s=0.005,
    process_token_s=0,
    process_ended_s=0,
)
COST = LinearCost(step_s=0.020, prefill_token_s=0.0001)
PREFILL, DECODE, MIXED = 0, 1, 2
A_PROMPT = list(range(100, 200))
B_PROMPT = list(range(300, 500))


def job(rid: str, prompt: list[int], writes: int, bound: int | None = None, arrival_ms: float = 0.0) -> Job:
    """Known to the scheduler by its length, unless ``bound`` is more than it writes: then it ends by EOS."""
    return Job(rid, prompt, writes, bound=bound, arrival_s=arrival_ms / 1000, eos=bound is not None)


def world(jobs: list[Job], loop: str, host: HostModel = HOST, cost: LinearCost = COST, **settings: object) -> Run:
    return simulate(jobs, loop, cost=cost, host=host, **settings)


def us(seconds: float) -> int:
    return round(seconds * 1e6)


def timeline(run: Run, stage: int = 0) -> list[tuple[int, float, float, float, int]]:
    """(mode, launch, start, end, rows) of every step on a stage, in ms, exact to the microsecond."""
    return [(r[3], us(r[4]) / 1000, us(r[5]) / 1000, us(r[6]) / 1000, r[7]) for r in run.rows if r[2] == stage]


def milliseconds(times: dict[str, float]) -> dict[str, float]:
    return {rid: us(at) / 1000 for rid, at in times.items()}


def gaps(run: Run, stage: int = 0) -> list[float]:
    """GPU idle time between one step and the next, in ms."""
    steps = timeline(run, stage)
    return [after[2] - before[3] for before, after in pairwise(steps)]


# -- normal --------------------------------------------------------------------------------------------------------------


def test_alone_under_the_normal_loop_every_step_waits_for_the_cpu_before_it_and_after_it():
    run = world([job("a", A_PROMPT, 3)], "normal")
    # receive 0-1, schedule 1-3, prepare 3-6; the GPU from 6 to 6 + 30; process 36-41.
    # receive 41-42, schedule 42-44, launch 44-51; the GPU 51-71; process 71-76. And the same 35 once more.
    assert timeline(run) == [
        (PREFILL, 10, 6, 36, 1),
        (DECODE, 51, 51, 71, 1),
        (DECODE, 86, 86, 106, 1),
    ]
    assert milliseconds(run.first_s) == {"a": 41}
    assert milliseconds(run.end_s) == {"a": 111}


def test_time_to_first_token_alone_is_receive_schedule_prepare_prefill_and_process():
    for loop, slots in (("normal", 1), ("overlap", 1)):
        run = world([job("a", A_PROMPT, 1)], loop, slots=slots)
        assert milliseconds(run.first_s) == {"a": 1 + 2 + 3 + 30 + 5}, loop
        assert run.end_s == run.first_s


def test_a_prefill_that_is_over_before_its_kernels_are_issued_ends_with_the_last_of_them():
    # One token costs 1.1 ms with this GPU: prepared at 6, computed by 7.1, but issued only at 10. Process 10-15.
    run = world([job("a", [7], 1)], "normal", cost=LinearCost(step_s=0.001, prefill_token_s=0.0001))
    assert timeline(run) == [(PREFILL, 10, 6, 10, 1)]
    assert milliseconds(run.end_s) == {"a": 15}


def test_the_columns_of_an_iteration_hold_its_cpu_phases():
    run = world([job("a", A_PROMPT, 2)], "normal")
    for row in run.rows:
        assert [us(value) for value in row[14:]] == [1000, 2000, 7000, 5000]
    assert [(r[0], r[8], r[9], r[10], r[11]) for r in run.rows] == [
        (0, 100, 0, 100, 100),  # step, prompt tokens, decodes, context, KV held
        (1, 0, 1, 101, 101),
    ]


def test_two_requests_under_the_normal_loop_the_second_prefill_goes_before_the_next_decode():
    run = world([job("a", A_PROMPT, 3), job("b", B_PROMPT, 2, arrival_ms=50)], "normal")
    # a as alone until 76. b came at 50, while the loop waited, and is received at 76-77, scheduled 77-79, prepared 79-82.
    # Its 200 tokens take 20 + 20: 82-122, process 122-127. Then both decode: launch 127 + 10 = 137, end 157, process 162.
    assert timeline(run) == [
        (PREFILL, 10, 6, 36, 1),
        (DECODE, 51, 51, 71, 1),
        (PREFILL, 86, 82, 122, 1),
        (DECODE, 137, 137, 157, 2),
    ]
    assert milliseconds(run.first_s) == {"a": 41, "b": 127}
    assert milliseconds(run.end_s) == {"a": 162, "b": 162}


def test_under_the_normal_loop_a_stop_by_eos_wastes_nothing():
    run = world([job("a", A_PROMPT, 3, bound=10)], "normal")
    assert len(timeline(run)) == 3
    assert milliseconds(run.end_s) == {"a": 111}


# -- overlap -------------------------------------------------------------------------------------------------------------


def test_alone_under_the_overlap_loop_the_cpu_works_while_the_gpu_does():
    run = world([job("a", A_PROMPT, 3)], "overlap")
    # 0: receive 0-1, schedule 1-3, prepare 3-6, issue 6-10. GPU 6-36.
    # 1: receive 10-11, schedule 11-13, launch 13-20. GPU 36-56, right behind. CPU waits for 0 until 36, process 36-41.
    # 2: receive 41-42, schedule 42-44, launch 44-51. GPU 56-76. Waits for 1 until 56, process 56-61.
    # The third token is the last by length, known when 2 was launched: nothing more to launch.
    # receive 61-62, waits for 2 until 76, process 76-81.
    assert timeline(run) == [
        (PREFILL, 10, 6, 36, 1),
        (DECODE, 20, 36, 56, 1),
        (DECODE, 51, 56, 76, 1),
    ]
    assert gaps(run) == [0, 0]
    assert milliseconds(run.first_s) == {"a": 41}
    assert milliseconds(run.end_s) == {"a": 81}


def test_overlap_hides_the_whole_cpu_when_it_is_shorter_than_the_gpu():
    run = world([job("a", A_PROMPT, 30)], "overlap")
    assert gaps(run) == [0] * 29
    # 6 before the first step, 30 of prefill, 29 decodes of 20, 5 of processing.
    assert milliseconds(run.end_s) == {"a": 6 + 30 + 29 * 20 + 5}
    # The normal loop pays 15 of CPU for every decode as well.
    normal = world([job("a", A_PROMPT, 30)], "normal")
    assert milliseconds(normal.end_s) == {"a": 6 + 30 + 5 + 29 * (10 + 20 + 5)}


def test_a_cpu_slower_than_the_gpu_sets_the_pace_of_overlap():
    # Decodes of 5 ms: the CPU's 15 a step cannot be hidden, only the GPU's 5 can.
    run = world([job("a", A_PROMPT, 4)], "overlap", cost=LinearCost(step_s=0.005, prefill_token_s=0.0001))
    # 0: GPU 6-21. 1: launched at 20, GPU 21-26. Process 0: 21-26.
    # 2: receive 26-27, schedule 27-29, launch 29-36, GPU 36-41. Process 1: 36-41 (it was over at 26).
    # 3: 41 + 10 = 51, GPU 51-56. Process 2: 51-56. receive 56-57, process 3: 57-62.
    assert timeline(run) == [
        (PREFILL, 10, 6, 21, 1),
        (DECODE, 20, 21, 26, 1),
        (DECODE, 36, 36, 41, 1),
        (DECODE, 51, 51, 56, 1),
    ]
    assert milliseconds(run.first_s) == {"a": 26}
    assert milliseconds(run.end_s) == {"a": 62}


def test_an_eos_under_overlap_costs_exactly_one_wasted_slot():
    run = world([job("a", A_PROMPT, 3, bound=10)], "overlap")
    # As by length until 2 is launched; then 3 is, at 61 + 10 = 71, before the EOS of 2 is seen at 76-81. GPU 76-96.
    assert timeline(run) == [
        (PREFILL, 10, 6, 36, 1),
        (DECODE, 20, 36, 56, 1),
        (DECODE, 51, 56, 76, 1),
        (DECODE, 71, 76, 96, 1),  # wasted
    ]
    assert milliseconds(run.end_s) == {"a": 81}  # the request itself does not wait for it
    assert len(run.outputs["a"]) == 3


def test_a_wasted_slot_delays_who_comes_next_by_one_step_and_a_stop_by_length_does_not():
    # b arrives at 79, too late for step 3.
    late = job("b", A_PROMPT[:50], 1, arrival_ms=79)
    run = world([job("a", A_PROMPT, 3, bound=10), late], "overlap", cache="none")
    # b: receive 81-82, schedule 82-84, prepare 84-87; the GPU computes the wasted slot until 96: 96 to 96 + 25.
    # The CPU: issue 87-91, waits for 3 until 96, process 96-101, receive 101-102, waits for b until 121, process 126.
    assert timeline(run)[3:] == [(DECODE, 71, 76, 96, 1), (PREFILL, 91, 96, 121, 1)]
    assert milliseconds(run.first_s)["b"] == 126
    run = world([job("a", A_PROMPT, 3), late], "overlap", cache="none")
    # No step 3. Same CPU work until 87; the GPU has been free since 76: 87-112. process 112-117.
    assert timeline(run)[3:] == [(PREFILL, 91, 87, 112, 1)]
    assert milliseconds(run.first_s)["b"] == 117


def test_beside_others_a_wasted_slot_costs_a_place_in_a_batch_and_no_step():
    jobs = [job("a", A_PROMPT, 3, bound=10), job("b", B_PROMPT, 6)]
    run = world(jobs, "overlap")
    # Prefill of both: 300 tokens, 20 + 30 = 50: 6-56. Five decodes of 20 each for b; a is in three of them, one wasted.
    assert [(mode, start, end, rows) for mode, _, start, end, rows in timeline(run)] == [
        (PREFILL, 6, 56, 2),
        (DECODE, 56, 76, 2),
        (DECODE, 76, 96, 2),
        (DECODE, 96, 116, 2),  # a's slot is wasted
        (DECODE, 116, 136, 1),
        (DECODE, 136, 156, 1),
    ]
    assert milliseconds(run.end_s) == {"a": 96 + 5, "b": 156 + 5}
    slots = sum(row[7] for row in run.rows)
    assert slots - sum(len(tokens) for tokens in run.outputs.values()) == 1


@pytest.mark.parametrize(("loop", "wasted"), [("normal", 0), ("overlap", 1)])
@pytest.mark.parametrize("by_eos", [True, False])
def test_slots_beyond_the_tokens_asked_for_are_one_per_eos_under_overlap_and_none_otherwise(loop, wasted, by_eos):
    jobs = [job(f"r{i}", [1000 * i + k for k in range(40)], 2 + i, bound=50 if by_eos else None) for i in range(4)]
    run = world(jobs, loop)
    slots = sum(row[7] for row in run.rows)
    assert slots - sum(j.writes for j in jobs) == (wasted * len(jobs) if by_eos else 0)


def test_an_eos_as_the_first_token_wastes_one_decode_under_overlap():
    run = world([job("a", A_PROMPT, 1, bound=10)], "overlap")
    assert timeline(run) == [(PREFILL, 10, 6, 36, 1), (DECODE, 20, 36, 56, 1)]
    assert milliseconds(run.end_s) == {"a": 41}


def test_two_prefills_in_a_row_may_be_kept_from_overlapping():
    # Both are there at 0, but b does not fit beside a into a prefill of 100 tokens.
    jobs = [job("a", A_PROMPT, 1), job("b", B_PROMPT, 1)]
    run = world(jobs, "overlap", max_prefill_tokens=100)
    # b: receive 10-11, schedule 11-13, prepare 13-16, issue 16-20, behind a: GPU 36-76. a is processed 36-41.
    assert timeline(run) == [(PREFILL, 10, 6, 36, 1), (PREFILL, 20, 36, 76, 1)]
    assert milliseconds(run.first_s) == {"a": 41, "b": 81}
    run = simulate(
        jobs, "overlap", cost=COST, host=HOST, loop_options={"overlap_prefills": False}, max_prefill_tokens=100
    )
    # b is scheduled by 13; then a is waited for until 36 and processed 36-41; prepare 41-44; GPU 44-84; process 84-89.
    assert timeline(run) == [(PREFILL, 10, 6, 36, 1), (PREFILL, 48, 44, 84, 1)]
    assert milliseconds(run.first_s) == {"a": 41, "b": 89}


def test_a_request_that_comes_while_the_first_batch_is_launched_is_in_the_second():
    # The CPU is busy with a until 10; b comes at 5 and must be found by the look at the inbox that follows.
    run = world([job("a", A_PROMPT, 1), job("b", B_PROMPT, 1, arrival_ms=5)], "overlap")
    assert timeline(run) == [(PREFILL, 10, 6, 36, 1), (PREFILL, 20, 36, 76, 1)]
    assert milliseconds(run.first_s) == {"a": 41, "b": 81}


def test_idle_time_between_requests_is_idle_under_every_loop():
    for loop in ("normal", "overlap"):
        run = world([job("a", A_PROMPT, 1), job("b", B_PROMPT, 1, arrival_ms=500)], loop)
        assert timeline(run) == [(PREFILL, 10, 6, 36, 1), (PREFILL, 510, 506, 546, 1)], loop
        assert milliseconds(run.first_s) == {"a": 41, "b": 551}, loop


# -- pipeline ------------------------------------------------------------------------------------------------------------


def test_alone_in_a_pipeline_a_step_passes_both_stages_before_the_next_starts():
    run = world([job("a", A_PROMPT, 2)], "pipeline", slots=2)
    # receive 0-1, schedule 1-3, prepare 3-6, issue 6-10. Stage 0: 6-36, stage 1: 36-66. receive 10-11 for the other slot,
    # which is empty. Waits until 66, process 66-71. receive 72, schedule 74, launch 81. 81-101, 101-121. process 126.
    assert timeline(run, 0) == [(PREFILL, 10, 6, 36, 1), (DECODE, 81, 81, 101, 1)]
    assert timeline(run, 1) == [(PREFILL, 10, 36, 66, 1), (DECODE, 81, 101, 121, 1)]
    assert milliseconds(run.first_s) == {"a": 71}
    assert milliseconds(run.end_s) == {"a": 126}


def test_two_requests_in_two_slots_are_on_different_stages_at_the_same_time():
    run = world([job("a", A_PROMPT, 2), job("b", B_PROMPT, 2)], "pipeline", slots=2, max_running=2)
    # a: prepared at 6, stage 0 6-36, stage 1 36-66. The CPU is at 10.
    # b: receive 11, schedule 13, prepare 16; stage 0 36-76, stage 1 76-116. The CPU is at 20, waits for a until 66,
    # process 66-71. a again: receive 72, schedule 74, launch 81: stage 0 81-101, stage 1 after b: 116-136.
    # The CPU waits for b until 116, process 116-121. b again: 122, 124, 131: stage 0 131-151, stage 1 151-171.
    # The CPU at 131 waits for a until 136, process 136-141. receive 142, waits for b until 171, process 176.
    assert timeline(run, 0) == [
        (PREFILL, 10, 6, 36, 1),
        (PREFILL, 20, 36, 76, 1),
        (DECODE, 81, 81, 101, 1),
        (DECODE, 131, 131, 151, 1),
    ]
    assert [step[2:4] for step in timeline(run, 1)] == [(36, 66), (76, 116), (116, 136), (151, 171)]
    assert milliseconds(run.first_s) == {"a": 71, "b": 121}
    assert milliseconds(run.end_s) == {"a": 141, "b": 176}


def test_a_link_delays_the_second_stage_and_is_a_queue_of_its_own():
    cost = LinearCost(step_s=0.020, prefill_token_s=0.0, link_s=0.007)
    run = world([job("a", A_PROMPT, 2)], "pipeline", host=FREE_HOST, cost=cost, slots=2)
    # Stage 0: 0-20. Link 20-27. Stage 1: 27-47. Again from 47: 47-67, 74-94.
    assert [step[2:4] for step in timeline(run, 0)] == [(0, 20), (47, 67)]
    assert [step[2:4] for step in timeline(run, 1)] == [(27, 47), (74, 94)]
    slow = LinearCost(step_s=0.020, prefill_token_s=0.0, link_s=0.030)
    run = world(
        [job("a", A_PROMPT, 1), job("b", B_PROMPT, 1)], "pipeline", host=FREE_HOST, cost=slow, slots=2, max_running=2
    )
    # a: 0-20, link 20-50, 50-70. b: 20-40, the link only from 50: 50-80, 80-100.
    assert [step[2:4] for step in timeline(run, 1)] == [(50, 70), (80, 100)]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_with_one_micro_batch_in_flight_all_stages_but_one_idle(stages, steps):
    cost = LinearCost(step_s=0.020, prefill_token_s=0.0)
    run = world([job("a", A_PROMPT, steps)], "pipeline", host=FREE_HOST, cost=cost, slots=stages)
    # Each step passes every stage before the next: stages * steps * 20 in all, of which a stage works steps * 20.
    assert milliseconds(run.end_s) == {"a": stages * steps * 20}
    for stage in range(stages):
        busy = sum(end - start for _, _, start, end, _ in timeline(run, stage))
        assert busy == steps * 20  # two stages: half idle


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_with_as_many_micro_batches_as_equal_stages_only_the_ramp_is_idle(stages, steps):
    cost = LinearCost(step_s=0.020, prefill_token_s=0.0)
    jobs = [job(f"r{i}", [1000 * i + k for k in range(50)], steps) for i in range(stages)]
    run = world(jobs, "pipeline", host=FREE_HOST, cost=cost, slots=stages, max_running=stages)
    # Stage s starts after s steps and then works without a gap for stages * steps of them.
    for stage in range(stages):
        times = timeline(run, stage)
        assert times[0][2] == stage * 20
        assert gaps(run, stage) == [0] * (stages * steps - 1)
        assert times[-1][3] == (stage + stages * steps) * 20
    # So the bubble is (stages - 1) of (stages * steps + stages - 1) steps.
    assert max(milliseconds(run.end_s).values()) == (stages * steps + stages - 1) * 20


def test_chunks_that_follow_depth_take_the_same_time_on_every_stage():
    class Attends(LinearCost):
        """A prompt token takes 0.1 ms, and half as long again for every 20 tokens before the chunk."""

        def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
            depth = int(batch.seq_lens[0]) - batch.prefill_tokens
            return batch.prefill_tokens * 0.0001 * (1 + depth / 40)

    def chunks(**settings: object) -> list[tuple[int, float]]:
        run = world([job("a", A_PROMPT, 1)], "pipeline", host=FREE_HOST, cost=Attends(), slots=2, chunk=40, **settings)
        rows = [row for row in run.rows if row[2] == 0]
        return [(row[8], us(row[6] - row[5]) / 1000) for row in rows]

    assert chunks() == [(40, 4), (40, 8), (20, 6)]
    # 40 * 40 / (40 + 40) = 20 after 40 tokens, 16 after 60, 40 * 40 / 116 = 13 after 76, and what is left.
    assert chunks(chunk_depth=40) == [(40, 4), (20, 4), (16, 4), (13, 3.77), (11, 3.548)]


def test_one_micro_batch_more_than_stages_hides_the_cpu_from_them():
    cost, host = LinearCost(step_s=0.020, prefill_token_s=0.0), replace(FREE_HOST, process_s=0.005)
    jobs = [job(name, [1000 * i + k for k in range(50)], 2) for i, name in enumerate("abc")]
    run = world(jobs[:2], "pipeline", host=host, cost=cost, slots=2, max_running=2)
    # a: 0-20, 20-40, processed 40-45, and only then again: stage 0, free since b's 20-40, waits for the CPU until 45.
    # b leaves stage 1 at 60, is processed 60-65, and starts at once: a's second step has had stage 0 until 65.
    assert [step[2:4] for step in timeline(run, 0)] == [(0, 20), (20, 40), (45, 65), (65, 85)]
    run = world(jobs, "pipeline", host=host, cost=cost, slots=3, stages=2, max_running=3)
    # Meanwhile c: 40-60 on stage 0. a is back at 45 and waits there; b, out at 60 and processed at 65, too.
    assert [step[2:4] for step in timeline(run, 0)] == [(start, start + 20) for start in range(0, 120, 20)]
    assert [step[2:4] for step in timeline(run, 1)] == [(start, start + 20) for start in range(20, 140, 20)]
    assert milliseconds(run.first_s) == {"a": 45, "b": 65, "c": 85}
    assert milliseconds(run.end_s) == {"a": 105, "b": 125, "c": 145}


def test_chunks_of_one_prompt_ride_consecutive_slots_and_fill_the_pipeline():
    cost = LinearCost(step_s=0.020, prefill_token_s=0.0)
    run = world([job("a", A_PROMPT, 1)], "pipeline", host=FREE_HOST, cost=cost, slots=2, chunk=25)
    # Four chunks of 25, each a step of 20 a stage, one behind the other: 0-20-40-60-80 on stage 0, 20 later on stage 1.
    assert [step[2:4] for step in timeline(run, 0)] == [(0, 20), (20, 40), (40, 60), (60, 80)]
    assert [step[2:4] for step in timeline(run, 1)] == [(20, 40), (40, 60), (60, 80), (80, 100)]
    assert [batch.slot for batch in run.batches] == [0, 1, 0, 1]
    assert milliseconds(run.first_s) == {"a": 100}
