"""Outputs are as long as the trace says; where a bound, the context or the KV pool cuts one, every place says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from reports.metrics.cuts import CAUSES
from reports.record.run_record import RunRecord, read_record
from traces import TraceRequest
from workbench.cli.app import app
from workbench.clients.bounds import Cause, bound_of, counted


def simulated(tmp_path: Path, requests: list[dict[str, Any]], *flags: object) -> tuple[Any, RunRecord]:
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(json.dumps({"arrival_s": 0, "input_length": 100, **more}) + "\n" for more in requests))
    ran = CliRunner().invoke(app, ["simulate", str(trace), "--out", str(tmp_path / "o"), "--force", *map(str, flags)])
    assert ran.exit_code == 0, ran.output
    return ran, read_record(tmp_path / "o" / "overlap")


@pytest.mark.parametrize("flags", [(), ("--ignore-eos",), ("--concurrency", 1)])
def test_an_output_is_as_long_as_the_trace_says(tmp_path, flags):
    ran, record = simulated(tmp_path, [{"output_length": 6000}, {"output_length": 10}], *flags)
    assert record.requests["output_tokens"].tolist() == [6000, 10]
    assert record.meta["totals"]["cut"] == {}
    assert "cut short" not in ran.output.lower()


@pytest.mark.parametrize(
    ("requests", "flags", "tokens", "cut", "words"),
    [
        ([{"output_length": 600}], ("--max-tokens", 100), [100], {"max_tokens": 500}, "--max-tokens (100)"),
        (
            [{"output_length": 600}],
            ("--max-tokens", 100, "--ignore-eos"),
            [100],
            {"max_tokens": 500},
            "--max-tokens (100)",
        ),
        (
            [{"output_length": 600, "max_tokens": 50}],
            ("--max-tokens", 100),
            [50],
            {"trace": 550},
            "the max_tokens of the trace",
        ),
        ([{"output_length": 600}], ("--max-context", 301), [200], {"max_context": 400}, "the context (301 tokens)"),
        ([{"output_length": 600}], ("--kv-tokens", 300), [200], {"kv_tokens": 400}, "the KV pool (300 tokens)"),
        (
            [{"output_length": 600}],
            ("--kv-tokens", 300, "--engine", "sglang-0.5.23"),
            [198],
            {"kv_tokens": 402},
            "the KV pool (300 tokens)",
        ),
        (
            [{"output_length": 600}, {"output_length": 30, "max_tokens": 20}, {"output_length": 5}],
            ("--max-tokens", 100),
            [100, 20, 5],
            {"max_tokens": 500, "trace": 10},
            "--max-tokens (100)",
        ),
    ],
)
def test_what_cuts_an_output_is_counted_and_said_everywhere(tmp_path, requests, flags, tokens, cut, words):
    ran, record = simulated(tmp_path, requests, *flags)
    assert record.requests["output_tokens"].tolist() == tokens
    assert {cause: of["tokens"] for cause, of in record.meta["totals"]["cut"].items()} == cut
    line = (
        f"1 request was cut short by {words}: {next(iter(cut.values())):,} output tokens of the trace were not written."
    )
    terminal = " ".join(ran.stdout.split())
    assert line in terminal and "Cut short" in terminal
    page = (tmp_path / "o" / "report.html").read_text()
    assert line in page and "Cut short" in page
    reported, _ = simulated(tmp_path, requests, *flags, "--json")
    run = json.loads(reported.stdout)["runs"]["overlap"]
    assert run["cut"] == record.meta["totals"]["cut"]
    assert run["metrics"]["requests_cut"] == len(cut) and run["metrics"]["cut_tokens"] == sum(cut.values())


def test_a_later_turn_goes_on_where_the_trace_says_whatever_was_cut(tmp_path):
    turns = [
        {"session_id": "s", "output_length": 600},
        {"session_id": "s", "arrival_s": None, "input_length": 800, "output_length": 9},
    ]
    _, record = simulated(tmp_path, turns, "--max-tokens", 50)
    assert record.requests["input_tokens"].tolist() == [100, 800]
    assert record.requests["output_tokens"].tolist() == [50, 9]
    assert record.requests["cached_tokens"][1] < 200  # what was not written is not in the cache


@pytest.mark.parametrize(
    ("of_trace", "given", "known", "bound"),
    [
        (None, None, False, 4096),
        (None, 10, False, 10),
        (7, 10, False, 7),
        (None, None, True, 300),
        (None, 10, True, 10),
        (7, None, True, 7),
        (9000, None, False, 9000),
        (9000, None, True, 300),
    ],
)
def test_the_bound_is_the_traces_then_the_flags_then_one_that_cuts_nothing(of_trace, given, known, bound):
    request = TraceRequest("a", 0.0, 10, 300, max_tokens=of_trace)
    assert bound_of(request, given, known).tokens == bound
    assert bound_of(TraceRequest("b", 0.0, 10, 6000), None, False).tokens == 6000


def test_cuts_are_counted_by_cause():
    assert counted([("trace", 5), ("server", 1), ("trace", 2)]) == {
        "trace": {"requests": 2, "tokens": 7},
        "server": {"requests": 1, "tokens": 1},
    }


def test_everything_that_cuts_an_output_has_words_in_the_reports():
    assert set(get_args(Cause)) == set(CAUSES)
