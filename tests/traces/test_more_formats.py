"""Formats that people have beside the published ones, each recognised, read as its own tools read it, and converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from reports.imported.llmservingsim import read_measured
from reports.record.errors import RecordError
from tests.traces.written import json_lines
from traces import Trace, TraceError, TraceRequest, open_trace
from workbench.cli.trace import app

VOCAB = 32_000
BLIS = (
    "request_id,session_id,prefix_group,prefix_length,input_tokens,output_tokens,server_input_tokens,arrival_time_us,"
    "send_time_us,status,adapter,slo_target_us\n"
)


def opened(tmp_path: Path, text: str, **how: object) -> Trace:
    path = tmp_path / "t"
    path.write_text(text)
    return open_trace(path, **how)  # type: ignore[arg-type]


def shape(trace: Trace) -> list[tuple[float | None, int, int]]:
    return [(request.arrival_s, request.input_length, request.output_length) for request in trace]


def turns(trace: Trace) -> list[tuple]:
    return [(r.session_id, r.turn, r.arrival_s, r.think_time_s, r.input_length, r.output_length) for r in trace]


def common(a: TraceRequest, b: TraceRequest) -> int:
    """Prompt tokens of `b` that the sequence of `a` begins with."""
    whole = np.concatenate([a.prompt_tokens(VOCAB), a.output_tokens(VOCAB)])
    prompt = b.prompt_tokens(VOCAB)
    size = min(len(whole), len(prompt))
    differ = np.flatnonzero(whole[:size] != prompt[:size])
    return int(differ[0]) if len(differ) else size


def row(**more: object) -> dict:
    return {"input_length": 600, "output_length": 5, "hash_ids": [0, 1], **more}


def test_splitwise_rows_are_requests_in_seconds(tmp_path: Path) -> None:
    text = (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
        "0,2,0,0.0,1,1024,12\n1,2,0,0.25,1,7.0,3\n"
    )
    trace = opened(tmp_path, text)
    assert trace.info.format == "splitwise"
    assert shape(trace) == [(0.0, 1024, 12), (0.25, 7, 3)]


def test_blis_prompts_are_the_groups_prefix_and_their_own_tokens(tmp_path: Path) -> None:
    text = BLIS + (
        "0,,g,100,20,5,130,1000,0,ok,,\n1,,g,80,30,6,0,2000,3000,ok,lora,500000\n2,s,,0,20,7,25,4000,0,ok,,\n"
        "3,,,0,20,0,0,5000,0,timeout,,\n"
    )
    trace = opened(tmp_path, text)
    assert trace.info.format == "blis"
    first, second, third = trace
    assert shape(trace) == [(0.0, 120, 5), (0.002, 130, 6), (0.003, 25, 7)]
    assert common(first, second) == 100 and common(first, third) == 0
    assert (second.adapter, second.slo_ttft_s) == ("lora", 0.5)
    assert "1 failed request (status other than ok) was skipped" in trace.info.notes


def test_aibrix_requests_of_a_moment_arrive_together(tmp_path: Path) -> None:
    text = json_lines(
        {
            "timestamp": 0,
            "requests": [
                {"prompt": "hi", "prompt_length": 11, "output_length": 5, "session_id": 0},
                {"prompt": "yo", "prompt_length": 7, "output_length": 3},
            ],
        },
        {"timestamp": 250, "requests": [{"prompt": None, "prompt_length": 9, "output_length": 4}]},
    )
    trace = opened(tmp_path, text)
    assert trace.info.format == "aibrix"
    assert shape(trace) == [(0.0, 11, 5), (0.0, 7, 3), (0.25, 9, 4)]


@pytest.mark.parametrize(
    "header",
    [
        "num_input_tokens,num_output_tokens",
        "prompt_tokens,completion_tokens",
        "input_length,output_length",
        "InputTokens,OutputTokens",
        "Prompt Length,Response Length",
        "isl,osl",
        "input_len,output_len",
        "num_prefill_tokens,num_decode_tokens",
        "prompt_size,token_count,output_size",
        "ContextTokens,GeneratedTokens",
        "n_prompt_tokens,n_generated_tokens",
        "Request tokens,Response tokens",
        "input_toks,output_toks",
    ],
)
def test_lengths_are_read_under_any_of_their_names(tmp_path: Path, header: str) -> None:
    cells = "7,1,3" if header.count(",") == 2 else "7,3"
    trace = opened(tmp_path, f"{header}\n{cells}\n")
    assert trace.info.format == "lengths"
    assert shape(trace) == [(0.0, 7, 3)]
    assert "no times in the file: all arrive at 0 unless a rate spreads them" in trace.info.notes


@pytest.mark.parametrize(
    ("column", "first", "second"),
    [
        ("timestamp", "10", "11.5"),
        ("arrival_time_ms", "0", "1500"),
        ("arrivalTimeMs", "0", "1500"),
        ("ts_us", "0", "1500000"),
        ("Time (ns)", "0", "1500000000"),
        ("timestamp", "1700000000", "1700000001.5"),
        ("timestamp", "1700000000000", "1700000001500"),
        ("time", "1700000000000000", "1700000001500000"),
        ("created_at", "2024-01-01T00:00:00Z", "2024-01-01T00:00:01.5Z"),
        ("start_time", "2024-01-01", "2024-01-01 00:00:01.5"),
        ("arrived_at", "0.0", "1.5"),
    ],
)
def test_arrivals_of_a_table_are_in_the_unit_that_their_name_or_size_says(
    tmp_path: Path, column: str, first: str, second: str
) -> None:
    text = f"{column},prompt_tokens,completion_tokens\n{first},7,3\n{second},7,3\n"
    assert shape(opened(tmp_path, text)) == [(0.0, 7, 3), (1.5, 7, 3)]


def test_a_time_unit_that_is_given_wins_and_is_refused_where_it_is_known(tmp_path: Path) -> None:
    table = "timestamp,prompt_tokens,completion_tokens\n0,7,3\n1500,7,3\n"
    for unit, apart_s in (("s", 1500.0), ("ms", 1.5), ("us", 0.0015), ("ns", 1.5e-6)):
        assert shape(opened(tmp_path, table, time_unit=unit))[1][0] == pytest.approx(apart_s)
    mooncake = json_lines(row(timestamp=0), row(timestamp=2))
    assert [r.arrival_s for r in opened(tmp_path, mooncake)] == [0.0, 0.002]
    assert [r.arrival_s for r in opened(tmp_path, mooncake, time_unit="s")] == [0.0, 2.0]
    for text in (json_lines({"arrival_s": 0, "input_length": 1, "output_length": 1}), BLIS):
        with pytest.raises(ValueError, match=r"--time-unit: .* says the unit of its times"):
            opened(tmp_path, text, time_unit="ms")
    with pytest.raises(ValueError, match=r"--time-unit ms: the times of .* are dates"):
        list(opened(tmp_path, "created_at,prompt_tokens,completion_tokens\n2024-01-01,7,3\n", time_unit="ms"))
    with pytest.raises(ValueError, match="time unit 'min' is not one of auto, s, ms, us, ns"):
        opened(tmp_path, mooncake, time_unit="min")


def test_a_timed_trace_in_seconds_with_small_blocks_is_seen_for_one(tmp_path: Path) -> None:
    records = [
        {"timestamp": n * 0.37, "input_length": 201, "output_length": 3, "hash_ids": [*range(12), 100 + n]}
        for n in range(4)
    ]
    trace = opened(tmp_path, json_lines(*records))
    first, second, *_ = requests = list(trace)
    assert [r.arrival_s for r in requests] == pytest.approx([0.0, 0.37, 0.74, 1.11])
    assert common(first, second) == 192
    assert any("blocks of 16 tokens" in note for note in trace.info.notes)
    assert any("read as seconds" in note for note in trace.info.notes)
    whole = list(opened(tmp_path, json_lines(*records), block_tokens=512, time_unit="ms"))
    assert whole[1].arrival_s == pytest.approx(0.00037) and common(whole[0], whole[1]) == 201


def test_a_session_of_new_tokens_grows_by_what_was_said(tmp_path: Path) -> None:
    text = json_lines(
        {"session_id": "a", "input_length": 300, "output_length": 40},
        {"session_id": "b", "input_length": 30, "output_length": 4},
        {"session_id": "a", "delay": 2000, "input_length": 150, "output_length": 20},
        {"session_id": "a", "input_length": 600, "output_length": 20},
    )
    trace = opened(tmp_path, text)
    assert (trace.info.format, trace.info.closed_loop) == ("mooncake", True)
    assert turns(trace) == [
        ("a", 0, 0.0, 0.0, 300, 40),
        ("b", 0, 0.0, 0.0, 30, 4),
        ("a", 1, None, 2.0, 490, 20),
        ("a", 2, None, 0.0, 1110, 20),
    ]
    first, other, second, third = trace
    assert common(first, second) == 340 and common(second, third) == 510 and common(other, second) == 0


def test_a_session_whose_hash_ids_go_on_has_whole_prompts(tmp_path: Path) -> None:
    text = json_lines(
        row(session_id="a", timestamp=1000, input_length=1100, hash_ids=[0, 1, 2]),
        row(session_id="a", delay=500, input_length=1700, hash_ids=[0, 1, 3, 4]),
        row(session_id="a", delay=500, input_length=100, hash_ids=[9]),
        row(session_id="b", timestamp=4000, input_length=1100, hash_ids=[0, 1, 7]),
    )
    trace = opened(tmp_path, text)
    assert turns(trace) == [
        ("a", 0, 0.0, 0.0, 1100, 5),
        ("a", 1, None, 0.5, 1700, 5),
        ("a", 2, None, 0.5, 1805, 5),
        ("b", 0, 3.0, 0.0, 1100, 5),
    ]
    first, second, third, other = trace
    assert common(first, second) == 1024 and common(second, third) == 1705 and common(first, other) == 1024


def test_turns_that_all_have_timestamps_keep_them(tmp_path: Path) -> None:
    trace = opened(tmp_path, json_lines(row(timestamp=0, session_id="a"), row(timestamp=5000, session_id="a")))
    assert not trace.info.closed_loop
    assert turns(trace) == [(None, 0, 0.0, 0.0, 600, 5), (None, 0, 5.0, 0.0, 600, 5)]
    assert any(note.startswith("open loop") for note in trace.info.notes)


def test_a_missing_timestamp_among_others_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 2, timestamp: is missing, where other rows have one"):
        list(opened(tmp_path, json_lines(row(timestamp=0), row())))
    assert shape(opened(tmp_path, json_lines(row(), row()))) == [(0.0, 600, 5)] * 2


def test_output_lengths_that_are_missing_are_drawn_on_request(tmp_path: Path) -> None:
    text = json_lines(
        *({"timestamp": n, "input_length": 10, **({"output_length": 77} if n == 3 else {})} for n in range(50))
    )
    with pytest.raises(TraceError, match="line 1, output_length: is missing") as caught:
        list(opened(tmp_path, text))
    assert "--output draws such lengths" in caught.value.hint
    trace = opened(tmp_path, text, output="5-9")
    drawn = [request.output_length for request in trace]
    assert drawn == [request.output_length for request in trace]
    assert drawn.pop(3) == 77 and set(drawn) == {5, 6, 7, 8, 9}
    assert "output lengths that the file lacks are drawn: 5-9, seed 0" in trace.info.notes
    assert drawn != [r.output_length for n, r in enumerate(opened(tmp_path, text, output="5-9", seed=1)) if n != 3]
    with pytest.raises(ValueError, match="'often' is not a length"):
        opened(tmp_path, text, output="often")
    with pytest.raises(ValueError, match=r"--output: .* is read as azure, which always has output lengths"):
        opened(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01,1,1\n", output="5")


def test_a_table_of_prompts_alone_needs_outputs_to_be_drawn(tmp_path: Path) -> None:
    text = "timestamp,input_len\n0,2\n"
    with pytest.raises(
        TraceError, match="has no column of output lengths, such as output_tokens, among timestamp, input_len"
    ):
        list(opened(tmp_path, text))
    assert shape(opened(tmp_path, text, output="7")) == [(0.0, 2, 7)]


def test_a_table_of_sessions_waits_for_turns_and_shares_what_was_said(tmp_path: Path) -> None:
    rows = ["a,1,10,5,", "b,1,10,5,", "a,2,30,5,2500", ",,4,2,", "b,2,40,5,0"]
    text = "\n".join(["conversation_id,turn,input_tokens,output_tokens,think_time_ms", *rows])
    trace = opened(tmp_path, text)
    assert trace.info.closed_loop
    assert turns(trace) == [
        ("a", 0, 0.0, 0.0, 10, 5),
        ("b", 0, 0.0, 0.0, 10, 5),
        ("a", 1, None, 2.5, 30, 5),
        (None, 0, 0.0, 0.0, 4, 2),
        ("b", 1, None, 0.0, 40, 5),
    ]
    first, other, second, *_ = trace
    assert common(first, second) == 15 and common(other, second) == 0
    shorter = list(opened(tmp_path, text.replace("30", "3")))
    assert [request.input_length for request in shorter] == [10, 10, 18, 4, 55]
    with pytest.raises(TraceError, match="line 6, turn: session 'b' has turn 3 after turn 1"):
        list(opened(tmp_path, text.replace("b,2", "b,3")))


def test_a_table_with_times_of_first_turns_alone_is_a_closed_loop(tmp_path: Path) -> None:
    text = "session,round,prompt_len,output_len,arrival_time\na,0,5,5,3\na,1,15,5,\nb,0,9,5,4\n"
    trace = opened(tmp_path, text)
    assert trace.info.closed_loop
    assert turns(trace) == [("a", 0, 0.0, 0.0, 5, 5), ("a", 1, None, 0.0, 15, 5), ("b", 0, 1.0, 0.0, 9, 5)]
    with pytest.raises(TraceError, match="line 4, arrival_time: is missing"):
        list(opened(tmp_path, text.replace("5,4\n", "5,\n")))
    with pytest.raises(TraceError, match="line 4, round: session 'b' has turn 2 but none before it"):
        list(opened(tmp_path, text.replace("b,0", "b,2")))


def test_offline_requests_with_small_blocks_arrive_at_once(tmp_path: Path) -> None:
    for extra in ({"chat_id": 1, "turn": 1}, {}, {"type": "text", "turn": 1}):
        trace = opened(tmp_path, json_lines({"input_length": 33, "output_length": 6, "hash_ids": [1, 2, 3], **extra}))
        assert shape(trace) == [(0.0, 33, 6)]
        (request,) = trace
        assert request.content.blocks.size == 16  # type: ignore[union-attr]
        assert "no timestamps in the file: all arrive at 0 unless a rate spreads them" in trace.info.notes


def test_a_prompt_of_text_names_its_own_field(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 1, text_input: is text, which takes a tokenizer to read"):
        list(opened(tmp_path, json_lines({"text_input": "hello", "output_length": 4})))


def test_a_table_of_sessions_with_a_time_for_every_turn_is_an_open_loop(tmp_path: Path) -> None:
    trace = opened(tmp_path, "session_id,timestamp,input_tokens,output_tokens\na,0,10,5\na,2,18,5\n")
    assert turns(trace) == [(None, 0, 0.0, 0.0, 10, 5), (None, 0, 2.0, 0.0, 18, 5)]
    assert any(note.startswith("open loop") for note in trace.info.notes)


CONVERTED = {
    "splitwise": "arrival_timestamp,prompt_size,token_size\n0,9,2\n1,3,1\n",
    "blis": BLIS
    + "0,,g,100,20,5,130,1000,0,ok,,\n1,,g,100,30,6,0,2000,3000,ok,lora,500000\n2,,h,7,1,1,0,4000,0,ok,,\n",
    "aibrix": json_lines({"timestamp": 5, "requests": [{"prompt_length": 11, "output_length": 5}] * 3}),
    "lengths": "session_id,input_tokens,output_tokens,delay\na,10,5,\nb,10,5,\na,3,5,2\na,4,5,1\n",
    "mooncake": json_lines(
        row(session_id="a", timestamp=1000, input_length=1100, hash_ids=[0, 1, 2]),
        row(session_id="a", delay=500, input_length=1700, hash_ids=[0, 1, 3, 4]),
        row(session_id="a", delay=500, input_length=100, hash_ids=[9]),
        row(session_id="b", timestamp=4000, input_length=1100, hash_ids=[0, 1, 2**64 - 1]),
        {"session_id": "b", "input_length": 20, "output_length": 3},
    ),
}


@pytest.mark.parametrize("format", CONVERTED)
def test_a_converted_trace_has_the_same_requests_and_tokens(tmp_path: Path, format: str) -> None:
    trace = opened(tmp_path, CONVERTED[format])
    assert trace.info.format == format
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "t"), str(out)])
    assert result.exit_code == 0, result.output
    again = open_trace(out)
    assert again.info.format == "workbench"
    assert turns(again) == turns(trace)
    for one, other in zip(trace, again, strict=True):
        assert (one.request_id, one.adapter, one.slo_ttft_s) == (other.request_id, other.adapter, other.slo_ttft_s)
        assert np.array_equal(one.prompt_tokens(VOCAB), other.prompt_tokens(VOCAB))
        assert np.array_equal(one.output_tokens(VOCAB), other.output_tokens(VOCAB))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,in,out\n1,2,3\n", "it has the columns time, in, out"),
        (
            "TIMESTAMP,Tokens\n1,2\n",
            "it has the columns TIMESTAMP, Tokens; nearest: azure lacks ContextTokens, GeneratedTokens",
        ),
        (
            json_lines({"chat_id": 1, "timestamp": 2}),
            "it has the fields chat_id, timestamp; nearest: bailian lacks hash_ids",
        ),
        (json_lines({"requests": []}), "it has the fields requests; nearest: aibrix lacks timestamp"),
        ("{}\n", "it has no fields"),
    ],
)
def test_what_is_no_known_format_says_what_it_has_and_what_the_nearest_lack(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(TraceError) as caught:
        opened(tmp_path, text)
    assert ", line 1: is the start of no known format; name one with --format (azure, " in str(caught.value)
    assert message in str(caught.value)


def test_importing_what_is_no_measured_run_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "requests.csv").write_text("x")
    for name, message in (
        ("no", ": no such folder"),
        ("file", ": is a file; give the folder of a run, which holds requests.jsonl and meta.json"),
        ("record", ": is a run record already: it has no requests.jsonl and no meta.json, as LLMServingSim's "),
        ("", ": is not the folder of a measured run: it has no requests.jsonl and no meta.json, "),
    ):
        with pytest.raises(RecordError) as caught:
            read_measured(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}{message}")
