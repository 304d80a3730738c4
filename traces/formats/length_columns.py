"""Names that columns of lengths and times have in published files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TOKENS = r"_(?:tokens?|toks?|length|len|size|token_count|tokens_count|token_num|token_length|token_len|seq_len)"
_MEANINGS = {
    "input": rf"(?:num_|n_|number_of_)?(?:input|prompt|context|prefill|request|in){_TOKENS}|isl|tokens_in|input_toks",
    "output": rf"(?:num_|n_|number_of_)?(?:output|completion|generated|generation|gen|decode|response|answer|out){_TOKENS}"
    r"|osl|tokens_out|output_toks",
    "arrival": r"arrival|arrival_time(?:stamp)?|arrived_at|arrival_at|timestamp|time_?stamp|time|ts|start_time"
    r"|request_time(?:stamp)?|created_at|created|submitted_at|submit_time|sent_at|send_time|date_?time|date",
    "session": r"(?:session|conversation|conv|chat|thread|dialogu?e?)(?:_id)?",
    "turn": r"(?:turn|round)(?:_id|_index|_idx|_number|_num)?",
    "think": r"think(?:ing)?_time|think|delay|user_delay|inter_turn_delay|pause",
}
_PATTERNS = {meaning: re.compile(pattern) for meaning, pattern in _MEANINGS.items()}
_UNITS = {
    "s": ("s", "sec", "secs", "second", "seconds"),
    "ms": ("ms", "msec", "millis", "millisecond", "milliseconds"),
    "us": ("us", "usec", "micros", "microsecond", "microseconds"),
    "ns": ("ns", "nsec", "nanos", "nanosecond", "nanoseconds"),
}
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in words}


@dataclass(frozen=True, slots=True)
class Column:
    """A column that is read."""

    name: str
    unit: str | None = None
    """Unit that the column's name ends in."""


def find_columns(names: Iterable[str]) -> tuple[dict[str, Column], list[str]]:
    """Return (the first column of each meaning: input, output, arrival, session, turn, think; others that mean the same)."""
    found: dict[str, Column] = {}
    others: list[str] = []
    for name in names:
        said = meaning_of(name)
        if said is None:
            continue
        meaning, unit = said
        if meaning in found:
            others.append(name)
        else:
            found[meaning] = Column(name, unit)
    return found, others


def meaning_of(name: str) -> tuple[str, str | None] | None:
    """Return (what a column of that name holds, the unit that it ends in), whatever its case and what parts its words."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    words = re.sub(r"[^a-z0-9]+", "_", words).strip("_")
    for meaning, pattern in _PATTERNS.items():
        if pattern.fullmatch(words):
            return meaning, None
    stem, _, last = words.rpartition("_")
    if last in _UNIT_OF:
        for meaning in ("arrival", "think"):
            if _PATTERNS[meaning].fullmatch(stem):
                return meaning, _UNIT_OF[last]
    return None
