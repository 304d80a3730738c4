"""A trace sent to a server: what its clients see is what the server did, and what goes wrong is said in one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("httpx2")

from reports.compare.comparison import compare
from reports.record.run_record import RunRecord, read_record
from tests.meta_form import check_meta
from tests.patience import PATIENCE_S, until
from tests.serving.server import _MAIN, MODEL, Server, environment
from workbench.cli.app import app


def write_trace(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def some(requests: int, every_s: float = 0.05, output: int = 12) -> list[dict[str, Any]]:
    return [
        {"request_id": f"q{i}", "arrival_s": i * every_s, "input_length": 40 + 7 * i, "output_length": output + i % 5}
        for i in range(requests)
    ]


def observe(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["observe", *map(str, words)])


# -- against our own server --------------------------------------------------------------------------------------------


def seen(tmp_path: Path, lines: list[dict[str, Any]], *flags: str) -> tuple[RunRecord, RunRecord]:
    """(what the server recorded, what was observed)."""
    server = Server("--record", str(tmp_path / "server"), "--time-scale", "1")
    try:
        out = tmp_path / "observed"
        ran = observe(server.url, "--trace", write_trace(tmp_path / "t.jsonl", lines), "--out", out, *flags)
        assert ran.exit_code == 0, ran.output
        server.stop()
    finally:
        server.kill()
    records = read_record(tmp_path / "server" / "overlap"), read_record(out)
    for kind, record in zip(("served", "observed"), records, strict=True):
        check_meta(record.meta, kind)
    return records


def test_an_open_loop_sees_what_the_server_did(tmp_path):
    lines = some(12)
    there, here = seen(tmp_path, lines)
    order = np.argsort(there.requests["input_tokens"])  # they need not come in as they went out
    assert here.requests["status"] == ["finished"] * 12
    assert here.requests["arrival_s"].tolist() == pytest.approx([line["arrival_s"] for line in lines])
    for column in ("input_tokens", "output_tokens", "cached_tokens"):
        assert here.requests[column].tolist() == there.requests[column][order].tolist()
    assert here.requests["output_tokens"].tolist() == [line["output_length"] for line in lines]
    # A client sees a request take at least as long as the engine.
    for moment in ("first_token_s", "finish_s"):
        took, engine = (run.requests[moment] - run.requests["arrival_s"] for run in (here, there))
        assert np.all(took > engine[order] - 1e-3)
    assert here.itl[1].sum() == (here.requests["output_tokens"] - 1).sum()
    assert len(here.iterations["stage"]) == 0
    assert np.isnan(here.requests["queued_s"]).all()
    compared = compare(there, here)
    assert compared.requests == 12
    assert not (tmp_path / "observed" / "iterations.csv").exists()


def test_a_closed_loop_keeps_so_many_in_flight(tmp_path):
    _, here = seen(tmp_path, some(9, every_s=100.0), "--concurrency", "3")
    requests = here.requests
    assert requests["status"] == ["finished"] * 9
    order = np.argsort(requests["arrival_s"], kind="stable")
    for place, i in enumerate(order):
        running = sum(
            requests["finish_s"][j] > requests["arrival_s"][i] and requests["arrival_s"][j] <= requests["arrival_s"][i]
            for j in order[: place + 1]
        )
        assert running <= 3
    assert here.meta["settings"]["concurrency"] == 3


def test_later_turns_wait_for_the_answer_and_the_user(tmp_path):
    lines = [
        {"request_id": "a0", "session_id": "a", "turn": 0, "arrival_s": 0.0, "input_length": 30, "output_length": 9},
        {"request_id": "a1", "session_id": "a", "turn": 1, "think_time_s": 0.2, "input_length": 60, "output_length": 4},
        {"request_id": "b", "arrival_s": 0.01, "input_length": 20, "output_length": 3},
    ]
    _, here = seen(tmp_path, lines)
    at = {name: i for i, name in enumerate(here.requests["request_id"])}
    waited = here.requests["arrival_s"][at["a1"]] - here.requests["finish_s"][at["a0"]]
    assert waited >= 0.2 - 1e-6
    assert here.requests["turn"][at["a1"]] == 1


def test_compare_and_report_take_the_record(tmp_path):
    seen(tmp_path, some(4))
    for words in (
        ["compare", tmp_path / "server" / "overlap", tmp_path / "observed"],
        ["report", tmp_path / "observed", "--out", tmp_path / "page.html"],
    ):
        ran = CliRunner().invoke(app, [str(word) for word in words])
        assert ran.exit_code == 0, ran.output


def test_ctrl_c_keeps_what_there_is(tmp_path):
    # A turn is sent when the one before it has come in whole: where the server has the fourth, three are finished.
    turns = [
        {"request_id": f"t{i}", "session_id": "s", "turn": i, "input_length": 40 + 60 * i, "output_length": 5}
        for i in range(4)
    ]
    turns[0]["arrival_s"] = 0.0
    late = {
        "request_id": "t4",
        "session_id": "s",
        "turn": 4,
        "think_time_s": 900.0,
        "input_length": 300,
        "output_length": 5,
    }
    trace = write_trace(tmp_path / "t.jsonl", [*turns, late])
    server = Server("--time-scale", "0")
    try:
        out = tmp_path / "observed"
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, "observe", server.url, "--trace", str(trace), "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        until(lambda: "prompt_tokens_total" in server.http.get("/metrics").text, "metrics")
        server.await_metric("prompt_tokens_total", lambda value: value >= 40 + 100 + 160 + 220)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        server.kill()
    assert process.returncode == 130
    assert f"interrupted: what was observed is in {out}" in said
    record = read_record(out)
    assert record.meta["interrupted"] is True
    assert record.requests["status"][:3] == ["finished"] * 3


def test_the_key_is_sent_and_not_recorded(tmp_path):
    server = Server("--api-key", "s3cret")
    try:
        trace = write_trace(tmp_path / "t.jsonl", some(2))
        without = observe(server.url, "--trace", trace, "--out", tmp_path / "no")
        ran = observe(server.url, "--trace", trace, "--out", tmp_path / "yes", "--api-key", "s3cret")
        other = observe(server.url, "--trace", trace, "--out", tmp_path / "m", "--api-key", "s3cret", "--model", "x")
    finally:
        server.kill()
    assert (without.exit_code, without.stderr.count("\n")) == (2, 1)
    assert "401" in without.stderr
    assert not (tmp_path / "no").exists()
    assert ran.exit_code == 0, ran.output
    assert "s3cret" not in (tmp_path / "yes" / "meta.json").read_text()
    assert other.exit_code == 2
    assert f"no model 'x'; it serves: {MODEL}" in other.stderr


# -- against other servers ---------------------------------------------------------------------------------------------

Reply = Callable[[dict[str, Any]], tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def stub() -> Iterator[Callable[[Reply], str]]:
    """Starts a server that answers completions as told: (status, events)."""
    running: list[ThreadingHTTPServer] = []

    def start(reply: Reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, json.dumps({"data": [{"id": "m"}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, events = reply(body)
                if status != 200:
                    self._send(status, json.dumps(events[0]).encode())
                else:
                    self._send(200, b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events))

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/v1"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def refuse(message: str) -> tuple[int, list[dict[str, Any]]]:
    return 400, [{"error": {"message": message}}]


def test_a_server_that_refuses_fields_is_asked_again_without_them(stub, tmp_path):
    def strict(body: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        for name in ("ignore_eos", "request_id", "stream_options"):
            if name in body:
                return refuse(f"Unrecognized request argument supplied: {name}")
        return 200, [*(piece("x") for _ in range(body["max_tokens"])), piece("", "length")]

    trace = write_trace(tmp_path / "t.jsonl", some(3))
    ran = observe(stub(strict), "--trace", trace, "--out", tmp_path / "o", "--vocab", "100")
    assert ran.exit_code == 0, ran.output
    record = read_record(tmp_path / "o")
    assert record.requests["status"] == ["finished"] * 3
    assert record.requests["output_tokens"].tolist() == [12, 13, 14]
    assert record.meta["settings"]["ignore_eos"] is False
    notes = " ".join(record.meta["trace"]["notes"])
    assert all(name in notes for name in ("no ignore_eos", "no request_id", "no stream_options", "no token counts"))


def test_prompts_go_as_text_where_ids_are_refused_and_a_tokenizer_is_given(stub, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 50)}}, "[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    prompts: list[str] = []

    def only_text(body: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        if not isinstance(body["prompt"], str):
            return refuse("prompt: Input should be a valid string")
        prompts.append(body["prompt"])
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": 1}
        return 200, [piece("x", "length"), {"choices": [], "usage": usage}]

    url = stub(only_text)
    trace = write_trace(
        tmp_path / "t.jsonl",
        [{"request_id": "a", "arrival_s": 0, "prompt_token_ids": [3, 1, 4], "output_length": 1}],
    )
    refused = observe(url, "--trace", trace, "--out", tmp_path / "no")
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "valid string" in refused.stderr
    ran = observe(url, "--trace", trace, "--out", tmp_path / "o", "--tokenizer", tmp_path / "tokenizer.json")
    assert ran.exit_code == 0, ran.output
    assert prompts == ["w3 w1 w4"]
    assert "sent as text" in " ".join(read_record(tmp_path / "o").meta["trace"]["notes"])


def test_single_failures_are_in_the_record(stub, tmp_path):
    served = iter(range(100))

    def flaky(body: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        number = next(served)
        if number == 1:
            return 503, [{"error": {"message": "overloaded"}}]
        if number == 2:
            return 200, [piece("x"), {"error": {"message": "out of memory"}}]
        if number == 3:
            return 200, [piece("x")]  # no end
        return 200, [piece("x", "stop")]

    trace = write_trace(tmp_path / "t.jsonl", some(5, every_s=0.2))
    ran = observe(stub(flaky), "--trace", trace, "--out", tmp_path / "o", "--vocab", "100")
    assert ran.exit_code == 0
    assert "3 of 5 requests failed" in ran.stderr
    assert read_record(tmp_path / "o").requests["status"] == [
        "finished",
        "rejected:http_503",
        "aborted:error",
        "aborted:cut_off",
        "finished",
    ]


def test_what_cannot_be_run_ends_with_one_line(stub, tmp_path):
    trace = write_trace(tmp_path / "t.jsonl", some(3, every_s=0.0))
    down = stub(lambda body: (500, [{"error": {"message": "boom"}}]))
    for words, says in (
        (["http://127.0.0.1:9"], "cannot be reached"),
        (["localhost:8000"], "not the URL of a server"),
        ([down, "--vocab", "100"], "no request could be run; 3 of 3 ended with: 500 boom"),
        ([down], "give --vocab or --tokenizer"),
        ([down, "--concurrency", "0"], "concurrency: 0 is less than 1"),
    ):
        ran = observe(*words, "--trace", trace, "--out", tmp_path / "never")
        assert (ran.exit_code, ran.stderr.count("\n")) == (2, 1), ran.output
        assert says in ran.stderr
        assert not (tmp_path / "never").exists()


def test_answers_that_were_cut_are_counted_by_what_cut_them(stub, tmp_path):
    def short(body: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        tokens = min(body["max_tokens"], 7)  # all the room it has
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
        return 200, [*(piece("x") for _ in range(tokens)), piece("", "length"), {"choices": [], "usage": usage}]

    lines = [
        {"arrival_s": 0, "input_length": 5, "output_length": 6},
        {"arrival_s": 0, "input_length": 5, "output_length": 9},
        {"arrival_s": 0, "input_length": 5, "output_length": 9, "max_tokens": 4},
    ]
    words = ["--trace", write_trace(tmp_path / "t.jsonl", lines), "--vocab", "100"]
    ran = observe(stub(short), *words, "--out", tmp_path / "o", "--max-tokens", "5")
    assert ran.exit_code == 0, ran.output
    record = read_record(tmp_path / "o")
    assert record.requests["output_tokens"].tolist() == [5, 5, 4]
    assert record.meta["totals"]["cut"] == {
        "max_tokens": {"requests": 2, "tokens": 5},
        "trace": {"requests": 1, "tokens": 5},
    }
    assert "2 requests were cut short by --max-tokens (5)" in " ".join(ran.output.split())
    observe(stub(short), *words, "--out", tmp_path / "free")
    assert read_record(tmp_path / "free").meta["totals"]["cut"] == {
        "server": {"requests": 1, "tokens": 2},
        "trace": {"requests": 1, "tokens": 5},
    }
