"""Each format is recognised by its content and read as it means."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tests.traces.written import json_lines
from traces import Trace, TraceRequest, open_trace

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "traces"
VOCAB = 32_000


def real(name: str, tokenizer: Path | None = None) -> Trace:
    if not (DATA / name).exists():
        pytest.skip("the reference data (../shared/data) is not here")
    return open_trace(DATA / name, tokenizer=tokenizer)


def written(tmp_path: Path, *records: dict) -> Trace:
    path = tmp_path / "t.jsonl"
    path.write_text(json_lines(*records))
    return open_trace(path)


def shape(trace: Trace) -> list[tuple[float | None, int, int]]:
    return [(request.arrival_s, request.input_length, request.output_length) for request in trace]


def prompt(request: TraceRequest) -> np.ndarray:
    return request.prompt_tokens(VOCAB)


def common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def test_azure_dates_become_seconds_since_the_first(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"\xef\xbb\xbfTIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 23:59:59.5000000,374,44\r\n\r\n"
        b"2023-11-17 00:00:01.2500001,10,1\r\n"
    )
    trace = open_trace(path)
    assert shape(trace) == [(0.0, 374, 44), (1.7500001, 10, 1)]
    assert [request.line for request in trace] == [2, 4]
    assert (trace.info.name, trace.info.format, trace.info.closed_loop) == ("t", "azure", False)


def test_burstgpt_rows_without_a_response_are_skipped_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,,1.0,ChatGPT,472,18,490,Conversation log\n45,,1.0,GPT-4,1087,0,1087,API log\n"
        "118,,1.0,ChatGPT,417,276,693,Conversation log\n"
    )
    trace = open_trace(path)
    assert shape(trace) == shape(trace) == [(0.0, 472, 18), (113.0, 417, 276)]
    assert trace.info.notes.count("1 failed request (0 response tokens) was skipped") == 1


def test_vidur_columns_are_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("num_decode_tokens,arrived_at,num_prefill_tokens\n3,0.25,7\n4,1,8\n")
    assert shape(open_trace(path)) == [(0.0, 7, 3), (0.75, 8, 4)]


def test_mooncake_blocks_with_equal_ids_have_equal_tokens(tmp_path: Path) -> None:
    records = [
        {"timestamp": 0, "input_length": 1000, "output_length": 2, "hash_ids": [7, 8]},
        {"timestamp": 0, "input_length": 1500, "output_length": 2, "hash_ids": [7, 9, 10]},
        {"timestamp": 0, "input_length": 800, "output_length": 2, "hash_ids": [7]},
    ]
    a, b, c = (prompt(request) for request in written(tmp_path, *records))
    assert common(a, b) == common(a, c) == 512
    assert len(c) == 800


def test_bailian_turns_keep_their_arrivals_and_share_16_token_blocks(tmp_path: Path) -> None:
    records = [
        {
            "chat_id": 1,
            "parent_chat_id": -1,
            "timestamp": 0.5,
            "input_length": 40,
            "output_length": 9,
            "type": "text",
            "turn": 1,
            "hash_ids": [1, 2, 3],
        },
        {
            "chat_id": 2,
            "parent_chat_id": 1,
            "timestamp": 9.0,
            "input_length": 60,
            "output_length": 9,
            "type": "text",
            "turn": 2,
            "hash_ids": [1, 2, 4, 5],
        },
    ]
    trace = written(tmp_path, *records)
    first, second = trace
    assert (first.arrival_s, second.arrival_s, second.session_id) == (0.0, 8.5, None)
    assert common(prompt(first), prompt(second)) == 32
    assert not trace.info.closed_loop


def test_a_subagents_calls_run_in_the_sessions_chain_at_their_place(tmp_path: Path) -> None:
    def call(t: float, tokens: int, *, first: int = 1, **more: float) -> dict:
        runs = [[first, tokens // 64]]
        return {"t": t, "type": "n", "in": tokens, "out": 30, "api_time": 1.0, "hash_rle": runs, **more}

    session = {
        "id": "a",
        "block_size": 64,
        "hash_id_scope": "local",
        "requests": [
            call(0, 200, think_time=3.0),
            {
                "type": "subagent",
                "t": 2,
                "requests": [call(2, 128, first=50, think_time=1.0), call(5.5, 256, first=50)],
            },
            call(9, 260, think_time=2.0),
        ],
    }
    trace = written(tmp_path, session, session | {"id": "b"})
    requests = list(trace)
    assert [(r.session_id, r.turn, r.input_length, r.arrival_s, r.think_time_s) for r in requests[:4]] == [
        ("a", 0, 200, 0.0, 0.0),
        ("a", 1, 128, None, 1.0),
        ("a", 2, 256, None, 2.5),
        ("a", 3, 260, None, 2.0),
    ]
    parent, agent, agent_later, parent_later, other = requests[:5]
    # The parent's next call extends its last one, output and all, over the subagent's calls.
    whole = np.concatenate([prompt(parent), parent.output_tokens(VOCAB)])
    assert common(whole, prompt(parent_later)) == 230
    assert common(prompt(agent), prompt(agent_later)) == 128
    assert common(prompt(parent), prompt(agent)) == 0
    # Ids are local to their session.
    assert common(prompt(parent), prompt(other)) == 0
    assert any("subagents" in note for note in trace.info.notes)


def test_lmcache_think_times_charge_each_call_at_the_sessions_fastest_pace(tmp_path: Path) -> None:
    starts_and_outputs = [(0.0, 100), (1.0, 200), (6.0, 50), (7.0, 10)]
    trace = written(
        tmp_path,
        *(
            {"session": "s", "turn": n, "t_s": t, "input_length": 20, "output_length": out, "hash_rle": [[n, 1]]}
            for n, (t, out) in enumerate(starts_and_outputs)
        ),
    )
    # The fastest pace is 1 s for 100 tokens.
    assert [request.think_time_s for request in trace] == [0.0, 0.0, 3.0, 0.5]
    assert [request.arrival_s for request in trace] == [0.0, None, None, None]


def test_messages_and_prompts_are_read_with_the_tokenizer_given(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"arrival_s": 0, "prompt": "red green blue", "output_length": 1}\n'
        '{"arrival_s": 0, "messages": [{"role": "user", "content": "red blue"}], "output_length": 1}\n'
    )
    first, second = open_trace(path, tokenizer=tokenizer)
    assert prompt(first).tolist() == [1, 2, 3]
    assert prompt(second).tolist()[-2:] == [1, 3]


def test_sharegpt_answers_become_turns_that_hold_the_conversation(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "t.json"
    said = [("human", "red green"), ("gpt", "blue"), ("human", "red"), ("gpt", "green green")]
    conversation = {"id": "x", "conversations": [{"from": role, "value": text} for role, text in said]}
    path.write_text(json.dumps([conversation, conversation], indent=1))
    trace = open_trace(path, tokenizer=tokenizer)
    first, second, *others = trace
    assert trace.info.format == "sharegpt" and len(others) == 2
    assert prompt(first).tolist() == [1, 2] and first.output_tokens(VOCAB).tolist() == [3]
    assert prompt(second).tolist() == [1, 2, 3, 1] and (second.turn, second.arrival_s) == (1, None)


def test_null_is_the_same_as_left_out(tmp_path: Path) -> None:
    record = {
        "arrival_s": 0,
        "input_length": 8,
        "output_length": 2,
        "session_id": None,
        "turn": None,
        "max_tokens": None,
    }
    (request,) = written(tmp_path, record)
    assert (request.session_id, request.turn, request.max_tokens) == (None, 0, None)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_archives_are_known_by_their_bytes_not_their_name(tmp_path: Path, pack) -> None:
    path = tmp_path / "no_ending"
    line = b'{"arrival_s": 0, "input_length": 8, "output_length": 2}'
    path.write_bytes(pack(line + b"\n") + pack(line))
    assert shape(open_trace(path)) == [(0.0, 8, 2)] * 2


def test_a_long_file_gives_its_first_request_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = '{"arrival_s": 0, "input_length": 8, "output_length": 2}\n'
    path.write_text(good * 20_000 + "broken")
    assert next(iter(open_trace(path))).input_length == 8


@pytest.mark.parametrize(
    ("name", "format", "first"),
    [
        ("azure2023_code.csv.gz", "azure", (0.0, 4808, 10)),
        ("azure2023_conv.csv.gz", "azure", (0.0, 374, 44)),
        ("mooncake_conversation.jsonl.gz", "mooncake", (0.0, 6758, 500)),
        ("weka_agentic_max64k.jsonl.gz", "weka", (0.0, 15161, 291)),
        ("lmcache_agent_trace.jsonl.gz", "lmcache", (0.0, 306, 345)),
        ("llmservingsim_sharegpt-llama-3.1-8b-300-sps10.jsonl.gz", "llmservingsim", (0.0, 2358, 531)),
    ],
)
def test_a_real_file_is_recognised(name: str, format: str, first: tuple[float, int, int]) -> None:
    trace = real(name)
    assert trace.info.format == format
    requests = list(islice(trace, 50))
    assert (requests[0].arrival_s, requests[0].input_length, requests[0].output_length) == first
    assert all(len(prompt_) == r.input_length for r in requests[:5] for prompt_ in [r.prompt_tokens(200_000)])


def test_real_text_is_read_with_a_tokenizer(tokenizer: Path) -> None:
    requests = list(islice(real("lmcache_agent_text.jsonl.zst", tokenizer), 20))
    assert requests[0].turn == 0 and requests[1].arrival_s is None
    assert requests[0].input_length == len(prompt(requests[0]))


def test_real_agent_calls_hold_the_outputs_of_the_calls_they_extend() -> None:
    before: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    extended = 0
    for request in islice(real("weka_agentic_max64k.jsonl.gz"), 150):
        tokens, session = prompt(request), request.session_id or ""
        if session in before:
            past, output = before[session]
            if len(tokens) > len(past) and common(past, tokens) == len(past):
                extended += 1
                held = tokens[len(past) : len(past) + len(output)]
                assert np.array_equal(held, output[: len(held)])
        before[session] = tokens, request.output_tokens(VOCAB)
    assert extended > 100
