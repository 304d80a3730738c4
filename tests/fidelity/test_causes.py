"""Why predictions of published rows are off: what a row says of itself, and the same rows with a cause taken away."""

from __future__ import annotations

import pytest

from backends.simulated.host import FREE_HOST, HostModel
from benchmarks import causes
from benchmarks.board import causes as board
from benchmarks.board.causes import CAUSES, fewer_ran, is_asked, least_tpot_s, outcome, running
from benchmarks.board.predict import Predicted
from tests.fidelity.rows import row
from workbench.cluster import resolve


def test_requests_that_wait_to_be_admitted_are_not_running():
    """512 at a time at 10 ms a token and 1,000 tokens: 10 s of decoding after 30 s of waiting, so 128 of them decode."""
    waited = row(concurrency=512, tpot_s=0.010, output_tokens=1000, ttft_s=30.0)
    assert running(waited) == pytest.approx(128)
    assert fewer_ran(waited) and not fewer_ran(row(concurrency=512, tpot_s=0.010, output_tokens=1000, ttft_s=0.5))
    assert not fewer_ran(row(concurrency=4, tpot_s=0.010, output_tokens=8, ttft_s=0.03)), "prompts take their time"


def test_no_step_is_faster_than_reading_the_weights_at_the_datasheets_bandwidth():
    """16 GB of Llama-3.1-8B in bf16 at 3.35 TB/s."""
    assert least_tpot_s(row()) == pytest.approx(0.0046, rel=0.1)
    assert least_tpot_s(row(concurrency=64, input_tokens=8192)) > 1.5 * least_tpot_s(row())


def test_rows_that_are_asked_about_score_and_are_of_three_gpus():
    one = next(row(configuration=str(i)) for i in range(99) if row(configuration=str(i)).scores)
    assert is_asked(one)
    for changes in ({"system": "gb200"}, {"engine": "trtllm"}):
        assert not is_asked(row(configuration=one.configuration, **changes))
    other = next(row(configuration=str(i)) for i in range(99) if not row(configuration=str(i)).scores)
    assert not is_asked(other)


def test_a_cause_that_is_taken_away_changes_its_part_and_what_a_row_cannot_be_is_said():
    small = row(model="Qwen/Qwen3-0.6B", tp=2, concurrency=2)
    usual, free = (outcome(small, cause) for cause in ("roofline", "roofline, links that take no time"))
    assert isinstance(usual, Predicted) and isinstance(free, Predicted)
    assert free.tpot_s < usual.tpot_s
    assert outcome(row(system="tpu"), "roofline") == "vllm: GPU tpu is not in the catalogue"
    with board._free_host():
        assert resolve.HostModel() is FREE_HOST
    assert resolve.HostModel is HostModel


def test_lines_are_of_the_rows_that_there_are_tables_for():
    one, two = row(id="one", concurrency=64), row(id="two")
    found = {cause: [Predicted(one, 0.1, 0.011), Predicted(two, 0.1, 0.012)] for cause in CAUSES}
    found["look-ups"] = [Predicted(one, 0.1, 0.012)]
    found["look-ups, as many at a time as ran"] = [Predicted(one, 0.1, 0.010)]
    text = "\n".join(causes.tables(found, {"one"}, 1))
    assert "| roofline | 1 | 10.0% | +10.0% |" in text, "the other has no tables"
    assert "| look-ups, rows in which fewer ran | 1 | 20.0% | +20.0% |" in text
    assert "| look-ups, as many at a time as ran | 1 | 0.0% | +0.0% |" in text
    assert "| look-ups, rows in which as many ran as were asked for | 0 |" in text
    assert "| look-ups, 17 to 64 at a time | 1 | 20.0% |" in text
    assert "in 1 fewer requests ran" in text
