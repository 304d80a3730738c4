"""/generate, /health, /metrics, /state, /settings, /flush_cache, /abort, /pause and /resume; what a modelled GPU refuses."""

from __future__ import annotations

import json
import threading

import pytest

from backends.simulated.synthetic import content_key, synthetic_output
from tests.patience import until
from tests.serving.server import MODEL, Server, answer
from workbench.serving.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def server():
    server = Server("--time-scale", "0.05")
    yield server
    server.kill()


def generate(server, **body):
    return server.http.post("/generate", json=body)


def events(lines):
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def test_token_ids_in_give_token_ids_out(server):
    ids = [9, 8, 7, 1000]
    made = generate(server, input_ids=ids, sampling_params={"max_tokens": 6}).json()
    import numpy as np

    key = content_key(np.array(ids, np.int32), None)
    assert made["output_ids"] == synthetic_output(key, 0, 6, ByteTokenizer().writable_ids()).tolist()
    assert made["text"] == answer(ids, 6)
    assert made["finish_reason"] == "length"
    assert made["usage"]["prompt_tokens"] == 4


def test_text_in_is_encoded(server):
    made = generate(server, text="hello", sampling_params={"max_tokens": 6}).json()
    assert made["text"] == answer("hello", 6)


def test_streamed_pieces_are_together_the_whole(server):
    with server.http.stream(
        "POST", "/generate", json={"text": "hello", "stream": True, "sampling_params": {"max_tokens": 6}}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    pieces = events(lines)
    assert [len(piece["output_ids"]) for piece in pieces] == [1] * 6
    assert "".join(piece["text"] for piece in pieces) == answer("hello", 6)
    assert pieces[-1]["finish_reason"] == "length"
    assert pieces[-1]["usage"]["completion_tokens"] == 6
    assert "data: [DONE]" in lines


@pytest.mark.parametrize("body", [{}, {"text": "x", "input_ids": [1]}])
def test_the_prompt_is_given_once(server, body):
    response = generate(server, **body)
    assert response.status_code == 400
    assert "exactly one" in response.json()["error"]["message"]


def test_a_healthy_server_says_so(server):
    assert server.http.get("/health").status_code == 200


def test_metrics_count_what_was_served(server):
    before = server.metric("request_generation_tokens_sum")
    served = server.metric("request_success_total", finished_reason="length")
    generate(server, text="count me", sampling_params={"max_tokens": 11})
    assert server.metric("request_generation_tokens_sum") == before + 11
    server.await_metric("generation_tokens_total", lambda value: value >= before + 11)
    assert server.metric("request_success_total", finished_reason="length") == served + 1
    for name in (
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "kv_cache_usage_perc",
        "e2e_request_latency_seconds_count",
        "cache_hit_rate",
        "num_requests_running",
        "iterations_total",
        "num_requests_waiting",
    ):
        assert server.metric(name) >= 0
    for phase in ("receive", "schedule", "launch", "process"):
        assert server.metric("host_phase_seconds_total", phase=phase) > 0
    for process in ("http", "scheduler", "detokenizer"):
        server.await_metric("process_cpu_seconds_total", lambda spent: spent > 0, process=process)


def test_flushing_forgets_what_was_cached(server):
    prompt = "something to remember " * 10
    for _ in range(2):
        made = generate(server, text=prompt, sampling_params={"max_tokens": 2}).json()
    assert made["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert server.http.post("/flush_cache").status_code == 200
    made = generate(server, text=prompt, sampling_params={"max_tokens": 2}).json()
    assert made["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_settings_change_while_it_serves_and_the_state_has_them(server):
    before = server.http.get("/state").json()
    assert before["running"] == before["waiting"] == 0 and before["kv_tokens"] > 1000
    changed = server.http.post("/settings", json={"chunk": 64, "policy": "lpm"})
    assert changed.status_code == 200, changed.text
    assert changed.json()["settings"] == before["settings"] | {"chunk": 64, "policy": "lpm"}
    prompt = "a prompt that is computed in chunks " * 10
    steps = server.metric("iterations_total")
    made = generate(server, text=prompt, sampling_params={"max_tokens": 3}).json()
    assert made["text"] == answer(prompt, 3)
    server.await_metric("iterations_total", lambda value: value - steps >= len(prompt) // 64)
    for body, line in (
        ({"chunk": 10**6}, "a step of 1000000 prompt tokens is more than the "),
        ({"chunk": 32, "kv_tokens": 5}, "kv_tokens: cannot be changed while the scheduler runs; "),
        ({"policy": "os:system"}, "policy: 'os:system' is not one of "),
        ([1], "Expected `object`, got `array`"),
        ({"chunk": 10**30}, f"chunk: {10**30} is nothing that a setting may be"),
        ({"policy": ["lpm"]}, "policy: ['lpm'] is nothing that a setting may be"),
    ):
        refused = server.http.post("/settings", json=body)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["message"].startswith(line), refused.text
    assert server.http.get("/state").json()["settings"] == changed.json()["settings"]
    assert server.http.post("/settings", json=before["settings"]).json()["settings"] == before["settings"]


@pytest.mark.parametrize(
    ("path", "body", "line", "param"),
    [
        ("update_weights_from_disk", {"model_path": "/tmp"}, "the simulated backend has no weights to update", None),
        ("update_weights_from_disk", {}, "model_path: is required", "model_path"),
        (
            "start_profile",
            {"output_dir": "x"},
            "the simulated backend has no device to profile; the timeline of ",
            None,
        ),
        ("start_profile", {"output_dir": "x", "num_steps": 0}, "num_steps: 0 is less than 1", "num_steps"),
        ("stop_profile", {}, "no profile is running", None),
    ],
)
def test_a_modelled_gpu_has_neither_weights_nor_a_profile(server, path, body, line, param):
    refused = server.http.post(f"/{path}", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(line), refused.text
    assert refused.json()["error"]["param"] == param, "what is wrong with the request, if anything is"


def test_pausing_stops_the_tokens_and_resuming_lets_them_go_on(server):
    assert server.http.post("/pause").status_code == 200
    server.await_metric("scheduler_paused", lambda value: value == 1)
    results = []
    asked = threading.Thread(
        target=lambda: results.append(generate(server, text="wait", sampling_params={"max_tokens": 3}).json())
    )
    asked.start()
    server.await_metric("num_requests_waiting", lambda value: value == 1)
    assert server.http.get("/health").status_code == 200, "a paused server is not stuck"
    assert server.http.post("/resume").status_code == 200
    asked.join()
    assert results[0]["text"] == answer("wait", 3)


@pytest.mark.parametrize("body", [{"request_id": "mine"}, {"all": True}])
def test_an_abort_ends_a_request_with_what_it_has(server, body):
    results = []
    asked = threading.Thread(
        target=lambda: results.append(
            generate(server, text="long", request_id="mine", sampling_params={"max_tokens": 100_000}).json()
        )
    )
    asked.start()
    server.await_metric("num_requests_running", lambda value: value == 1)
    assert server.http.post("/abort", json=body).json() == {"aborted": 1}
    asked.join()
    assert results[0]["finish_reason"] == "abort"
    assert answer("long", 100_000).startswith(results[0]["text"])
    server.await_rest()


def test_an_abort_of_nobody_is_no_error(server):
    assert server.http.post("/abort", json={"request_id": "nobody"}).json() == {"aborted": 0}
    assert server.http.post("/abort", json={}).status_code == 400


def test_a_higher_priority_is_taken_by_a_server_of_any_policy(server):
    made = server.openai().completions.create(model=MODEL, prompt="x", max_tokens=1, extra_body={"priority": -5})
    assert made.usage.completion_tokens == 1


def test_an_id_cannot_be_used_twice_at_a_time(server):
    asked = threading.Thread(
        target=generate,
        args=(server,),
        kwargs={"text": "x", "request_id": "twice", "sampling_params": {"max_tokens": 100_000}},
    )
    asked.start()
    server.await_metric("num_requests_running", lambda value: value == 1)
    response = generate(server, text="x", request_id="twice", sampling_params={"max_tokens": 1})
    assert response.status_code == 400
    assert server.http.post("/abort", json={"request_id": "twice"}).json() == {"aborted": 1}
    asked.join()
    until(
        lambda: generate(server, text="x", request_id="twice", sampling_params={"max_tokens": 1}).is_success, "free id"
    )
