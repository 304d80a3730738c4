"""Settings of instances that prefill or decode alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from workbench.scheduler.settings import setting

PAIRS = "pools of role prefill and decode"
PREFILL_POOL = "a pool of role prefill"
DECODE_POOL = "a pool of role decode"


IDLE_IN_ROLE: Mapping[str, frozenset[str]] = {
    "prefill": frozenset(
        {
            *("max_prefill_streak", "mixed_chunk", "mixed_join", "preempt_threshold", "preempt_for", "request_timeout"),
            *("stops_known", "leaves", "share_prompts", "share_launched", "share_chunks", "conservativeness"),
            *("reserve", "reserve_ignore_eos"),
            *("round_reserve", "outputs_counted", "page_rest", "retract_ahead", "retract_ties", "retract_while_ending"),
        }
    ),
    "decode": frozenset(
        {
            *("chunk", "chunk_depth", "max_prefill_tokens", "max_prefill_streak", "mixed_chunk", "mixed_join"),
            *("policy", "max_passed_over", "preempt_threshold", "preempt_for", "queue_timeout", "queue_order"),
            *("share_in_batch_tokens", "share_prompts", "share_chunks", "leaves", "conservativeness", "reserve"),
            *("kv_margin", "chunk_cut", "charge", "page_beside", "prompt_budget", "rows_first", "full_when"),
            *("overlap_prefills", "look_touches", "defer_shared_tokens", "refresh_waiting", "long_prefill_tokens"),
            *("long_prefill_alone", "admit_for", "look_when_spent", "share_launched", "abort_partial", "page_rest"),
            *("reserve_ignore_eos", "round_reserve"),
        }
    ),
}
"""By role, settings that do nothing on instances of it, whatever stands beside them."""


def paired(settings: Any, loop: str) -> bool:
    """Tell whether instances prefill or decode alone."""
    return getattr(settings, "role", "both") != "both" or getattr(settings, "disaggregated", False)


def prefills(settings: Any, loop: str) -> bool:
    """Tell whether instances prefill alone."""
    return getattr(settings, "role", "both") == "prefill" or getattr(settings, "disaggregated", False)


def decodes(settings: Any, loop: str) -> bool:
    """Tell whether instances decode alone."""
    return getattr(settings, "role", "both") == "decode" or getattr(settings, "disaggregated", False)


@dataclass(frozen=True, kw_only=True)
class HandoverSettings:
    """Settings of requests that one instance prefills and another decodes. Lengths are tokens, times seconds."""

    first_token: Literal["decode", "prefill"] = setting(
        "decode",
        help="Which side sends the first token: {choices}; decode: once the KV has arrived. Default {default}.",
        needs=PAIRS,
        acts=paired,
    )
    reserved_decode_tokens: int = setting(
        512,
        least=0,
        help="Tokens of KV kept free on a decode instance for each request that it has. Default {default}.",
        needs=DECODE_POOL,
        acts=decodes,
    )
    spare_rows: int | None = setting(
        None,
        least=0,
        help="Requests a decode instance takes KV in for beyond max-running. Default: twice that, at most 64.",
        needs=DECODE_POOL,
        acts=decodes,
    )
    decode_cache: bool = setting(
        False,
        help="Decode instances keep a prefix cache, and what is in it is not sent.",
        needs=DECODE_POOL,
        acts=decodes,
    )
    decode_retraction: Literal["host", "prefill"] = setting(
        "host",
        help="How a request comes back that lost its KV on a decode instance: {choices}: from the host's memory, or through "
        "a prefill instance again. Default {default}.",
        needs=DECODE_POOL,
        acts=decodes,
    )
    handshake_timeout: float = setting(
        300.0,
        above=0,
        help="Seconds a request waits on the prefill side for the decode side's pages. Default {default}.",
        needs=PREFILL_POOL,
        acts=prefills,
    )
    transfer_timeout: float = setting(
        300.0,
        above=0,
        help="Seconds from its pages being set aside to the arrival of a request's KV. Default {default}.",
        needs=DECODE_POOL,
        acts=decodes,
    )
