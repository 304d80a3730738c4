"""Requests that one instance prefills and another decodes: where their time went, and when which of the two had them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reports.metrics.instances import pools_of
from reports.record.run_record import RunRecord
from reports.record.schema import FINISHED, UNFINISHED

STAGES = ("bootstrap", "wait", "prefill", "transfer", "admission")
STAGE_LABELS = {
    "bootstrap": "for pages on the decode side",
    "wait": "for a turn to prefill",
    "prefill": "prefill",
    "transfer": "for the rest of the KV",
    "admission": "for a place to decode",
}
"""What a first token waits for, in this order."""
SLOWEST = 0.1
"""Share of requests that count as slow."""


def is_shared(record: RunRecord) -> bool:
    """Tell whether requests of a run are prefilled and decoded by different instances."""
    return (
        any(pool.role != "both" for pool in pools_of(record)) or not np.isnan(_column(record, "prefill_instance")).all()
    )


def _column(record: RunRecord, name: str) -> np.ndarray:
    rows = len(record.requests["request_id"])
    return record.requests.get(name, np.full(rows, np.nan))


@dataclass(frozen=True)
class FirstTokens:
    """Seconds of the TTFT of finished requests by stage, each array float64[stages, requests]."""

    parts_s: np.ndarray

    @property
    def ttft_s(self) -> np.ndarray:
        """float64[requests]"""
        return self.parts_s.sum(axis=0)

    def mean_s(self) -> dict[str, float]:
        """Means of all, by stage; they add up to the mean TTFT."""
        return self._means(np.arange(self.parts_s.shape[1]))

    def slow_s(self) -> dict[str, float]:
        """Means of the slowest tenth by TTFT, one request at least."""
        number = max(int(self.parts_s.shape[1] * SLOWEST), 1)
        return self._means(np.argsort(-self.ttft_s, kind="stable")[:number])

    def _means(self, chosen: np.ndarray) -> dict[str, float]:
        return dict(zip(STAGES, self.parts_s[:, chosen].mean(axis=1).tolist(), strict=True))


def first_tokens(record: RunRecord, chosen: np.ndarray | None = None, now_s: float = np.nan) -> FirstTokens | None:
    """What the first tokens of a run waited for; None where no request that finished was shared. With ``chosen``, bool[n],
    it is of those requests, which still wait at ``now_s`` where they have none.

    What comes after the first token, where the prefill side sends it, is no part of the TTFT. A request that was sent to
    another pair once more waited for its first one in the first of the stages.
    """
    column = record.requests
    if chosen is None:
        chosen = np.array([status == FINISHED for status in column["status"]], bool)
    first_s = np.where(np.isnan(column["first_token_s"]), now_s, column["first_token_s"])
    chosen = chosen & ~np.isnan(_column(record, "prefill_instance")) & ~np.isnan(first_s)
    if not chosen.any():
        return None
    names = ("bootstrap_s", "prefill_start_s", "prefill_end_s", "transfer_end_s")
    moments = [column["arrival_s"], *(_column(record, name) for name in names), first_s]
    table = np.array([moment[chosen] for moment in moments])
    last = table[-1]
    if not np.isnan(now_s):
        # Who waits still has not got beyond the stage that it is in.
        waits = np.isnan(column["first_token_s"][chosen])
        table[1:-1, waits] = np.where(np.isnan(table[1:-1, waits]), now_s, table[1:-1, waits])
    # A stage that was never reached took no time; nothing counts beyond the first token.
    for place in range(1, len(table) - 1):
        table[place] = np.fmin(np.fmax(table[place], table[place - 1]), last)
    return FirstTokens(np.diff(table, axis=0))


def presence(record: RunRecord, instance: int, end_s: float) -> tuple[np.ndarray, np.ndarray]:
    """From when to when each shared request was with an instance: with its prefill instance until all its KV was sent, with
    its decode instance from the beginning on. Begins and ends, in no order."""
    column, arrival_s, leaves_s = _shared(record, end_s)
    sent_s = np.fmin(_column(record, "transfer_end_s"), leaves_s)
    return _known(
        np.concatenate(
            (arrival_s[column["prefill_instance"] == instance], arrival_s[column["decode_instance"] == instance])
        ),
        np.concatenate(
            (sent_s[column["prefill_instance"] == instance], leaves_s[column["decode_instance"] == instance])
        ),
    )


def at_hand(record: RunRecord, instance: int, end_s: float) -> tuple[np.ndarray, np.ndarray]:
    """From when to when an instance could work on each shared request: one that prefills, once there are pages for its KV on
    the other side; one that decodes, once its KV has arrived. Begins and ends, in no order."""
    column, _, leaves_s = _shared(record, end_s)
    prefill, decode = column["prefill_instance"] == instance, column["decode_instance"] == instance
    prefilled_s = np.fmin(_column(record, "prefill_end_s"), leaves_s)
    arrived_s = np.fmin(_column(record, "transfer_end_s"), _column(record, "decode_admission_s"))
    return _known(
        np.concatenate((_column(record, "bootstrap_s")[prefill], arrived_s[decode])),
        np.concatenate((prefilled_s[prefill], leaves_s[decode])),
    )


def _shared(record: RunRecord, end_s: float) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The two instances of every request, when it came, and when it left: at ``end_s`` if it never did."""
    column = record.requests
    staying = np.array([status == UNFINISHED for status in column["status"]], bool)
    leaves_s = np.where(np.isnan(column["finish_s"]) & staying, end_s, column["finish_s"])
    sides = {name: _column(record, name) for name in ("prefill_instance", "decode_instance")}
    return sides, column["arrival_s"], leaves_s


def _known(begins_s: np.ndarray, ends_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(begins_s) & ~np.isnan(ends_s)
    begins_s, ends_s = begins_s[known], ends_s[known]
    return begins_s, np.maximum(begins_s, ends_s)
