"""Whole numbers and dates in every notation that other programs write."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import TraceError, open_trace
from traces.files.dates import Times
from traces.files.source import Source
from traces.files.values import integer

SOURCE = Source(Path("t.csv"))

NOTATIONS = ("{}", "{}.0", "{}.", "{}.00", " {} ", "+{}", "{}e0", "{:e}", "{:E}", "0{}")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**53), st.sampled_from(NOTATIONS[:7]))
def test_a_whole_number_is_one_in_any_notation(number: int, notation: str) -> None:
    assert integer(SOURCE, 2, "n", notation.format(number)) == number
    assert integer(SOURCE, 2, "n", number) == number
    assert integer(SOURCE, 2, "n", float(number)) == int(float(number))
    assert integer(SOURCE, 2, "n", json.loads(f"{number}.0")) == int(float(number))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 999_999), st.sampled_from(NOTATIONS))
def test_exponents_and_leading_zeros_are_read_as_they_mean(number: int, notation: str) -> None:
    assert integer(SOURCE, 2, "n", notation.format(number)) == number
    assert integer(SOURCE, 2, "n", "-" + notation.format(number).strip().lstrip("+")) == -number


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**9), st.floats(0.001, 0.999))
def test_a_number_with_a_fraction_is_no_whole_number(whole: int, fraction: float) -> None:
    for value in (whole + fraction, repr(whole + fraction)):
        with pytest.raises(TraceError, match="is not an integer"):
            integer(SOURCE, 2, "n", value)


@pytest.mark.parametrize(
    "value",
    [
        "1,024",
        "1_024",
        "1 024",
        "18,0",
        "0x12",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "1e",
        "--1",
        "½",
        "١٢",
        True,
        float("nan"),
        float("inf"),
        [1],
        "1.0.0",
        "1e9999999",
    ],
)
def test_what_is_no_number_or_may_be_two_is_refused(value: object) -> None:
    with pytest.raises(TraceError, match="is not an integer"):
        integer(SOURCE, 2, "n", value)


@pytest.mark.parametrize("value", ["1e300000", "9" * 400, 2.0**60, 1 << 60])
def test_a_number_too_large_is_refused_without_being_written_out(value: object) -> None:
    with pytest.raises(TraceError, match="is larger than any number here may be"):
        integer(SOURCE, 2, "n", value)


@pytest.mark.parametrize("value", ["", "  ", None])
def test_nothing_is_missing(value: object) -> None:
    with pytest.raises(TraceError, match="is missing"):
        integer(SOURCE, 2, "n", value)


CSV = {
    "azure": ("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.97,{0},{0}"),
    "burstgpt": ("Timestamp,Request tokens,Response tokens", "3,{0},{0}"),
    "vidur": ("arrived_at,num_prefill_tokens,num_decode_tokens", "3,{0},{0}"),
    "splitwise": ("arrival_timestamp,prompt_size,token_size", "3,{0},{0}"),
    "blis": ("input_tokens,output_tokens,arrival_time_us", "{0},{0},3"),
    "lengths": ("prompt_tokens,completion_tokens", "{0},{0}"),
}
JSON = {
    "workbench": '{{"arrival_s": 0, "input_length": {0}, "output_length": {0}, "max_tokens": {0}, "priority": 2.0}}',
    "mooncake": '{{"timestamp": 0, "input_length": {0}, "output_length": {0}, "hash_ids": [1.0, 2e0]}}',
    "bailian": '{{"chat_id": 7.0, "timestamp": 0, "input_length": {0}, "output_length": {0}, "hash_ids": [1.0]}}',
    "llmservingsim": '{{"input_toks": {0}, "output_toks": {0}, "arrival_time_ns": 0}}',
    "lmcache": '{{"session": 5, "turn": 0, "t_s": 0, "input_length": {0}, "output_length": {0}, "hash_rle": [[1.0, 1]]}}',
    "weka": '{{"id": 3.0, "block_size": 64.0, "requests": [{{"t": 0, "in": {0}, "out": {0}, "hash_ids": [1.0]}}]}}',
}


@pytest.mark.parametrize("notation", ["18", "18.0", "1.8e1", "+18"])
@pytest.mark.parametrize("format", CSV)
def test_every_table_reads_lengths_as_pandas_and_excel_write_them(tmp_path: Path, format: str, notation: str) -> None:
    header, row = CSV[format]
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n{row.format(notation)}\n")
    trace = open_trace(path)
    assert trace.info.format == format
    assert [(request.input_length, request.output_length) for request in trace] == [(18, 18)]


@pytest.mark.parametrize("notation", ["18", "18.0", "1.8e1", '"18"', '"18.0"'])
@pytest.mark.parametrize("format", JSON)
def test_every_json_format_reads_whole_numbers_however_written(tmp_path: Path, format: str, notation: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(JSON[format].format(notation) + "\n")
    trace = open_trace(path)
    assert trace.info.format == format
    (request,) = trace
    assert (request.input_length, request.output_length) == (18, 18)


def test_ids_turns_and_token_ids_are_whole_numbers_too(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"request_id": 7.0, "arrival_s": 0, "prompt_token_ids": [4.0, 5], "output_token_ids": [6.0], "session_id": 3.0, '
        '"turn": 0.0}\n'
    )
    (request,) = open_trace(path)
    assert (request.request_id, request.session_id, request.turn) == ("7", "3", 0)
    assert request.prompt_tokens(10).tolist() == [4, 5] and request.output_tokens(10).tolist() == [6]


def test_unsigned_hashes_of_64_bits_stay_different(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    ids = [2**64 - 1, 2**63, 2**63 + 1]
    path.write_text(json.dumps({"timestamp": 0, "input_length": 1536, "output_length": 1, "hash_ids": ids}))
    (request,) = open_trace(path)
    assert len(set(request.content.blocks.ids.tolist())) == 3  # type: ignore[union-attr]


def times(*stamps: str) -> list[float]:
    column = Times("TIMESTAMP")
    found = [column.read(SOURCE, line, stamp) for line, stamp in enumerate(stamps, 2)]
    return [round(stamp - found[0], 9) for stamp in found]


zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(datetime(2000, 1, 1), datetime(2099, 1, 1), timezones=st.just(UTC))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(moments, zones, st.sampled_from(["T", " "])), min_size=2, max_size=5))
def test_dates_with_fractions_and_offsets_are_as_far_apart_as_the_moments(said: list) -> None:
    stamps = [moment.astimezone(zone).isoformat(sep) for moment, zone, sep in said]
    expected = [(moment - said[0][0]).total_seconds() for moment, _, _ in said]
    assert times(*stamps) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    "stamp",
    [
        "2023-11-16T18:17:04.5Z",
        "2023-11-16 18:17:04.5+00:00",
        "2023-11-16 13:17:04.5-0500",
        "2023-11-16T23:47:04.5+05:30",
        "2023-11-16 18:17:04.500000000 UTC",
        "2023/11/16 20:17:04,5+02",
        "2023-11-16 18:17:04.5z",
    ],
)
def test_each_way_to_write_a_moment_is_the_same_moment(stamp: str) -> None:
    assert times("2023-11-16T18:17:03Z", stamp) == [0.0, 1.5]


def test_dates_without_an_offset_and_without_seconds_are_dates() -> None:
    assert times("2023-11-16", "2023-11-16 00:01", "2023-11-16T00:01:00.0000001") == [0.0, 60.0, 60.0000001]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("2023-11-16 18:17:03", "12.5", "'12.5' is not a date like"),
        ("12.5", "2023-11-16 18:17:03", "'2023-11-16 18:17:03' is a date where line 2 has a number"),
        ("2023-11-16 18:17:03", "2023-11-16 18:17:04Z", "has an offset where line 2 has none"),
        ("2023-11-16 18:17:03Z", "2023-11-16 18:17:04", "has no offset where line 2 has one"),
        ("2023-11-16 18:17:03", "2023-02-30 18:17:04", "'2023-02-30 18:17:04' is not a date like"),
        ("2023-11-16 18:17:03", "16.11.2023 18:17", "is not a date like"),
        ("2023-11-16 18:17:03", "2023-11-16 18:17:75", "is not a date like"),
        ("2023-11-16 18:17:03", "", "is missing"),
    ],
)
def test_a_column_holds_one_kind_of_time(first: str, second: str, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        times(first, second)
    assert message in str(caught.value) and "line 3" in str(caught.value)
