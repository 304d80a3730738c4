"""The rules that make a preset decide as vLLM does, each in a situation small enough to follow by hand."""

from __future__ import annotations

import pytest

from tests.scheduler.by_hand import EOS, extends, finish_all, form, generate, process, rids, scheduler, step, words
from workbench.scheduler.config import ConfigError, SchedulerConfig
from workbench.scheduler.messages import Abort, SetState
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler
from workbench.settings.engines import load_engine
from workbench.settings.loading import settings_from


def in_turn(**settings: object) -> Scheduler:
    """Blocks of 4 tokens, steps of 16, and the rules of the newest vLLM."""
    rules = {
        "batching": "mixed",
        "mixed_order": "admission",
        "page_size": 4,
        "cache": "blocks",
        "max_batch_tokens": 16,
        "max_running": 8,
        "share_in_batch_tokens": None,
        "max_passed_over": None,
        "admit_for": "prompt",
        "preempt_first": "priority",
        "after_own_preemption": "go-on",
        "give_back": "ended",
        "aborted_kv": "drop",
    }
    return scheduler(**{**rules, **settings})


def computed(batch: ScheduleBatch) -> dict[str, int]:
    """What a batch computes of each of its requests."""
    return dict(zip(rids(batch), batch.worker.query_lens.tolist(), strict=True))


def retracted(batch: ScheduleBatch) -> list[str]:
    return [req.rid for req in batch.retracted]


def two_ahead(s: Scheduler, steps: int) -> list[ScheduleBatch]:
    """Choose batches as the overlap loop does, each before the result of the one before; all but the last are processed."""
    batches = [form(s)]
    for _ in range(steps - 1):
        batches.append(form(s))
        process(s, batches[-2])
    return batches


# -- the prefix cache of blocks -------------------------------------------------------------------------------------------


def test_a_prompt_is_found_by_another_in_the_same_step():
    s = in_turn()
    s.receive([generate("a", words(0, 10), 2), generate("b", words(0, 10), 2)])
    assert computed(form(s)) == {"a": 10, "b": 2}


def test_at_least_one_token_is_computed_so_the_last_full_block_may_be_computed_again():
    s = in_turn()
    s.receive([generate("a", words(0, 8), 1), generate("b", words(0, 8), 1)])
    assert computed(form(s)) == {"a": 8, "b": 4}


@pytest.mark.parametrize(("ahead", "computes"), [(False, 1), (True, 5)])
def test_a_block_of_output_is_found_with_the_step_that_fills_it_if_its_tokens_are_known(ahead, computes):
    # The prompt and its first token, 7, fill two blocks. Chosen ahead, that token is still to come.
    s = in_turn()
    s.receive([generate("a", words(0, 7), 20)])
    first = form(s)
    if not ahead:
        process(s, first)
    s.receive([generate("b", [*words(0, 7), 7, 9], 1), generate("c", [*words(0, 7), 7, 9], 1)])
    second = form(s)
    assert computed(second)["b"] == computes
    if ahead:
        process(s, first)
    process(s, second)
    s.receive([generate("d", [*words(0, 7), 7, 8], 1)])
    assert computed(form(s))["d"] == 1


def test_blocks_of_the_same_content_stay_apart_and_the_first_is_found():
    s = in_turn(max_batch_tokens=32)
    s.receive([generate("a", words(0, 8), 30)])
    step(s)
    s.receive([generate("b", words(0, 8), 30)])  # its second block holds its last token, so it gets one of its own
    step(s)
    (a, b), pages = s.slots[0].running.reqs, s.kv.table.pages
    assert pages(a.row, 0, 1) == pages(b.row, 0, 1) and pages(a.row, 1, 2) != pages(b.row, 1, 2)
    first = int(pages(a.row, 1, 2)[0])
    s.receive([Abort("b"), generate("c", [*words(0, 8), 99], 1)])
    form(s)
    (c,) = [req for req in s.lifecycle.by_id.values() if req.rid == "c"]
    assert pages(c.row, 1, 2) == first


def test_blocks_are_evicted_one_by_one_the_last_of_a_prompt_first():
    s = in_turn(kv_tokens=32)
    s.receive([generate("a", words(0, 16), 1)])
    step(s)
    s.receive([generate("b", words(100, 12), 9)])
    step(s)  # 4 blocks of a, 3 of b, one is free
    step(s)  # b takes that one
    assert s.kv.pool.free == 0
    for _ in range(3):
        step(s)
    step(s)  # and now a's last one
    s.receive([Abort("b"), generate("c", words(0, 16), 1)])
    assert computed(form(s)) == {"c": 4}


@pytest.mark.parametrize(("blanks", "computes"), [("free", 5), ("queue", 9)])
def test_what_has_no_name_is_taken_before_any_content_or_waits_behind_it(blanks, computes):
    s = in_turn(kv_tokens=20, blank_pages=blanks)
    s.receive([generate("a", words(0, 8), 1)])
    step(s)
    s.receive([generate("b", words(100, 5), 9)])
    step(s)
    s.receive([Abort("b"), generate("c", words(200, 12), 1)])
    step(s)  # three blocks: the one never used, then the empty one of b and a's last, or both of a
    s.receive([generate("d", [*words(0, 8), 999], 1)])
    assert computed(form(s)) == {"d": computes}


def test_a_policy_that_needs_a_tree_of_prefixes_is_refused():
    for settings, message in (
        ({"policy": "dfs-weight"}, "policy: dfs-weight goes by a tree of prefixes; it needs cache radix, not blocks"),
        ({"policy": "priority", "preempt_threshold": 1}, "preempt_threshold: needs cache radix or none, not blocks"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            SchedulerConfig(kv_tokens=100, max_context=50, cache="blocks", **settings)


# -- mixed steps in the order of admission --------------------------------------------------------------------------------


def test_several_prompts_are_under_way_where_none_may_take_the_whole_step():
    s = in_turn(long_prefill_tokens=5)
    s.receive([generate(rid, words(100 * i, 12), 3) for i, rid in enumerate("abcd")])
    assert computed(form(s)) == {"a": 5, "b": 5, "c": 5, "d": 1}
    assert s.snapshot()["prefilling"] == 4
    assert sum(extends(form(s))) == 16


def test_prompts_and_decodes_are_served_in_the_order_of_their_admission():
    s = in_turn(long_prefill_tokens=8)
    s.receive([generate("a", words(0, 30), 3), generate("c", words(200, 2), 30), generate("b", words(100, 30), 3)])
    assert computed(step(s)) == {"a": 8, "c": 2, "b": 6}
    s.receive([generate("d", words(300, 1), 3)])
    assert computed(step(s)) == {"a": 8, "c": 1, "b": 7}
    assert computed(step(s)) == {"a": 8, "c": 1, "b": 7}
    assert computed(step(s)) == {"a": 6, "c": 1, "b": 8, "d": 1}
    assert computed(step(s)) == {"a": 1, "c": 1, "b": 2, "d": 1}
    assert [req.rid for req in s.slots[0].running.reqs] == ["a", "c", "b", "d"]


def test_a_decode_for_which_no_token_is_left_sits_the_step_out_and_goes_on_after_it():
    s = in_turn(long_prefill_tokens=4)
    s.receive([generate("a", words(0, 18), 3), generate("b", words(100, 18), 3), generate("c", words(200, 2), 4)])
    assert computed(step(s, 50)) == {"a": 4, "b": 4, "c": 2}
    s.receive([SetState({"long_prefill_tokens": 8}, lambda wrong: None)])
    assert computed(step(s, 51)) == {"a": 8, "b": 8}
    assert computed(step(s, 52)) == {"a": 6, "b": 6, "c": 1}
    (c,) = [req for req in s.slots[0].running.reqs if req.rid == "c"]
    assert s.kv.table.tokens(c.row, 4).tolist() == [200, 201, 50, 52]
    assert [req.rid for batch in finish_all(s) for req in batch.reqs].count("c") == 2


@pytest.mark.parametrize(("alone", "computes"), [("bounded", 5), ("free", 16)])
def test_a_request_that_is_alone_may_be_free_of_that_bound(alone, computes):
    s = in_turn(long_prefill_tokens=5, long_prefill_alone=alone)
    s.receive([generate("a", words(0, 30), 3)])
    assert computed(form(s)) == {"a": computes}


@pytest.mark.parametrize(("room", "goes"), [("chunk", {"a": 1, "b": 15}), ("prompt", {"a": 1})])
def test_a_prompt_is_let_in_for_its_first_chunk_or_only_whole(room, goes):
    s = in_turn(kv_tokens=32, admit_for=room)
    s.receive([generate("a", words(0, 8), 8)])
    step(s)
    s.receive([generate("b", words(100, 24), 2)])
    assert computed(form(s)) == goes


def test_who_waits_for_its_last_token_holds_its_place_and_its_blocks_until_then():
    s = in_turn(max_running=1)
    s.receive([generate("a", words(0, 8), 2), generate("b", words(100, 8), 1)])
    first, second = two_ahead(s, 2)
    assert computed(second) == {"a": 1} and first is not second
    assert s.next_batch() is None
    process(s, second)
    assert computed(form(s)) == {"b": 8}


def test_decodes_take_their_blocks_before_a_prompt_is_looked_for():
    s = in_turn(kv_tokens=20)
    s.receive([generate("a", words(0, 4), 1)])
    step(s)
    s.receive([generate("b", words(100, 16), 5)])
    step(s)  # four blocks of b and one of a
    s.receive([generate("c", [*words(0, 4), 99], 1)])
    assert computed(form(s)) == {"b": 1}  # which has taken what c would have found, and the rest
    assert not list(s.kv.cache.nodes())


def test_those_that_end_together_give_back_in_the_order_of_their_admission():
    s = in_turn(kv_tokens=24)
    s.receive([generate("a", words(0, 4), 2)])
    step(s)
    s.receive([generate("b", words(100, 4), 1)])
    step(s)
    assert [int(node.pages[0]) for node in s.kv.cache.nodes()] == [0, 2]  # a's block, then b's


# -- preemption -----------------------------------------------------------------------------------------------------------


def test_the_newest_is_preempted_and_finds_its_blocks_again():
    s = in_turn(kv_tokens=32)
    s.receive([generate("a", words(0, 8), 12), generate("b", words(100, 8), 12)])
    batches = [step(s) for _ in range(9)]
    assert [computed(batch) for batch in batches[1:]] == [{"a": 1, "b": 1}] * 8
    last = step(s)
    assert (retracted(last), computed(last)) == (["b"], {"a": 1})
    b = s.queue.waiting[0]
    assert len(b.tokens) == 17
    for _ in range(2):
        step(s)
    # Once a has ended, what is left of b is found: all but what a took, from its end.
    back = form(s)
    assert computed(back)["b"] < 17 and b.retractions == 1


def test_nobody_is_let_in_with_a_preemption():
    s = in_turn(kv_tokens=32)
    s.receive([generate("a", words(0, 8), 12), generate("b", words(100, 8), 12)])
    for _ in range(9):
        step(s)
    s.receive([generate("c", [1], 1)])
    batch = step(s)
    assert (retracted(batch), computed(batch)) == (["b"], {"a": 1})


def test_a_prompt_under_way_preempts_itself():
    s = in_turn(kv_tokens=28, admit_for="chunk")
    s.receive([generate("a", words(0, 8), 12)])
    step(s)
    s.receive([generate("b", words(100, 24), 2)])
    assert computed(step(s)) == {"a": 1, "b": 15}
    batch = step(s)
    assert (retracted(batch), computed(batch)) == (["b"], {"a": 1})


def by_priority(**settings: object) -> Scheduler:
    return in_turn(policy="priority", **settings)


@pytest.mark.parametrize(("first", "gone"), [("newest", "c"), ("priority", "a")])
def test_under_priorities_the_lowest_may_go_even_if_it_has_been_served(first, gone):
    s = by_priority(kv_tokens=24, preempt_first=first)
    s.receive([generate("a", words(0, 5), 20, priority=1)])
    step(s)
    s.receive([generate("b", words(100, 8), 20, priority=2), generate("c", words(200, 5), 20, priority=2)])
    assert computed(step(s)) == {"a": 1, "b": 8, "c": 5}
    batch = step(s)  # b needs a third block
    assert retracted(batch) == [gone]
    assert computed(batch) == {rid: 1 for rid in "abc" if rid != gone}


@pytest.mark.parametrize(("after", "goes"), [("go-on", {"a": 1, "c": 1}), ("stop", {"a": 1})])
def test_those_behind_one_that_preempts_itself_go_on_or_not(after, goes):
    s = by_priority(kv_tokens=20, after_own_preemption=after)
    s.receive([generate("a", words(0, 5), 30, priority=2), generate("b", words(100, 6), 30, priority=1)])
    assert computed(step(s)) == {"a": 5, "b": 6}
    s.receive([generate("c", words(200, 1), 30, priority=2)])
    assert [set(computed(step(s))) for _ in range(2)] == [{"a", "b", "c"}] * 2
    batch = step(s, 50)  # b needs a block and is itself the least
    assert retracted(batch) == ["b"] and computed(batch) == goes
    assert [req.rid for req in s.slots[0].running.reqs] == ["a", "c"]
    assert set(computed(step(s))) == {"a", "c"}  # who was left out has lost nothing but the step


def test_blocks_of_a_victim_that_has_been_served_are_for_those_behind():
    s = by_priority(kv_tokens=40, admit_for="chunk")
    s.receive([generate("a", words(0, 9), 30, priority=1)])
    step(s)
    s.receive([generate("b", words(100, 30), 2, priority=2)])
    assert computed(step(s)) == {"a": 1, "b": 15}
    batch = step(s)  # three blocks of a and eight of b are one too many
    assert retracted(batch) == ["a"] and computed(batch) == {"b": 15}
    (a,) = s.queue.waiting
    assert len(a.tokens) == 9 + 2 and a.kv_len == 0


def test_blocks_that_a_victim_was_to_fill_in_this_very_step_are_not_found():
    s = by_priority(kv_tokens=28, long_prefill_tokens=8)
    s.receive([generate("a", words(0, 25), 1, priority=1)])
    step(s)
    s.receive([generate("b", words(100, 4), 9, priority=2)])
    assert computed(step(s)) == {"a": 8, "b": 4}
    batch = step(s)  # a takes the last two blocks and names them, and then b needs one
    assert retracted(batch) == ["a"] and computed(batch) == {"b": 1}
    s.receive([Abort("b"), generate("c", [*words(0, 24), 99], 1, priority=2)])
    form(s)
    assert s.lifecycle.by_id["c"].cached_tokens == 16


@pytest.mark.parametrize(("gap", "goes"), [(False, {"b": 1, "c": 1}), (True, {"b": 1})])
def test_one_that_is_preempted_before_its_last_token_may_cost_another_its_turn(gap, goes):
    s = by_priority(kv_tokens=20, preemption_gap=gap)
    s.receive([generate("a", words(0, 7), 2, priority=1)])
    first = form(s)
    s.receive([generate("b", words(100, 4), 9, priority=2), generate("c", words(200, 5), 9, priority=2)])
    second = form(s)
    assert computed(second) == {"a": 1, "b": 4, "c": 5}
    process(s, first)
    third = form(s)  # a has had its last step; b needs a block
    assert retracted(third) == ["a"] and computed(third) == goes
    (ended,) = process(s, second).ended
    assert (ended.rid, ended.output_len, ended.finish.status) == ("a", 2, "finished")
    process(s, third)
    assert computed(form(s)) == {"b": 1, "c": 1}


# -- the end --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("when", "goes"), [("landed", {}), ("ended", {"b": 8})])
def test_an_aborted_request_gives_way_at_once_though_a_batch_computes_it(when, goes):
    s = in_turn(kv_tokens=12, max_running=1, give_back=when)
    s.receive([generate("a", words(0, 8), 9)])
    batch = form(s)
    s.receive([Abort("a"), generate("b", words(100, 8), 1)])
    other = s.next_batch()
    s.check()
    assert ({} if other is None else computed(other)) == goes
    process(s, batch)
    if other is not None:
        assert process(s, other, 5).ended[0].rid == "b"
    finish_all(s)


@pytest.mark.parametrize(("when", "goes"), [("landed", {}), ("ended", {"b": 8})])
def test_one_that_stops_by_a_token_gives_way_at_once_too(when, goes):
    s = in_turn(kv_tokens=12, max_running=1, give_back=when)
    s.receive([generate("a", words(0, 8), 9), generate("b", words(100, 8), 1)])
    first, second = form(s), form(s)
    assert [req.rid for req in process(s, first, EOS).ended] == ["a"]
    other = s.next_batch()
    s.check()
    assert ({} if other is None else computed(other)) == goes
    process(s, second)
    if other is not None:
        process(s, other)
    finish_all(s)


@pytest.mark.parametrize(("kept", "found"), [("keep", 8), ("drop", 4)])
def test_what_an_aborted_request_has_just_filled_is_kept_or_not(kept, found):
    s = in_turn(aborted_kv=kept)
    s.receive([generate("a", words(0, 7), 9)])
    first, second = form(s), form(s)
    process(s, first)
    s.receive([Abort("a"), generate("b", [*words(0, 7), 7, 8], 1)])  # 7 is what it wrote
    assert computed(form(s))["b"] == 9 - found
    process(s, second)


# -- presets --------------------------------------------------------------------------------------------------------------


def test_a_block_of_the_pool_is_the_engines_own():
    config = settings_from(None, {"engine": "vllm-0.33.0"}).scheduler(160, 100, 1)
    assert config.pages == 9


def test_presets_differ_in_what_the_versions_do():
    newest, before, oldest = (load_engine(f"vllm-{version}").settings for version in ("0.33.0", "0.19.0", "0.14.0"))
    assert {name: value for name, value in before.items() if newest.get(name) != value} == {
        "blank_pages": "queue",
        "after_own_preemption": "stop",
        "preemption_gap": True,
        "long_prefill_alone": "bounded",
    }
    assert {name: value for name, value in oldest.items() if before.get(name) != value} == {"admit_for": "chunk"}
