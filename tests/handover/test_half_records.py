"""The records that the two instances of a pair leave, each of its half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from reports.record.run_record import read_record
from tests.handover.halves import Pair
from tests.handover.test_pairs import RUN, TEXT
from traces import open_trace
from workbench.scheduler.request import SamplingParams


def test_either_half_of_a_request_is_in_the_record_of_its_instance(tmp_path: Path) -> None:
    for role in ("prefill", "decode"):
        (tmp_path / role).mkdir()
    pair = Pair(
        {**RUN, "chunk": 32, "loop": "overlap"},
        TEXT,
        backend="simulated",
        time_scale=0.0,
        record=lambda role: tmp_path / role,
    )
    outputs = [1, 5, 9]
    try:
        numbers = [pair.submit(list(range(40, 110)), SamplingParams(n, ignore_eos=True)) for n in outputs]
        pair.decode.read(*(decode for _, decode in numbers))
        pair.prefill.read(*(prefill for prefill, _ in numbers))
    finally:
        pair.close()
    prefill, decode = (read_record(tmp_path / role / "overlap") for role in ("prefill", "decode"))
    assert list(prefill.requests["status"]) == ["handed_over"] * 3
    assert list(decode.requests["status"]) == ["finished"] * 3
    assert list(decode.requests["output_tokens"]) == outputs
    order(prefill.requests, "arrival_s", "queued_s", "bootstrap_s", "prefill_start_s", "prefill_end_s", "finish_s")
    order(prefill.requests, "bootstrap_s", "transfer_start_s", "finish_s")
    order(decode.requests, "arrival_s", "transfer_end_s", "decode_admission_s", "first_token_s", "finish_s")
    assert set(prefill.iterations["decode_tokens"]) == {0}
    assert [request.output_length for request in open_trace(tmp_path / "decode" / "trace.jsonl")] == outputs


def order(columns: Any, *names: str) -> None:
    """The moments are known, and in this order."""
    moments = np.array([columns[name] for name in names])
    assert not np.isnan(moments).any(), names
    assert (np.diff(moments, axis=0) >= 0).all(), moments
