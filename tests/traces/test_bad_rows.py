"""Rows that cannot be a request, and rows in another order than their arrivals: one rule for all formats."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.traces.written import json_lines
from traces import Trace, TraceError, open_trace
from traces.reshape import reshape
from workbench.cli.app import app

GOOD_ROW, BAD_ROW, EARLY_ROW = 0, 1, 2
TABLES = {
    "azure": (
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        ["2023-11-16 18:17:0{}.5,5,5", "2023-11-16 18:17:0{}.5,5,0", "2023-11-16 18:17:00.1,5,5"],
    ),
    "burstgpt": ("Timestamp,Request tokens,Response tokens", ["1{},5,5", "1{},0,5", "9,5,5"]),
    "vidur": ("arrived_at,num_prefill_tokens,num_decode_tokens", ["1{},5,5", "1{},5.5,5", "9,5,5"]),
    "splitwise": ("arrival_timestamp,prompt_size,token_size", ["1{},5,5", "1{},,5", "9,5,5"]),
    "blis": ("input_tokens,output_tokens,arrival_time_us", ["5,5,1{}", "x,5,1{}", "5,5,9"]),
    "lengths": ("timestamp,input_tokens,output_tokens", ["1{},5,5", "1{},5", "9,5,5"]),
}
JSON_LINES = {
    "workbench": [
        '{{"arrival_s": 1{}, "input_length": 5, "output_length": 5}}',
        '{{"arrival_s": 1{}, "inp',
        '{{"arrival_s": 9, "input_length": 5, "output_length": 5}}',
    ],
    "mooncake": [
        '{{"timestamp": 1{}, "input_length": 5, "output_length": 5, "hash_ids": [1]}}',
        '{{"timestamp": 1{}, "input_length": 5, "output_length": 0, "hash_ids": [1]}}',
        '{{"timestamp": 9, "input_length": 5, "output_length": 5, "hash_ids": [1]}}',
    ],
    "llmservingsim": [
        '{{"input_toks": 5, "output_toks": 5, "arrival_time_ns": 1{}}}',
        '{{"input_toks": 5, "output_toks": 5, "arrival_time_ns": 1{}, "input_tok_ids": [1]}}',
        '{{"input_toks": 5, "output_toks": 5, "arrival_time_ns": 9}}',
    ],
    "aibrix": [
        '{{"timestamp": 1{}, "requests": [{{"prompt_length": 5, "output_length": 5}}]}}',
        '{{"timestamp": 1{}, "requests": [{{"prompt_length": 5, "output_length": -1}}]}}',
        '{{"timestamp": 9, "requests": [{{"prompt_length": 5, "output_length": 5}}]}}',
    ],
}
FORMATS = [*TABLES, *JSON_LINES]


def write(folder: Path, format: str, kinds: list[int]) -> Path:
    """A file of rows of these kinds."""
    header, rows = TABLES[format] if format in TABLES else ("", JSON_LINES[format])
    path = folder / "t"
    lines = [rows[kind].format(place) for place, kind in enumerate(kinds)]
    path.write_text("\n".join([*([header] if header else []), *lines]) + "\n")
    return path


def lines_of(trace: Trace) -> list[int]:
    return [request.line for request in trace]


@pytest.mark.parametrize("format", FORMATS)
def test_a_bad_row_is_an_error_that_names_the_flag_which_leaves_it_out(tmp_path: Path, format: str) -> None:
    trace = open_trace(write(tmp_path, format, [GOOD_ROW, BAD_ROW, GOOD_ROW]))
    assert trace.info.format == format
    with pytest.raises(TraceError) as caught:
        list(trace)
    assert caught.value.line == (3 if format in TABLES else 2)
    assert caught.value.hint == "--skip-bad-rows leaves such rows out"


@pytest.mark.parametrize("format", FORMATS)
def test_skipped_rows_are_counted_and_the_others_kept(tmp_path: Path, format: str) -> None:
    path = write(tmp_path, format, [GOOD_ROW, BAD_ROW, GOOD_ROW, BAD_ROW])
    trace = open_trace(path, skip_bad_rows=True)
    first = 2 if format in TABLES else 1
    for _ in range(2):  # A second pass says nothing new.
        assert lines_of(trace) == [first, first + 2]
    (note,) = [note for note in trace.info.notes if "skipped" in note]
    assert note.startswith("2 bad rows were skipped: 2 x ") and f"(first: line {first + 1})" in note


@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_go_back_are_an_error_sorted_on_request_and_nothing_where_arrivals_do_not_count(
    tmp_path: Path, format: str
) -> None:
    path = write(tmp_path, format, [GOOD_ROW, GOOD_ROW, EARLY_ROW])
    with pytest.raises(TraceError, match="arrivals go back: ") as caught:
        list(open_trace(path, skip_bad_rows=True))
    assert caught.value.hint == "--sort orders by arrival"
    first = 2 if format in TABLES else 1
    trace = open_trace(path, sort=True)
    requests = list(trace)
    assert [request.line for request in requests] == [first + 2, first, first + 1]
    assert requests[0].arrival_s == 0 and all(request.arrival_s > 0 for request in requests[1:] if request.arrival_s)
    assert any("sorted by arrival" in note for note in trace.info.notes)
    assert lines_of(open_trace(path, ordered=False)) == [first, first + 1, first + 2]


def test_a_note_names_each_kind_with_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = ["1,5,5", "1,-3,5", "1,5,0", "1,-4,5", "1,5", "1,x,5", "1,5,nan", ",5,5", "2,5,5"]
    path.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    trace = open_trace(path, skip_bad_rows=True)
    assert lines_of(trace) == [2, 10]
    (note,) = [note for note in trace.info.notes if "skipped" in note]
    assert note == (
        "7 bad rows were skipped: 2 x num_prefill_tokens is negative (first: line 3); "
        "1 x num_decode_tokens is 0; a request has at least 1 token (first: line 4); "
        "1 x has 2 cells where the header has 3 (first: line 6); "
        "1 x num_prefill_tokens is not an integer (first: line 7); "
        "1 x num_decode_tokens is not an integer (first: line 8); and 1 more kind"
    )


def test_a_file_of_bad_rows_only_says_what_they_were(tmp_path: Path) -> None:
    path = write(tmp_path, "azure", [BAD_ROW, BAD_ROW])
    with pytest.raises(TraceError, match=r"holds no requests: 2 bad rows were skipped: 2 x GeneratedTokens is 0;"):
        list(open_trace(path, skip_bad_rows=True))


def test_a_bad_first_row_does_not_hide_the_format(tmp_path: Path) -> None:
    good = '{"timestamp": 5, "input_length": 5, "output_length": 5, "hash_ids": [1]}'
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"timestamp": 5, "inp\n[1]\n{good}\n')
    with pytest.raises(TraceError, match="line 1: the JSON object has no end") as caught:
        open_trace(path)
    assert caught.value.hint == "--skip-bad-rows leaves such rows out"
    trace = open_trace(path, skip_bad_rows=True)
    assert trace.info.format == "mooncake" and lines_of(trace) == [3]
    path.write_text(f"[1, {good}]")
    assert len(list(open_trace(path, skip_bad_rows=True))) == 1


def test_skipped_rows_are_counted_when_only_the_first_requests_are_wanted(tmp_path: Path) -> None:
    trace = reshape(
        open_trace(write(tmp_path, "azure", [BAD_ROW, GOOD_ROW, GOOD_ROW, GOOD_ROW]), skip_bad_rows=True), requests=2
    )
    assert lines_of(trace) == [3, 4]
    assert [note for note in trace.info.notes if note.startswith("1 bad row was skipped: ")]


def test_what_is_wrong_with_the_file_is_no_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    path.write_bytes(gzip.compress(b'{"arrival_s": 0, "input_length": 5, "output_length": 5}\n' * 99)[:-9])
    with pytest.raises(TraceError, match="archive is cut short"):
        list(open_trace(path, skip_bad_rows=True))
    path.write_text('{"arrival_s": 0, "prompt": "hello", "output_length": 5}\n')
    with pytest.raises(TraceError, match="give --tokenizer"):
        list(open_trace(path, skip_bad_rows=True))
    path.write_text("TIMESTAMP,ContextTokens\n1,2\n")
    with pytest.raises(TraceError, match="column is missing from the header"):
        list(open_trace(path, format="azure", skip_bad_rows=True))


def test_documented_failures_of_burstgpt_are_skipped_without_being_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n1,5,5\n2,5,0.0\n3,5,0\n")
    trace = open_trace(path)
    assert lines_of(trace) == [2]
    assert "2 failed requests (0 response tokens) were skipped" in trace.info.notes


def test_a_turn_after_a_skipped_one_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    turns = [
        {"arrival_s": 0, "input_length": 5, "output_length": 5, "session_id": "s", "turn": 0},
        {"input_length": -12, "output_length": 5, "session_id": "s", "turn": 1},
        {"input_length": 30, "output_length": 5, "session_id": "s", "turn": 2},
    ]
    path.write_text(json_lines(*turns))
    trace = open_trace(path, skip_bad_rows=True)
    assert lines_of(trace) == [1]
    assert any(note.startswith("2 bad rows") for note in trace.info.notes)


def test_sorting_keeps_the_turns_of_a_session_behind_each_other(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    records = [
        {"request_id": "late", "arrival_s": 9, "input_length": 5, "output_length": 5, "session_id": "a"},
        {"request_id": "early", "arrival_s": 2, "input_length": 5, "output_length": 5, "session_id": "b"},
        {"request_id": "late2", "input_length": 15, "output_length": 5, "session_id": "a"},
        {"request_id": "early2", "input_length": 15, "output_length": 5, "session_id": "b"},
        {"request_id": "first", "arrival_s": 1, "input_length": 5, "output_length": 5},
    ]
    path.write_text(json_lines(*records))
    found = [(request.request_id, request.arrival_s) for request in open_trace(path, sort=True)]
    assert found == [("first", 0.0), ("early", 1.0), ("early2", None), ("late", 8.0), ("late2", None)]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout + result.stderr


def test_the_commands_have_the_flags_and_say_them_in_their_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "azure", [GOOD_ROW, BAD_ROW, GOOD_ROW, EARLY_ROW])
    code, text = run("trace", "describe", path)
    assert code == 2
    assert text == (
        f"error: {path}, line 3, GeneratedTokens: is 0; a request has at least 1 token; "
        "--skip-bad-rows leaves such rows out\n"
    )
    code, text = run("trace", "describe", path, "--skip-bad-rows")
    assert code == 2 and text.endswith("; --sort orders by arrival\n")
    out = tmp_path / "sorted.jsonl"
    assert run("trace", "convert", path, out, "--skip-bad-rows", "--sort")[0] == 0
    assert [request.arrival_s for request in open_trace(out)] == [0.0, 0.4, 2.4]


def test_a_run_at_a_concurrency_takes_rows_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path, "azure", [GOOD_ROW, GOOD_ROW, EARLY_ROW])
    words = ("simulate", path, "--out", tmp_path / "o", "--json")
    assert run(*words)[0] == 2
    assert run(*words, "--concurrency", 2)[0] == 0
    assert len((tmp_path / "o" / "overlap" / "requests.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize(
    "command",
    [
        ["simulate"],
        ["replay"],
        ["observe"],
        ["sweep"],
        ["plan"],
        ["compare"],
        ["trace", "describe"],
        ["trace", "convert"],
    ],
)
def test_every_command_that_reads_a_trace_has_all_of_its_flags(command: list[str]) -> None:
    code, text = run(*command, "--help")
    assert code == 0
    for flag in (
        "--format",
        "--tokenizer",
        "--time-unit",
        "--spread-ticks",
        "--block-tokens",
        "--output",
        "--skip-bad-rows",
        "--sort",
    ):
        assert flag in text


def test_a_file_of_failed_requests_alone_says_that_they_failed(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n0,5,0\n1,5,0\n")
    with pytest.raises(TraceError) as caught:
        list(open_trace(path))
    assert str(caught.value) == f"{path}: holds no requests: 2 failed requests (0 response tokens) were skipped"


def test_what_was_skipped_is_said_of_a_pass_that_ends_early_and_of_one_row(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n0,5,0\n1,5,-1\n2,5,5\n3,5,5\n")
    trace = reshape(open_trace(path, skip_bad_rows=True), requests=1)
    assert len(list(trace)) == 1
    assert "1 failed request (0 response tokens) was skipped" in trace.info.notes
    assert "1 bad row was skipped: 1 x Response tokens is negative (first: line 3)" in trace.info.notes
    path.write_text("Timestamp,Request tokens,Response tokens\n0,5,0\n1,5,-1\n")
    with pytest.raises(TraceError) as caught:
        list(open_trace(path, skip_bad_rows=True))
    assert str(caught.value) == (
        f"{path}: holds no requests: 1 bad row was skipped: 1 x Response tokens is negative (first: line 3); "
        "1 failed request (0 response tokens) was skipped"
    )


@pytest.mark.parametrize("format", ["auto", "lengths"])
def test_a_bad_first_row_of_a_table_of_lengths_can_be_skipped(tmp_path: Path, format: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt_tokens": 5, "compl\n{"prompt_tokens": 6, "completion_tokens": 2}\n')
    trace = open_trace(path, format, skip_bad_rows=True)
    assert [r.input_length for r in trace] == [6] and trace.info.format == "lengths"
