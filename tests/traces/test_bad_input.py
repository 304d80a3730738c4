"""Each kind of bad input gives one exact line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from traces import TraceError, open_trace

GOOD = '{"arrival_s": 0, "input_length": 8, "output_length": 2}\n'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
STAMP = "2023-11-16 18:17:03.9799600"

OWN = [
    (GOOD + '{"arrival_s": 0, "input_length"\n', ", line 2: the JSON object has no end"),
    (GOOD + "[1, 2]\n", ", line 2: is not a JSON object"),
    (
        GOOD + '{"arrival_s": NaN, "input_length": 8}\n',
        ", line 2: not valid JSON: JSON is malformed: invalid character (byte 14)",
    ),
    (
        GOOD + '{"arrival_s": 1, "output_length": 8}\n',
        ", line 2: needs exactly one of prompt_token_ids, prompt, messages, input_length; has none",
    ),
    (
        GOOD + '{"arrival_s": 1, "input_length": 1, "prompt": "x", "output_length": 8}\n',
        ", line 2: needs exactly one of prompt_token_ids, prompt, messages, input_length; has prompt and input_length",
    ),
    ('{"arrival_s": 0, "input_length": 8}\n', ", line 1, output_length: is missing"),
    ('{"arrival_s": 0, "input_length": -3, "output_length": 1}\n', ", line 1, input_length: '-3' is negative"),
    (
        '{"arrival_s": 0, "input_length": 0, "output_length": 1}\n',
        ", line 1, input_length: is 0; a request has at least 1 token",
    ),
    ('{"arrival_s": 0, "input_length": 8, "output_length": 1.5}\n', ", line 1, output_length: '1.5' is not an integer"),
    (
        '{"arrival_s": 0, "input_length": true, "output_length": 1}\n',
        ", line 1, input_length: 'True' is not an integer",
    ),
    ('{"input_length": 8, "output_length": 1}\n', ", line 1, arrival_s: is missing"),
    ('{"arrival_s": -1, "input_length": 8, "output_length": 1}\n', ", line 1, arrival_s: '-1' is negative"),
    (
        '{"arrival_s": "soon", "input_length": 8, "output_length": 1}\n',
        ", line 1, arrival_s: 'soon' is not a finite number",
    ),
    (
        '{"arrival_s": 5.5, "input_length": 8, "output_length": 1}\n\n' + GOOD,
        ", line 3: arrivals go back: 0 s after 5.5 s on line 1",
    ),
    (
        '{"arival_s": 0, "input_length": 8, "output_length": 1}\n',
        ", line 1, arival_s: unknown field; did you mean 'arrival_s'?",
    ),
    (GOOD + '{"zzzz": 0}\n', ", line 2, zzzz: unknown field"),
    (
        '{"request_id": "a", "arrival_s": 0, "input_length": 8, "output_length": 1}\n' * 2,
        ", line 2, request_id: 'a' appears twice",
    ),
    (
        '{"arrival_s": 0, "input_length": 8, "output_length": 1, "session_id": "s", "turn": 1}\n',
        ", line 1, turn: session 's' has turn 1 but no turn 0 before it",
    ),
    (
        '{"arrival_s": 0, "input_length": 8, "output_length": 1, "session_id": "s"}\n'
        '{"input_length": 8, "output_length": 1, "session_id": "s", "turn": 2}\n',
        ", line 2, turn: session 's' has turn 2 after turn 0",
    ),
    (
        '{"arrival_s": 0, "input_length": 8, "output_length": 1, "session_id": "s"}\n'
        '{"arrival_s": 1, "input_length": 8, "output_length": 1, "session_id": "s", "turn": 1}\n',
        ", line 2, arrival_s: a later turn has none: it starts when the turn before has finished",
    ),
    (
        '{"arrival_s": 0, "prompt_token_ids": [5], "output_length": 1, "session_id": "s"}\n'
        '{"input_length": 8, "output_length": 1, "session_id": "s"}\n',
        ", line 2, input_length: the session's turn before gives its tokens, so this one must give its own too",
    ),
    (
        '{"arrival_s": 0, "input_length": 8, "output_length": 1, "turn": 1}\n',
        ", line 1, turn: needs a session_id",
    ),
    (
        '{"arrival_s": 0, "input_length": 8, "output_length": 1, "think_time_s": 1}\n',
        ", line 1, think_time_s: needs a session_id",
    ),
    (
        '{"arrival_s": 0, "input_length": 8, "output_length": 1, "session_id": "s", "think_time_s": 1}\n',
        ", line 1, think_time_s: a session's first turn has none: it starts at arrival_s",
    ),
    (
        '{"arrival_s": 0, "input_length": 8, "hash_ids": [1], "output_length": 1}\n',
        ", line 1, block_size: is missing",
    ),
    (
        '{"arrival_s": 0, "input_length": 8, "block_size": 4, "output_length": 1}\n',
        ", line 1, block_size: needs hash_ids",
    ),
    (
        '{"arrival_s": 0, "prompt_token_ids": [4, -7], "output_length": 1}\n',
        ", line 1, prompt_token_ids: '-7' is negative",
    ),
    (
        '{"arrival_s": 0, "prompt_token_ids": [4, "x"], "output_length": 1}\n',
        ", line 1, prompt_token_ids: is not a list of integers: 'x' at place 1",
    ),
    (
        '{"arrival_s": 0, "prompt_token_ids": [99999999999], "output_length": 1}\n',
        ", line 1, prompt_token_ids: holds an id that does not fit 32 bits",
    ),
    (
        '{"arrival_s": 0, "prompt_token_ids": [4], "output_token_ids": [1, 2], "output_length": 1}\n',
        ", line 1, output_length: is 1 where output_token_ids has 2",
    ),
    (
        '{"arrival_s": 0, "prompt": "hello", "output_length": 1}\n',
        ", line 1, prompt: is text, which takes a tokenizer to read: give --tokenizer FOLDER|tokenizer.json",
    ),
    (
        '{"arrival_s": 0, "input_length": 3000000000, "output_length": 1}\n',
        ", line 1, input_length: '3000000000' is more than the 100,000,000 tokens a request may have",
    ),
    (
        '{"arrival_s": 0, "input_length": 3, "output_length": 1, "priority": -99999999999999999999}\n',
        ", line 1, priority: '-99999999999999999999' is larger than any number here may be",
    ),
    (
        '{"arrival_s": 1e30, "input_length": 3, "output_length": 1}\n',
        ", line 1, arrival_s: '1e+30' is larger than any number here may be",
    ),
    ("", ": holds no requests: the file is empty"),
    ("\n  \n", ": holds no requests: the file is empty"),
]

TABLES = [
    (AZURE, ": holds no requests"),
    (AZURE + f"{STAMP},-3,1\n", ", line 2, ContextTokens: '-3' is negative"),
    (AZURE + f"{STAMP},4,nan\n", ", line 2, GeneratedTokens: 'nan' is not an integer"),
    (AZURE + f"{STAMP},,1\n", ", line 2, ContextTokens: is missing"),
    (AZURE + f"{STAMP},1\n", ", line 2: has 2 cells where the header has 3"),
    (
        AZURE + "yesterday,1,1\n",
        ", line 2, TIMESTAMP: 'yesterday' is not a number and not a date like 2023-11-16 18:17:03.9799600",
    ),
    (
        "arrived_at,num_prefill_tokens,num_decode_tokens\ninf,1,1\n",
        ", line 2, arrived_at: 'inf' is not a finite number",
    ),
    ("time,in,out\n1,2,3\n", ", line 1: is the start of no known format; name one with --format (azure, burstgpt, "),
]


def read(path: Path, **options: str) -> TraceError:
    with pytest.raises(TraceError) as caught:
        list(open_trace(path, **options))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("text", "message"), OWN)
def test_a_fault_in_our_own_format_is_named_with_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    error = str(read(path))
    assert error == f"{path}{message}"


@pytest.mark.parametrize(("text", "message"), TABLES)
def test_a_fault_in_a_table_is_named_with_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    error = str(read(path))
    assert error == f"{path}{message}" or (message.endswith(", ") and error.startswith(f"{path}{message}"))


def test_a_missing_column_is_named_when_the_format_was_given(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP,ContextTokens\n1,2\n")
    assert str(read(path, format="azure")) == f"{path}, line 1, GeneratedTokens: column is missing from the header"


def test_json_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("[1]")
    assert str(read(path)) == f"{path}, [0]: is not a JSON object"


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    assert str(read(tmp_path / "no.jsonl")) == f"{tmp_path / 'no.jsonl'}: no such file"
    assert str(read(tmp_path)) == f"{tmp_path}: is a folder, not a trace file"


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_cut_archive_and_a_broken_one_are_told_apart(tmp_path: Path, kind: str) -> None:
    text = "".join(GOOD.replace('"output_length": 2', f'"output_length": {n + 1}') for n in range(5000)).encode()
    packed = gzip.compress(text) if kind == "gzip" else zstandard.compress(text)
    path = tmp_path / "t.jsonl.x"
    path.write_bytes(packed[:-20])
    assert str(read(path)) == f"{path}: {kind} archive is cut short"
    path.write_bytes(packed[:40] + bytes(40) + packed[80:])
    assert str(read(path)) in (f"{path}: broken {kind} archive", f"{path}: {kind} archive is cut short")


def test_a_token_id_outside_the_vocabulary_names_the_field_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"input_toks": 2, "output_toks": 1, "arrival_time_ns": 5, "input_tok_ids": [7, 900], "output_tok_ids": [1]}\n'
    )
    (request,) = open_trace(path)
    assert request.prompt_tokens(901).tolist() == [7, 900]
    with pytest.raises(TraceError) as caught:
        request.prompt_tokens(900)
    assert str(caught.value) == f"{path}, line 1, input_tok_ids: '900' is outside the model's vocabulary of 900"


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival_s": 0, "prompt": "hello", "output_length": 1}\n')
    assert str(read(path, tokenizer=str(tmp_path))) == f"{tmp_path / 'tokenizer.json'}: no such tokenizer file"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert str(read(path, tokenizer=str(tmp_path))).startswith(f"{tmp_path / 'tokenizer.json'}: is not a tokenizer: ")


def test_a_format_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown trace format 'foo'; known: auto, azure, "):
        open_trace(tmp_path / "t", format="foo")
