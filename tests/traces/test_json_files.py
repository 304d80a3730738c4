"""JSON as people have it: arrays, lines, indented, with broken characters; and files that are no text at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.traces.written import json_lines
from traces import TraceError, open_trace

OWN = [{"arrival_s": n, "input_length": 8 + n, "output_length": 2} for n in range(3)]


def fault(path: Path, **how: object) -> str:
    with pytest.raises(TraceError) as caught:
        list(open_trace(path, **how))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(
    "text",
    [
        json_lines(*OWN),
        json_lines(*OWN).replace("\n", "\r\n"),
        "\ufeff" + json_lines(*OWN),
        json.dumps(OWN),
        "\ufeff \n" + json.dumps(OWN, indent=2).replace("\n", "\r\n"),
        json_lines(*OWN).replace("{", " \t{"),
    ],
    ids=["lines", "CRLF", "BOM", "array", "indented array with BOM and CRLF", "indented lines"],
)
def test_records_are_the_same_as_lines_and_as_an_array(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(gzip.compress(text.encode()))
    assert [(r.request_id, r.arrival_s, r.input_length) for r in open_trace(path)] == [
        (f"r{n + 1}", float(n), 8 + n) for n in range(3)
    ]


@pytest.mark.parametrize(
    "records",
    [
        [{"timestamp": n, "input_length": 600, "output_length": 2, "hash_ids": [0, n]} for n in range(3)],
        [{"chat_id": n, "timestamp": n, "input_length": 20, "output_length": 2, "hash_ids": [0, n]} for n in range(3)],
        [{"input_toks": 2, "output_toks": 1, "arrival_time_ns": n, "input_tok_ids": [n, 7]} for n in range(3)],
        [{"prompt_tokens": 2 + n, "completion_tokens": 1} for n in range(3)],
        [{"id": n, "block_size": 64, "requests": [{"t": 0, "in": 64, "out": 3, "hash_ids": [n]}]} for n in range(3)],
    ],
    ids=["mooncake", "bailian", "llmservingsim", "lengths", "weka"],
)
def test_an_array_of_any_formats_records_is_read_like_its_lines(tmp_path: Path, records: list[dict]) -> None:
    found = []
    for name, text in (("lines", json_lines(*records)), ("array", json.dumps(records))):
        path = tmp_path / name
        path.write_text(text)
        trace = open_trace(path)
        requests = [(r.request_id, r.arrival_s, r.prompt_tokens(99).tolist(), r.output_length) for r in trace]
        found.append((trace.info.format, requests))
    assert found[0] == found[1]


def test_sharegpt_is_read_as_an_array_and_as_lines(tmp_path: Path, tokenizer: Path) -> None:
    said = [("human", "red green"), ("gpt", "blue"), ("human", "red"), ("gpt", "green green")]
    record = {"id": "x", "conversations": [{"from": role, "value": text} for role, text in said]}
    found = []
    for name, text in (("t.jsonl", json_lines(record, record)), ("t.json", json.dumps([record, record]))):
        (tmp_path / name).write_text(text)
        trace = open_trace(tmp_path / name, tokenizer=tokenizer)
        assert trace.info.format == "sharegpt"
        found.append([(r.session_id, r.turn, r.prompt_tokens(9).tolist(), r.output_tokens(9).tolist()) for r in trace])
    assert found[0] == found[1] and found[0][1] == ("s1", 1, [1, 2, 3, 1], [2, 2])


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("broken", [r"\ud83d", r"\udc00 red", r"red \uD83D\ud83d"])
def test_halves_of_surrogate_pairs_are_replaced_and_their_conversation_named(
    tmp_path: Path, tokenizer: Path, as_array: bool, broken: str
) -> None:
    good = (
        r'{"conversations": [{"from": "human", "value": "red \ud83d\ude00 \\ud83d"}, {"from": "gpt", "value": "blue"}]}'
    )
    bad = good.replace("blue", f"blue {broken}")
    records = [good, bad, good, bad]
    path = tmp_path / "t.json"
    path.write_text(f"[{','.join(records)}]" if as_array else "\n".join(records))
    trace = open_trace(path, tokenizer=tokenizer)
    assert len(list(trace)) == 4
    (note,) = [note for note in trace.info.notes if "surrogate" in note]
    place = "[1]" if as_array else "line 2"
    assert note.startswith("2 records have halves of surrogate pairs") and note.endswith(f"(first: {place})")


def test_a_fault_in_an_array_names_the_element(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([OWN[0], {**OWN[1], "input_length": -1}, 3, OWN[2]]))
    assert fault(path) == ", [1].input_length: '-1' is negative"
    trace = open_trace(path, skip_bad_rows=True)
    assert [r.input_length for r in trace] == [8, 10]
    assert "2 bad rows were skipped: 1 x input_length is negative (first: [1].input_length)" in trace.info.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            json.dumps(OWN[0], indent=2),
            ": is one JSON object over several lines; a trace has a JSON object on each line, or ",
        ),
        (json.dumps({"requests": OWN}, indent=1), ": is one JSON object over several lines; "),
        ("\n".join(json.dumps(r, indent=4) for r in OWN), ": is one JSON object over several lines; "),
        (json.dumps({"requests": OWN}), ", line 1: is the start of no known format; "),
        (json.dumps({name: {"0": 1, "1": 2} for name in OWN[0]}), ": is a table written by columns; "),
        (json.dumps({name: {"17": 1} for name in OWN[0]}), ": is a table written by columns; "),
        (json.dumps({name: [1, 2] for name in OWN[0]}), ": is a table written by columns; "),
        (json.dumps(dict(enumerate(OWN))), ": is a table written by rows under their numbers; "),
        (
            json.dumps({"columns": list(OWN[0]), "index": [0], "data": [[0, 8, 2]]}),
            ": is a table written as one object; ",
        ),
        (json.dumps({"schema": {}, "data": OWN}), ": is a table written as one object; "),
        (json.dumps({"prompt_token_ids": [1], "output_token_ids": [2]}), ", line 1, arrival_s: is missing"),
        (json.dumps(OWN)[:-20], ": the JSON array has no end: the file is cut short"),
        (json_lines(*OWN)[:-20], ", line 3: the JSON object has no end"),
        ("[]", ": holds no requests: the JSON array is empty"),
        ("[1, 2]\n[3, 4]\n", ": has a JSON array on each line: "),
        ("[{},]", ": not a JSON array: "),
        ("", ": holds no requests: the file is empty"),
        ("\ufeff\r\n", ": holds no requests: the file is empty"),
    ],
)
def test_json_of_another_shape_says_what_it_is_and_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    assert fault(path).startswith(message)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PAR1\x15\x04", ": is a Parquet file: write it as CSV"),
        (b"PK\x03\x04\x14\x00", ": is a ZIP archive (or an Excel workbook): "),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ": is an old Excel workbook: "),
        (b"BZh91AY&SY", ": is a bzip2 archive: unpack it"),
        (b"\xfd7zXZ\x00\x00", ": is an xz archive: unpack it"),
        ("a,b\n1,2\n".encode("utf-16"), ": is UTF-16 text: save it as UTF-8"),
        ("a,b\n".encode("utf-16-be"), ": is binary data, not text"),
        (b"\x80\x04\x95", ": is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ": is a Git LFS pointer, not the file itself"),
        (b"\n<!DOCTYPE html>\n<html>", ": is a web page, not the file that it links to"),
        (b"x" * 257 + b"ustar\x0000", ": is a tar archive: unpack it"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_is_no_text_is_called_by_its_name(tmp_path: Path, head: bytes, message: str, pack) -> None:
    path = tmp_path / "t"
    path.write_bytes(pack(head))
    assert fault(path).startswith(message)
    assert fault(path, skip_bad_rows=True).startswith(message)


def test_tables_of_other_programs_may_be_parted_by_semicolons_or_tabs(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for mark in (",", ";", "\t", "|"):
        rows = ["arrived_at,num_prefill_tokens,num_decode_tokens,note", "0,7,3,", "0,8,3,x"]
        path.write_text("\n".join(rows).replace(",", mark))
        assert [r.input_length for r in open_trace(path)] == [7, 8]


@pytest.mark.parametrize("text", [json_lines(*OWN), json.dumps(OWN)])
@pytest.mark.parametrize("format", ["azure", "burstgpt", "vidur", "splitwise", "blis"])
def test_json_that_is_to_be_read_as_a_csv_is_called_json(tmp_path: Path, text: str, format: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    assert fault(path, format=format) == ": is JSON, where the format that was asked for is CSV"
    assert fault(path, format=format, skip_bad_rows=True) == fault(path, format=format)
