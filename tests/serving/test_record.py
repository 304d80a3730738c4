"""What --record leaves: a run record, and a trace that simulate takes."""

from __future__ import annotations

import json
import os
import signal
import threading

import numpy as np
import pytest
from typer.testing import CliRunner

from reports.record.run_record import read_record
from tests.meta_form import check_meta
from tests.serving.server import MODEL, Server, answer
from traces import open_trace
from workbench.cli.app import app
from workbench.serving.engine.live_record import BLOCK_TOKENS, BlockHash
from workbench.serving.text.tokenizer import ByteTokenizer

SHARED = "a system prompt that every request begins with, long enough to be shared; "


def served(folder, *flags: str) -> None:
    """A server that has recorded six requests: four that finish, one of them by a stop string, one that its client
    leaves, and one that is aborted while it waits."""
    server = Server("--record", str(folder), "--time-scale", "0.05", "--max-running", "8", *flags)
    client = server.openai()
    threads = [
        threading.Thread(
            target=client.completions.create, kwargs={"model": MODEL, "prompt": f"{SHARED}{i}", "max_tokens": 20}
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
        thread.join()
    whole = answer("stop me", 50)
    client.completions.create(model=MODEL, prompt="stop me", max_tokens=50, stop=whole[10:14])
    stream = client.completions.create(model=MODEL, prompt="leave", max_tokens=5000, stream=True)
    next(iter(stream))
    stream.close()
    server.await_rest()
    server.http.post("/pause")
    waiting = threading.Thread(
        target=server.http.post, args=("/generate",), kwargs={"json": {"text": "waits", "request_id": "waits"}}
    )
    waiting.start()
    server.await_metric("num_requests_waiting", lambda value: value == 1)
    server.http.post("/abort", json={"request_id": "waits"})
    waiting.join()
    server.http.post("/resume")
    assert server.http.post("/settings", json={"max_prefill_tokens": 4096}).is_success
    code, said = server.stop()
    assert code == 0
    assert said.startswith("record: ")


@pytest.fixture(scope="module", params=["content", "no content"])
def recorded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record") / "live"
    served(folder, "--record-content" if request.param == "content" else "--no-record-content")
    return request.param == "content", folder


def test_the_run_record_has_every_request_and_its_times(recorded):
    _, folder = recorded
    record = read_record(folder / "overlap")
    check_meta(record.meta, "served")
    (note,) = record.meta["trace"]["notes"]
    assert note.startswith("settings changed after ") and note.endswith(" s: max_prefill_tokens 4096")
    requests = record.requests
    assert requests["status"] == ["finished"] * 4 + ["aborted:disconnected", "aborted:client"]
    assert requests["output_tokens"].tolist()[:3] == [20, 20, 20]
    assert requests["cached_tokens"].tolist()[:3] == [0, len(SHARED), len(SHARED)]
    finished = slice(0, 4)
    for earlier, later in (
        ("arrival_s", "queued_s"),
        ("queued_s", "scheduled_s"),
        ("scheduled_s", "first_token_s"),
        ("first_token_s", "finish_s"),
    ):
        assert np.all(requests[earlier][finished] <= requests[later][finished])
    assert record.meta["hardware"] == {"gpu": "h100", "gpus": 1, "simulated": True}
    assert record.meta["totals"]["requests"] == 6
    iterations = record.iterations
    assert iterations["decode_tokens"].sum() + 5 >= requests["output_tokens"].sum()
    assert np.all(iterations["end_s"] >= iterations["start_s"])
    assert iterations["schedule_s"].min() > 0
    assert (folder / "report.html").is_file()
    chunks = [i for i, event in enumerate(record.events["event"]) if event == "prefill"]
    assert sum(record.events["tokens"][i] for i in chunks) == iterations["prefill_tokens"].sum() > 0
    assert (folder / "overlap" / "events.csv").is_file()


def test_the_trace_says_what_was_served_and_no_more_than_it_may(recorded):
    content, folder = recorded
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    assert len(lines) == 5, "what gave no token is no load"
    assert lines[0]["arrival_s"] == 0
    assert [line["output_length"] for line in lines[:3]] == [20, 20, 20]
    assert [line["max_tokens"] for line in lines] == [20, 20, 20, 50, 5000]
    if content:
        assert bytes(lines[1]["prompt_token_ids"]).decode() == f"{SHARED}1"
        assert bytes(lines[1]["output_token_ids"]).decode() == answer(f"{SHARED}1", 20)
    else:
        assert not any("token_ids" in field for line in lines for field in line)
        assert all(line["block_size"] == BLOCK_TOKENS for line in lines)
        common = len(SHARED) // BLOCK_TOKENS
        first, second = lines[0]["hash_ids"], lines[1]["hash_ids"]
        assert first[:common] == second[:common]
        assert not set(first[common:]) & set(second[common:])


def test_simulate_takes_the_trace_and_finds_the_shared_prefixes(recorded, tmp_path):
    content, folder = recorded
    ran = CliRunner().invoke(
        app, ["simulate", str(folder / "trace.jsonl"), "--model", MODEL, "--out", str(tmp_path / "sim"), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    record = read_record(tmp_path / "sim" / "overlap")
    assert record.requests["status"] == ["finished"] * 5
    live = read_record(folder / "overlap").requests
    assert record.requests["input_tokens"].tolist() == live["input_tokens"].tolist()[:5]
    cached = live["cached_tokens"] if content else live["cached_tokens"] // BLOCK_TOKENS * BLOCK_TOKENS
    assert record.requests["cached_tokens"].tolist()[:3] == cached.tolist()[:3]


def test_the_trace_tools_read_the_trace(recorded):
    content, folder = recorded
    requests = list(open_trace(folder / "trace.jsonl"))
    assert len(requests) == 5
    if content:
        assert requests[3].prompt_tokens(128_256).tolist() == ByteTokenizer().encode("stop me")


def test_force_replaces_a_record_and_nothing_else_is_replaced(recorded, tmp_path):
    from reports.record.run_record import RecordError, prepare_out

    _, folder = recorded
    with pytest.raises(RecordError, match="not empty"):
        prepare_out(folder)
    stranger = tmp_path / "mine"
    stranger.mkdir()
    (stranger / "trace.jsonl").write_text("{}")
    with pytest.raises(RecordError, match="no workbench run wrote"):
        prepare_out(stranger, force=True)


def test_a_server_that_served_nothing_leaves_an_empty_folder(tmp_path):
    server = Server("--record", str(tmp_path / "none"))
    code, said = server.stop()
    assert (code, "no request came" in said) == (0, True)
    assert list((tmp_path / "none").iterdir()) == []


def test_a_request_says_when_its_first_token_is_due_and_edf_and_the_record_go_by_it(tmp_path):
    server = Server("--record", str(tmp_path / "due"), "--policy", "edf", "--max-running", "1", "--slo-ttft", "5000")
    assert server.http.post("/pause").is_success
    asked = [
        ("/v1/completions", {"prompt": "none of its own"}, {}),
        ("/v1/completions", {"prompt": "in the body", "slo_ttft_s": 4000, "slo_tpot_s": 0.5}, {"x-slo-ttft-s": "1"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "in a header"}]}, {"x-slo-ttft-s": "3000"}),
        ("/generate", {"text": "as routers send it", "cache_salt": "secret"}, {"x-slo-ttft-ms": "2000000"}),
    ]
    threads = []
    for count, (path, body, headers) in enumerate(asked, 1):
        options = {"json": {**body, "request_id": f"r{count}"}, "headers": headers}
        threads.append(threading.Thread(target=server.http.post, args=(path,), kwargs=options))
        threads[-1].start()
        server.await_metric("num_requests_waiting", lambda value, count=count: value == count)
    assert server.http.post("/resume").is_success
    for thread in threads:
        thread.join()
    assert server.stop()[0] == 0
    record = read_record(tmp_path / "due" / "overlap")
    order = np.argsort(record.requests["scheduled_s"], kind="stable")
    assert order.tolist() == [3, 2, 1, 0]
    np.testing.assert_equal(record.requests["slo_ttft_s"], [np.nan, 4000, 3000, 2000])
    assert record.requests["slo_tpot_s"][1] == 0.5
    assert record.meta["settings"]["slo_ttft"] == 5000
    requests = list(open_trace(tmp_path / "due" / "trace.jsonl"))
    assert [request.slo_ttft_s for request in requests] == [None, 4000, 3000, 2000]
    assert [request.adapter for request in requests] == [None, None, None, "salt-1"], "a salt is a secret"


@pytest.mark.parametrize("time_scale", ["2", "60"])
def test_requests_cut_off_by_the_end_are_in_the_record_as_that(tmp_path, time_scale):
    """With steps that are long, the scheduler learns of the cut and of the end at once."""
    folder = tmp_path / "cut"
    server = Server("--record", str(folder), "--time-scale", time_scale, "--drain-timeout", "0")
    stream = server.openai().completions.create(model=MODEL, prompt="x", max_tokens=5000, stream=True)
    next(iter(stream))
    server.signal(signal.SIGTERM)
    code, _ = server.wait()
    assert code == 0
    record = read_record(folder / "overlap")
    assert record.requests["status"] == ["aborted:shutdown"], "its client was there"
    assert not np.isnan(record.requests["finish_s"]).any()


def test_the_record_outlives_a_detokenizer_that_is_killed(tmp_path):
    server = Server("--record", str(tmp_path), "--time-scale", "2")
    stream = server.openai().completions.create(model=MODEL, prompt="x", max_tokens=5000, stream=True)
    next(iter(stream))
    os.kill(server.children()["detokenizer"], signal.SIGKILL)
    code, said = server.wait()
    assert (code, said.splitlines()[-1]) == (1, "error: the detokenizer process was killed by signal 9 (SIGKILL)")
    assert read_record(tmp_path / "overlap").requests["status"] == ["aborted:server_failed"]
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 1


def test_block_ids_tell_prefixes_apart_and_cannot_be_recomputed():
    tokens = np.arange(100, dtype=np.int32)
    other = tokens.copy()
    other[40] = 7
    hashes = BlockHash(b"one key")
    assert len(hashes.ids(tokens)) == 100 // BLOCK_TOKENS
    same = hashes.ids(tokens) == hashes.ids(other)
    assert same.tolist() == [True, True, False, False, False, False]
    assert not set(hashes.ids(tokens)) & set(BlockHash(b"another").ids(tokens)), "another run, other ids"
    assert (hashes.ids(tokens) >= 0).all()
