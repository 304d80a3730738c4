"""Steps that bring a request a run of tokens, by hand: lengths launched and confirmed, and where a run ends."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scheduler.by_hand import EOS, both_batchings, form, generate, rids, scheduler, words
from workbench.scheduler.batch import StepOutput
from workbench.scheduler.config import ConfigError
from workbench.scheduler.messages import Abort
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult


def bring(s: Scheduler, batch: ScheduleBatch, *runs: list[int]) -> StepResult:
    tokens = np.array([token for run in runs for token in run], np.int32)
    result = s.process(batch, StepOutput(tokens, np.array([len(run) for run in runs])))
    s.check()
    return result


def decoding(new: int = 50, **settings: object) -> Scheduler:
    """A scheduler with one request of ten tokens, whose first output token, 100, is known."""
    s = scheduler(**{"draft_tokens": 3, "share_in_batch_tokens": None, **settings})
    s.receive([generate("a", words(0, 10), new)])
    assert [req.rid for req in bring(s, form(s), [100]).first] == ["a"]
    return s


def lengths(s: Scheduler) -> tuple[list[int], list[int]]:
    running = s.slots[0].running
    return running.lens.tolist(), running.confirmed.tolist()


def given(result: StepResult) -> tuple[list[int], list[int]]:
    assert result.output is not None and result.output.counts is not None
    return result.output.tokens.tolist(), result.output.counts.tolist()


def test_with_nothing_drafted_the_launched_lengths_are_the_confirmed_ones():
    s = scheduler()
    s.receive([generate("a", words(0, 10), 20)])
    form(s), form(s)
    running = s.slots[0].running
    assert running.confirmed is running.lens


def test_a_batch_has_bounds_and_its_run_confirms_what_is_true():
    s = decoding()
    first = form(s)
    assert (first.worker.query_lens.tolist(), first.worker.seq_lens.tolist()) == ([4], [14])
    assert first.worker.decode_tokens == 4 and first.worker.context_tokens == 14
    second = form(s)
    assert second.worker.seq_lens.tolist() == [18] and lengths(s) == ([18], [10])
    assert given(bring(s, first, [7, 8])) == ([7, 8], [2])
    assert lengths(s) == ([16], [12])
    bring(s, second, [9, 10, 11, 12])
    assert lengths(s) == ([16], [16])
    assert form(s).worker.seq_lens.tolist() == [20]
    assert s.kv.table.tokens(first.worker.rows[0], 17).tolist() == [*words(0, 10), 100, *words(7, 6)]


@pytest.mark.parametrize("page_size", [1, 4])
def test_pages_of_rejected_tokens_are_kept_for_the_next_step(page_size):
    s = decoding(page_size=page_size)
    first = form(s)
    held = s.kv.used_tokens
    bring(s, first, [7])
    assert s.kv.used_tokens == held == {1: 14, 4: 16}[page_size]
    second = form(s)  # needs KV for token 15, of which a page of four is there
    assert second.worker.decode_pages is not None and len(second.worker.decode_pages) == {1: 1, 4: 0}[page_size]
    assert second.worker.decode_page_places is not None
    assert second.worker.decode_page_places.tolist() == {1: [14], 4: []}[page_size]


@pytest.mark.parametrize("page_size", [1, 4])
def test_pages_are_held_for_the_longest_that_a_row_might_have_been(page_size):
    s = decoding(page_size=page_size)
    first, second = form(s), form(s)  # up to 18 tokens
    bring(s, first, [7])
    bring(s, second, [8])
    third = form(s)  # up to 16
    assert third.worker.seq_lens.tolist() == [16] and not len(third.worker.decode_pages)
    bring(s, third, [9, 10, 11, 12])
    assert form(s).worker.decode_page_places.tolist() == {1: [18, 19], 4: []}[page_size]


def test_a_request_that_fills_the_pool_gets_all_that_fits_and_then_ends():
    s = decoding(kv_tokens=15)
    batch = form(s)
    assert batch.worker.query_lens.tolist() == [4]
    bring(s, batch, [7, 8, 9, 10])
    batch = form(s)
    assert batch.worker.query_lens.tolist() == [1]
    assert s.next_batch() is None, "it may be over"
    bring(s, batch, [11])
    assert s.next_batch() is None
    (req,) = s.take_ended()
    assert req.finish.status == "aborted:kv_exhausted" and req.output_len == 6
    s.rest()


def test_who_was_retracted_holds_nothing_of_what_was_held_for_drafts():
    s = scheduler(
        draft_tokens=3, kv_tokens=32, batching="mixed", cache="none", page_size=4, max_batch_tokens=16, max_running=4
    )
    s.receive([generate("a", words(0, 8), 20), generate("b", words(50, 8), 20)])
    bring(s, form(s), [100], [200])
    bring(s, form(s), [101, 102], [201, 202])  # each has 10 tokens of KV in 12 that are held
    bring(s, form(s), [103], [203])  # 11 in 16
    bring(s, form(s), [104], [204])  # 12 in 16
    bring(s, form(s), [105], [205])  # 13 in 16
    batch = form(s)
    assert [req.rid for req in batch.retracted] == ["b"]
    bring(s, batch, [106])
    batch = form(s)
    assert rids(batch) == ["b", "a"] and batch.worker.query_lens.tolist() == [12, 4]
    s.receive([Abort("b")])
    bring(s, batch, [0], [107])
    assert s.kv.used_tokens == 20


def test_a_step_may_need_several_pages_of_a_row():
    s = decoding(draft_tokens=7, page_size=4)
    batch = form(s)  # from 10 to 18 tokens: from three pages to five
    assert batch.worker.decode_page_rows is not None and batch.worker.decode_page_places is not None
    assert batch.worker.decode_page_rows.tolist() == [batch.worker.rows[0]] * 2
    assert batch.worker.decode_page_places.tolist() == [3, 4]
    held = s.kv.table.pages(batch.worker.rows[0], 0, 5).tolist()
    assert held[3:] == batch.worker.decode_pages.tolist() and len(set(held)) == 5


@both_batchings
def test_a_stop_inside_a_run_cuts_it_and_the_cache_keeps_what_is_true(batching):
    s = decoding(batching=batching)
    result = bring(s, form(s), [7, EOS, 9, 10])
    assert given(result) == ([7, EOS], [2])
    (req,) = result.ended
    assert req.finish.kind == "stop" and req.output_len == 3
    s.rest()
    # The end of sequence was never an input, and the KV of what followed is of no use to anybody.
    assert s.kv.cache.counts.evictable_pages == 12
    said = np.array([*words(0, 10), 100, 7, EOS, 9], np.int32)
    assert s.kv.cache.tree.match(said, touch=False)[1] == 12


def test_nothing_is_drafted_beyond_the_output_bound():
    s = decoding(new=4)
    batch = form(s)
    assert batch.worker.query_lens.tolist() == [3] and batch.worker.seq_lens.tolist() == [13]
    result = bring(s, batch, [7, 8, 9])
    assert given(result)[1] == [3]
    (req,) = result.ended
    assert req.finish.kind == "length" and req.output_len == 4
    s.rest()


def test_a_stop_id_at_the_output_bound_is_a_stop_by_length_as_everywhere():
    s = decoding(new=3)
    (req,) = bring(s, form(s), [7, EOS]).ended
    assert req.finish.kind == "length" and req.output_len == 3


def test_who_may_have_ended_sits_out_until_that_is_known():
    s = decoding(new=4)
    s.receive([generate("b", words(50, 10), 40)])
    bring(s, form(s), [200])
    first = form(s)
    assert rids(first) == ["a", "b"] and first.worker.query_lens.tolist() == [3, 4]
    second = form(s)
    assert rids(second) == ["b"] and second.worker.epoch != first.worker.epoch
    bring(s, first, [7], [201, 202])
    third = form(s)
    assert rids(third) == ["a", "b"] and third.worker.query_lens.tolist() == [2, 4]
    bring(s, second, [203])
    (req,) = bring(s, third, [8, 9], [204]).ended
    assert req.rid == "a" and req.output_len == 4
    assert lengths(s) == ([14], [14])


def test_everybody_sitting_out_forms_no_batch():
    s = decoding(new=3)
    batch = form(s)
    assert s.next_batch() is None and not s.idle
    bring(s, batch, [7])
    assert form(s).worker.query_lens.tolist() == [1]


def test_an_abort_in_flight_keeps_what_was_given_and_drops_the_run_that_comes():
    s = decoding()
    first, second = form(s), form(s)
    bring(s, first, [7, 8])
    s.receive([Abort("a")])
    (req,) = s.take_ended()
    assert req.output_len == 3
    result = bring(s, second, [9, 10, 11])
    assert given(result) == ([], [0]) and not result.ended
    assert s.idle
    s.rest()
    # The step in flight has made at least one more token of KV true.
    assert s.kv.cache.tree.match(np.array([*words(0, 10), 100, 7, 8, 9], np.int32), touch=False)[1] == 13


def test_a_run_that_ends_a_request_drops_the_one_in_flight():
    s = decoding()
    first, second = form(s), form(s)
    assert [req.rid for req in bring(s, first, [EOS]).ended] == ["a"]
    assert second.dropped == {0}
    assert given(bring(s, second, [9, 10])) == ([], [0])
    s.rest()


def test_a_request_retracted_in_flight_still_gets_its_run():
    s = scheduler(draft_tokens=3, kv_tokens=30, batching="mixed", cache="none")
    s.receive([generate("a", words(0, 8), 20), generate("b", words(50, 8), 20)])
    bring(s, form(s), [100], [200])
    first = form(s)  # each may have 12 tokens of KV, and 30 are too few for 16 each
    second = form(s)
    assert [req.rid for req in second.retracted] == ["b"] and rids(second) == ["a"]
    result = bring(s, first, [7, 8], [201, 202, 203])
    assert given(result) == ([7, 8, 201, 202, 203], [2, 3])
    (req,) = s.queue.waiting
    assert req.rid == "b" and req.tokens.tolist() == [*words(50, 8), 200, 201, 202, 203] and req.output_len == 4


def test_a_late_run_may_end_a_request_that_waits():
    s = scheduler(draft_tokens=3, kv_tokens=30, batching="mixed", cache="none")
    s.receive([generate("a", words(0, 8), 20), generate("b", words(50, 8), 20)])
    bring(s, form(s), [100], [200])
    first, second = form(s), form(s)
    result = bring(s, first, [7], [201, EOS, 203])
    assert given(result) == ([7, 201, EOS], [1, 2])
    (req,) = result.ended
    assert req.rid == "b" and req.finish.kind == "stop" and req.output_len == 3
    assert req.tokens.tolist() == [*words(50, 8), 200, 201, EOS]
    assert not s.queue.waiting
    bring(s, second, [8])


def test_decodes_beside_a_prompt_take_a_run_s_tokens_of_the_budget():
    s = decoding(batching="mixed", max_batch_tokens=16, max_running=4)
    s.receive([generate("b", words(50, 40), 5)])
    batch = form(s)
    assert rids(batch) == ["b", "a"] and batch.worker.query_lens.tolist() == [12, 4]
    assert batch.worker.prefill_tokens == 12 and batch.worker.decode_tokens == 4
    result = bring(s, batch, [0], [7, 8, 9])  # the prompt is not complete: its sample means nothing
    assert given(result) == ([7, 8, 9], [0, 3])


def test_a_run_longer_than_what_was_computed_is_a_fault():
    s = decoding()
    with pytest.raises(AssertionError, match="runs of wrong length"):
        s.process(form(s), StepOutput(np.zeros(5, np.int32), np.array([5])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_tokens": -1}, "draft_tokens: -1 is less than 0"),
        (
            {"draft_tokens": 3, "batching": "mixed", "max_batch_tokens": 31, "max_running": 8},
            "max_batch_tokens: 31 cannot give each of 8 running requests 4 tokens; raise it or lower max_running",
        ),
        (
            {"draft_tokens": 3, "mixed_chunk": True, "chunk": 32, "max_running": 8},
            "chunk: 32 leaves no room for a prompt beside 8 decodes (mixed_chunk)",
        ),
    ],
)
def test_steps_that_leave_no_room_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        scheduler(**settings)
    assert str(error.value) == message
