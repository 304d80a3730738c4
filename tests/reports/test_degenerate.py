"""Records that lack what a number is made of: it is "-" for people and null in JSON, never nan, and nothing falls over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from reports.compare.comparison import compare
from reports.exports.runs_json import to_json
from reports.exports.trace_events import write_trace_events
from reports.metrics.report_numbers import make_report
from reports.metrics.sweep_metrics import sweep_summary
from reports.page.report_page import page_html
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord, write_record
from reports.terminal.compact_table import compact_table
from reports.terminal.full_table import comparison_table
from reports.verdict.caveats import caveats
from reports.verdict.verdict import verdict
from tests.reports.records import iteration_row, record_of, request_row
from workbench.calibrate.budget import error_budget
from workbench.cli.app import app

NO_NUMBER = re.compile(r"(?<![\w.])[-+±]?(nan|inf|infinity)(?![\w])", re.IGNORECASE)
HARDWARE = {"gpu": "h100", "gpus": 1, "simulated": True}


def served(at_s: float = 0.0, tokens: int = 3, takes_s: float = 1.0, **more: Any) -> dict[str, Any]:
    return request_row(
        request_id=f"r{at_s:g}",
        arrival_s=at_s,
        queued_s=at_s,
        scheduled_s=at_s,
        first_token_s=at_s + takes_s / 2,
        finish_s=at_s + takes_s,
        input_tokens=10,
        output_tokens=tokens,
        **more,
    )


def step(at_s: float = 0.0, takes_s: float = 1.0) -> dict[str, Any]:
    return iteration_row(start_s=at_s, end_s=at_s + takes_s, requests=1, prefill_tokens=10, running=1)


RECORDS: dict[str, Callable[[], RunRecord]] = {
    "one request": lambda: record_of([served()], [step()], {0.25: 2}),
    "one token each": lambda: record_of([served(tokens=1), served(5, tokens=1)], [step(), step(5)]),
    "no time passes": lambda: record_of([served(takes_s=0.0)], [step(takes_s=0.0)]),
    "no iterations": lambda: record_of([served(), served(5)]),
    "no queueing columns": lambda: record_of(
        [
            served() | {"queued_s": np.nan, "scheduled_s": np.nan},
            served(5) | {"queued_s": np.nan, "scheduled_s": np.nan},
        ]
    ),
    "all refused": lambda: record_of(
        [
            request_row(
                request_id=f"r{at}", arrival_s=at, finish_s=at, input_tokens=10, status="rejected:prompt_exceeds_kv"
            )
            for at in (0.0, 5.0)
        ]
    ),
    "all aborted": lambda: record_of(
        [request_row(request_id="r0", arrival_s=0.0, finish_s=4.0, input_tokens=10, status="aborted:error")]
    ),
    "nothing ended": lambda: record_of([request_row(request_id="r0", arrival_s=0.0, status="unfinished")], [step()]),
    "no output": lambda: record_of([served(tokens=0)], [step()]),
    "no input and no KV": lambda: record_of([served() | {"input_tokens": 0}], [iteration_row(end_s=1.0)]),
}


def made(name: str, **meta: Any) -> RunRecord:
    record = RECORDS[name]()
    record.meta |= {"name": name, "hardware": HARDWARE, "settings": {"kv_tokens": 0, "max_running": 0}, **meta}
    return record


def shown(*things: Any) -> str:
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for thing in things:
        console.print(thing)
    return console.export_text()


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("slo", [None, 0.1])
@pytest.mark.parametrize("name", RECORDS)
def test_a_report_of_it_says_nothing_that_is_no_number(tmp_path: Path, name: str, slo: float | None) -> None:
    record = made(name)
    report = make_report({name: record}, slo, slo)
    texts = [
        shown(comparison_table(report.numbers), compact_table(report.numbers)),
        "\n".join(verdict(report.summaries, report.uses)),
        "\n".join(caveats({name: record})),
    ]
    strict(to_json(report.numbers, uses=report.uses, records={name: record}))
    page = page_html(report, "title")
    data = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.S)
    assert data
    strict(data[1])
    texts.append(re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S))
    assert write_trace_events({name: record}, tmp_path / "events.json")
    strict((tmp_path / "events.json").read_text())
    for text in texts:
        assert not NO_NUMBER.search(text), NO_NUMBER.search(text)
    for value in sweep_summary(record, slo, slo, 2.0).values():
        assert value is None or np.isfinite(value)


@pytest.mark.parametrize(("one", "other"), list(product(RECORDS, RECORDS)))
def test_comparing_two_of_them_says_nothing_that_is_no_number(tmp_path: Path, one: str, other: str) -> None:
    a, b = made(one), made(other)
    b.meta["name"] = "other"
    try:
        found = compare(a, b)
    except RecordError as problem:  # no request of both, or not the same ones
        assert not NO_NUMBER.search(str(problem))
        return
    found.budget = error_budget(a, b, found.latency_from, None)
    for name, record in (("a", a), ("b", b)):
        write_record(record, tmp_path / name)
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    printed = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "page.html")])
    assert printed.exit_code == 0, printed.output
    assert not NO_NUMBER.search(printed.output), printed.output
    page = re.sub(r"<(script|style).*?</\1>", "", (tmp_path / "page.html").read_text(), flags=re.S)
    assert not NO_NUMBER.search(page)
    strict(CliRunner().invoke(app, [*words, "--json"]).stdout)


def test_a_difference_in_queueing_is_told_in_seconds_where_the_reference_never_queued() -> None:
    later = [served() | {"scheduled_s": 0.25}]
    lines = error_budget(record_of([served()]), record_of(later), "arrival", None)["lines"]
    assert lines[-1] == (
        "  of the +0.000 s in mean E2E, +0.250 s are queueing, -0.250 s from the first batch to the first token, "
        "+0.000 s decoding"
    )
    blind = made("no queueing columns")
    lines = error_budget(blind, blind, "arrival", None)["lines"]
    assert lines[-1] == "  of the +0.000 s in mean E2E, +0.000 s are the first token, +0.000 s decoding"
