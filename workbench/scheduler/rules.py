"""Rules in which engines differ where this project's own way is one of several: settings, each with a name and a meaning.

A preset of an engine (``workbench/settings/engines.toml``) is these rules together, so that it decides as the engine does,
batch by batch (``workbench/parity``). No code asks which engine it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from workbench.scheduler.settings import RULES, setting


def caches(settings: Any, loop: str) -> bool:
    """Tell whether there is a prefix cache."""
    return bool(settings.cache != "none")


def radix(settings: Any, loop: str) -> bool:
    """Tell whether the prefix cache is a radix tree."""
    return bool(settings.cache == "radix")


def prefill_first(settings: Any, loop: str) -> bool:
    """Tell whether prompts have batches of their own."""
    return bool(settings.batching == "prefill-first")


def _blocks(settings: Any, loop: str) -> bool:
    return bool(settings.cache == "blocks")


def mixed(settings: Any, loop: str) -> bool:
    """Tell whether every batch holds decodes and what else fits."""
    return bool(settings.batching == "mixed")


def _in_turn(settings: Any, loop: str) -> bool:
    return mixed(settings, loop) and bool(settings.mixed_order == "admission")


def _by_priority(settings: Any, loop: str) -> bool:
    return _in_turn(settings, loop) and bool(settings.policy == settings.preempt_first == "priority")


def in_flight(settings: Any, loop: str) -> bool:
    """Tell whether a batch is chosen while another is in flight."""
    return loop != "normal"


def _prefill_first_in_flight(settings: Any, loop: str) -> bool:
    return prefill_first(settings, loop) and in_flight(settings, loop)


IN_FLIGHT = "the overlap or the pipeline loop"
PREFIX_CACHE = "a prefix cache"
RADIX_CACHE = "a radix cache"
PREFILL_FIRST = "prefill-first batching"
MIXED = "mixed batching"
IN_TURN = "mixed batching in the order of admission"


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)  # only what inherits it is ever made
class EngineRules:
    """Rules of an engine, of which the defaults are this project's own way. Lengths are tokens."""

    share_in_batch_tokens: int | None = setting(
        32,
        least=1,
        zero_is_none=True,
        live=True,
        group=RULES,
        help="Put a request off by one batch when at least this much of its prompt is being computed in this one; 0: never. "
        "Default {default}.",
        needs=PREFIX_CACHE,
        acts=caches,
    )
    """Ours and SGLang's for policies that go by the prefix cache: what is computed once need not be computed twice."""
    reserved_pages: int = setting(
        0,
        least=0,
        group=RULES,
        help="KV pages that the engine keeps for itself. Default {default}.",
    )
    """vLLM's null block."""
    charge: Literal["tokens", "pages"] = setting(
        "tokens",
        group=RULES,
        help="What admission counts a prompt for: {choices}; pages: whole ones and one more a request. Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    """tokens: the step's budgets pay what is computed, KV the rest of a request in whole pages.

    pages: every budget pays whole pages; a request is let in if its rest and a page more are less than the KV left, and is
    charged that page and its whole output bound, whatever it has written before a retraction. With chunks only an empty
    prompt budget stops the next prompt. The chunk of a prompt under way is cut to the KV left, if any is, and not to pages.
    Outputs are bounded so that there can be room for them.
    """
    reserve_ignore_eos: bool = setting(
        False,
        group=RULES,
        help="Running requests that ignore EOS are expected to write all they may.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    round_reserve: bool = setting(
        True,
        group=RULES,
        help="Round up what running requests are expected to need. Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    outputs_counted: Literal["launch", "result"] = setting(
        "launch",
        group=RULES,
        help="When a token counts as written, in expectations and for retraction: {choices} of its step. Default {default}.",
        needs=f"{PREFILL_FIRST}, and {IN_FLIGHT}",
        acts=_prefill_first_in_flight,
    )
    full_when: Literal["refused", "exhausted", "never"] = setting(
        "refused",
        group=RULES,
        help="When admission stops until something is given back: {choices}: once a request did not fit, or one took all "
        "that was left as well, or at no time. Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    """refused: a request did not fit.

    exhausted: also when one fits and leaves nothing; but not where nobody runs and nobody was let in. Rows are counted
    before the queue is put in order, an unfinished chunk that leaves its batch opens it again, a prompt's chunk that is cut
    by KV alone does not end the look at the queue, and where a budget is spent nobody's prefix is looked for.

    never: who was refused is looked at again in every step. What it needs may be less: more of its prompt is in the cache.
    """
    evict_for: Literal["row", "batch", "batch-ahead"] = setting(
        "row",
        group=RULES,
        help="What is evicted for at a time: {choices}. Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    """row: each request of a prefill as it is let in, and what a decode is short of.

    batch: all of them at once, when the last has been let in.

    batch-ahead: the same, and where pages hold more than a token, a page a row is freed for beside the tokens of a prefill,
    and in a decode, whether it starts one or not.
    """
    mixed_join: Literal["before", "after"] = setting(
        "before",
        group=RULES,
        help="When it is decided whether decodes join a prefill (mixed_chunk): {choices} its prompts are chosen. "
        "Default {default}.",
        needs="mixed_chunk",
        acts=lambda s, loop: prefill_first(s, loop) and s.mixed_chunk,
    )
    """before: the prompts leave them a page each. after: the prompts leave them a token each of the budgets, and they join
    if there are pages for them, behind the prompts, as they run from then on."""
    share_prompts: Literal["launch", "result"] = setting(
        "launch",
        group=RULES,
        help="When the prefix cache takes in a complete prompt: {choices} of its step. Default {default}.",
        needs=RADIX_CACHE,
        acts=radix,
    )
    """launch: with the next choice of a batch. result: as its result is processed, in the order of the batch among those
    that end with it. A prompt in part is taken in with the next choice either way (``share_chunks``)."""
    share_chunks: bool = setting(
        True,
        group=RULES,
        help="The prefix cache takes in what is computed of an unfinished prompt; off: only whole ones. Default {default}.",
        needs=RADIX_CACHE,
        acts=radix,
    )
    share_launched: bool = setting(
        False,
        group=RULES,
        help="With a prompt whose result is there, the prefix cache takes in what has been launched of its output by then.",
        needs="share_prompts 'result' and a radix cache",
        acts=lambda s, loop: s.share_prompts == "result" and s.cache == "radix",
    )
    touch_part: bool = setting(
        True,
        group=RULES,
        help="A match that ends inside a run of tokens of the prefix cache counts as a use of that run. Default {default}.",
        needs=RADIX_CACHE,
        acts=radix,
    )
    touch_known: bool = setting(
        False,
        group=RULES,
        help="What is put into the prefix cache counts as used again where all of it was there.",
        needs=RADIX_CACHE,
        acts=radix,
    )
    split_at_prompt: bool = setting(
        False,
        group=RULES,
        help="Outputs are leaves of their own in the prefix cache, so that they can be evicted without their prompt.",
        needs=RADIX_CACHE,
        acts=radix,
    )
    page_beside: bool = setting(
        True,
        group=RULES,
        help="Let a request in only where the page that charge 'pages' adds to its own is left, too. Default {default}.",
        needs="charge 'pages' and prefill-first batching",
        acts=lambda s, loop: prefill_first(s, loop) and s.charge == "pages",
    )
    prompt_budget: Literal["spent", "whole"] = setting(
        "spent",
        group=RULES,
        help="When max-prefill-tokens stops the next prompt that may be cut: {choices}: nothing is left of it, or less "
        "than the prompt. Default {default}.",
        needs="charge 'pages' and prefill-first batching",
        acts=lambda s, loop: prefill_first(s, loop) and s.charge == "pages",
    )
    rows_first: bool = setting(
        True,
        group=RULES,
        help="Look for a free place before the queue is put in order; else a prompt in part waits for one. Default "
        "{default}.",
        needs="full_when 'exhausted' and prefill-first batching",
        acts=lambda s, loop: prefill_first(s, loop) and s.full_when == "exhausted",
    )
    look_when_spent: bool = setting(
        False,
        group=RULES,
        help="Look up the prefix of the first in order, which is its use, though a prompt in part has spent the budget.",
        needs="full_when 'exhausted' and prefill-first batching",
        acts=lambda s, loop: prefill_first(s, loop) and s.full_when == "exhausted",
    )
    leaves: Literal["ended", "decode"] = setting(
        "ended",
        group=RULES,
        help="When who has ended takes no place any more: {choices}: at once, or with the next decode. Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    evict_amount: Literal["missing", "all"] = setting(
        "missing",
        group=RULES,
        help="How much is evicted where less is free than is wanted: {choices} of that. Default {default}.",
        needs=PREFIX_CACHE,
        acts=caches,
    )
    refresh_waiting: int | None = setting(
        None,
        least=1,
        group=RULES,
        help="Every so many looks at the queue, what the prefix cache has of its first 128 requests counts as used. "
        "Default: never.",
        needs="a radix cache and prefill-first batching",
        acts=lambda s, loop: s.cache == "radix" and s.batching == "prefill-first",
    )
    look_touches: bool = setting(
        False,
        group=RULES,
        help="To look up how much of a waiting prompt the prefix cache has counts as its use (policy lpm).",
        needs="policy 'lpm' and a prefix cache",
        acts=lambda s, loop: s.policy == "lpm" and s.cache != "none",
    )
    defer_shared_tokens: int | None = setting(
        None,
        least=1,
        group=RULES,
        help="Who shares so many tokens with one before it, and has no more of them in the prefix cache, goes last (policy "
        "lpm). Default: nobody.",
        needs="policy 'lpm' and a prefix cache",
        acts=lambda s, loop: s.policy == "lpm" and s.cache != "none",
    )
    queue_order: Literal["arrival", "policy"] = setting(
        "arrival",
        group=RULES,
        help="What a policy puts in order: the queue by {choices}; policy: as the policy left it. Default {default}.",
        needs="another policy than fcfs",
        acts=lambda s, loop: s.policy != "fcfs",
    )
    requeue: Literal["arrival", "front", "back"] = setting(
        "arrival",
        group=RULES,
        help="Where a request that has lost its KV waits: {choices} of the queue. Default {default}.",
    )
    """arrival: at its place by arrival, as if it had never been let in."""
    in_flight_token: Literal["keep", "lose"] = setting(
        "keep",
        group=RULES,
        help="What becomes of the token that a batch in flight still brings a request that has lost its KV: {choices}. "
        "Default {default}.",
        needs=IN_FLIGHT,
        acts=in_flight,
    )
    """lose: it is computed again."""
    abort_partial: Literal["now", "result"] = setting(
        "now",
        group=RULES,
        help="Whether an abort ends a prompt in part {choices}, or with the result of its last step. Default {default}.",
        needs="abort_running 'result'",
        acts=lambda s, loop: s.abort_running == "result",
    )
    stops_known: Literal["launch", "result"] = setting(
        "launch",
        group=RULES,
        help="When it is known that a request ends by length: {choices} of its last step. Default {default}.",
        needs=IN_FLIGHT,
        acts=in_flight,
    )
    """result: where steps are launched before, it is in one more, for nothing."""
    abort_running: Literal["now", "result"] = setting(
        "now",
        group=RULES,
        help="When the abort of a request that has its prompt behind it ends it: {choices} of its next step. "
        "Default {default}.",
    )
    """result: it is in one more batch, at least."""
    preempt_for: Literal["request", "place"] = setting(
        "request",
        group=RULES,
        help="What is taken from running requests of lower priority: {choices}; place: only where none is free, whatever KV "
        "they have. Default {default}.",
        needs="policy 'priority' and prefill-first batching",
        acts=lambda s, loop: s.policy == "priority" and s.batching == "prefill-first",
    )
    """request: all that the first request in order needs, KV and a place, if it can be let in then.

    place: a place, for any request and beside others; victims are taken until what they may yet write and the KV left are as
    much as the request needs, as of the last look at it. Who was let in last goes first among equals.
    """
    aborted_kv: Literal["keep", "drop"] = setting(
        "keep",
        group=RULES,
        help="What becomes of the KV of an aborted request that the prefix cache does not have yet: {choices}. Default "
        "{default}.",
        needs=PREFIX_CACHE,
        acts=caches,
    )
    """Of one that ends with the result of a step (``abort_running``) it is kept as of any other."""
    retract_ahead: int | None = setting(
        None,
        least=1,
        group=RULES,
        help="Before a retraction evict all that can be, and after each as much as the others need for so many steps. "
        "Default: as needed.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    retract_ties: Literal["first", "last"] = setting(
        "first",
        group=RULES,
        help="Which of equal requests in a batch is retracted: {choices}. Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    retract_while_ending: bool = setting(
        True,
        group=RULES,
        help="Retract although a request in flight is about to end. Default {default}; off: the step is passed over.",
        needs=f"{PREFILL_FIRST}, and {IN_FLIGHT}",
        acts=_prefill_first_in_flight,
    )
    reserve: Literal["estimate", "full", "none"] = setting(
        "estimate",
        group=RULES,
        help="Output that admission sets KV aside for: {choices}: what is expected, all that may come, nothing. "
        "Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    """Of waiting and of running requests. full: nobody has to be retracted, where no pages are left partly empty."""
    page_rest: Literal["waiting", "running"] = setting(
        "waiting",
        group=RULES,
        help="Where admission counts what a last page leaves empty: {choices}: what a waiting request needs is rounded up, "
        "or each running one counted with a page less a token. Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    kv_margin: int = setting(
        1,
        least=0,
        group=RULES,
        help="Tokens of KV that have to be left when a request has been let in. Default {default}.",
        needs=f"charge 'tokens' and {PREFILL_FIRST}",
        acts=lambda s, loop: prefill_first(s, loop) and s.charge == "tokens",
    )
    chunk_cut: Literal["pages", "tokens"] = setting(
        "pages",
        group=RULES,
        help="Where a prompt is cut: {choices}: at the end of a page, or where the chunk ends. Default {default}.",
        needs=f"charge 'tokens' and {PREFILL_FIRST}",
        acts=lambda s, loop: prefill_first(s, loop) and s.charge == "tokens",
    )
    """tokens: the next chunk goes on inside the page. A prompt for which there is no more room among the prompts of a batch
    (max_prefill_tokens) is cut, too, and not put off, and where nothing is left nobody's prefix is looked for.
    """
    give_back: Literal["landed", "ended", "at_once"] = setting(
        "landed",
        group=RULES,
        help="When who has ended while a batch in flight holds it gives back KV and row: {choices}. Default {default}.",
        needs=IN_FLIGHT,
        acts=in_flight,
    )
    """landed: with that batch.

    ended: as it ends, though that batch computes a token more for it, whose KV is overwritten. Whoever gets the pages
    writes to them in a later batch of the same stream, and gets another row of the table.

    at_once: the same, and a stop by length is one from its launch on: KV goes with the first token that arrives after it.
    """

    blank_pages: Literal["free", "queue"] = setting(
        "free",
        group=RULES,
        help="Where pages without a name go that nobody holds any more: to the free ones, taken first, or into the queue of "
        "those that may be found again (cache blocks): {choices}. Default {default}.",
        needs="a prefix cache of blocks",
        acts=_blocks,
    )
    """vLLM before 0.33 queues them up, so that content older than they are is lost although they are empty."""
    mixed_order: Literal["decodes", "admission"] = setting(
        "decodes",
        group=RULES,
        help="Who comes first in a mixed step: decodes, or who was admitted first, each with all it takes before the next: "
        "{choices}. Default {default}.",
        needs=MIXED,
        acts=mixed,
    )
    """In the order of admission several prompts may be partly computed, a step without tokens or pages for all leaves out
    the last ones, and whoever waits only for its last token may be preempted as well."""
    admit_for: Literal["chunk", "prompt"] = setting(
        "chunk",
        group=RULES,
        help="What has to fit into KV for a request to be admitted: the part of its prompt that the step computes, or all: "
        "{choices}. Default {default}.",
        needs=IN_TURN,
        acts=_in_turn,
    )
    """vLLM's ``scheduler_reserve_full_isl``."""
    preempt_first: Literal["newest", "priority"] = setting(
        "newest",
        group=RULES,
        help="Whom a mixed step preempts when KV runs out: who was admitted last, or under the policy priority who has the "
        "lowest one and of these came last: {choices}. Default {default}.",
        needs=f"{IN_TURN}, and policy 'priority'",
        acts=lambda s, loop: _in_turn(s, loop) and s.policy == "priority",
    )
    after_own_preemption: Literal["stop", "go-on"] = setting(
        "stop",
        group=RULES,
        help="What a mixed step does when a request had to preempt itself: leave out those behind it, or go on with them: "
        "{choices}. Default {default}.",
        needs=f"{IN_TURN}, policy 'priority', and preempt_first 'priority'",
        acts=_by_priority,
    )
    preemption_gap: bool = setting(
        False,
        group=RULES,
        help="Where a request that only waits for its last token is preempted for one behind it, the next one is left out "
        "of the step.",
        needs=f"{IN_TURN}, policy 'priority', and preempt_first 'priority'",
        acts=_by_priority,
    )
    """vLLM before 0.33: its place in the list of running requests is not moved back."""
    long_prefill_tokens: int | None = setting(
        None,
        least=1,
        zero_is_none=True,
        live=True,
        group=RULES,
        help="Most prompt tokens that one request computes in a mixed step; 0 or unset: as many as there is budget for.",
        needs=IN_TURN,
        acts=_in_turn,
    )
    """vLLM's ``long_prefill_token_threshold``: a long prompt leaves room for others beside it."""
    long_prefill_alone: Literal["bounded", "free"] = setting(
        "bounded",
        group=RULES,
        help="Whether that bound holds for a request that is alone, too: {choices}. Default {default}.",
        needs=f"{IN_TURN}, and long_prefill_tokens",
        acts=lambda s, loop: _in_turn(s, loop) and s.long_prefill_tokens is not None,
    )
