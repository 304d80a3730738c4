"""``workbench route`` as a user starts it: bad input, and a real client in front of real servers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from tests.serving.server import MODEL, RouterServer, Server, answer
from workbench.cli.app import app

URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "worker: say where they are: --worker URL, or --prefill URL and --decode URL"),
        (["--worker", "localhost:8000"], "worker: 'localhost:8000' is not a URL such as http://127.0.0.1:8000"),
        (["--worker", "http://x y"], "worker: 'http://x y' is not a URL such as http://127.0.0.1:8000"),
        (["--worker", f"{URL}?a"], f"worker: '{URL}?a': a scheme, a name, perhaps a port and a path, and nothing else"),
        (["--worker", URL, "--worker", f"{URL}/v1/"], f"worker: {URL} is given twice"),
        (["--worker", URL, "--decode", URL], "worker: serves whole requests and does not go with prefill and decode"),
        (["--prefill", URL], "prefill: a pair needs a --decode URL, too"),
        (["--decode", URL], "decode: a pair needs a --prefill URL, too"),
        (["--worker", URL, "--decode-router", "cache_aware"], "decode_router: has no effect without --decode"),
        (["--worker", URL, "--router", "random"], "router: 'random' is not one of round_robin, "),
        (["--worker", URL, "--router", "no.such:Thing"], "router: cannot load 'no.such:Thing'"),
        (["--worker", URL, "--retries", "-1"], "retries: -1 is less than 0"),
        (["--worker", URL, "--breaker-open-for", "0"], "breaker_open_for: 0.0 is not positive and finite"),
        (["--worker", URL, "--health-interval", "nan"], "health_interval: nan is not positive and finite"),
        (["--worker", URL, "--health-path", "health"], "health_path: 'health' does not begin with /"),
        (["--worker", URL, "--session-header", "a b"], "session_header: 'a b' is not the name of a header"),
        (["--worker", URL, "--worker-api-key", "a\nb"], "worker_api_key: is empty, not printable ASCII"),
        (["--worker", URL, "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8080"),
        (["--worker", URL, "--allow-origin", "x"], "allow_origin: 'x' is not an origin"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, said):
    ran = CliRunner().invoke(app, ["route", *words])
    assert ran.exit_code == 2, ran.output
    assert ran.stderr.startswith(f"error: {said}") and ran.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    started = [Server("--api-key", "workers") for _ in range(2)]
    yield started
    for server in started:
        server.kill()


@pytest.mark.server
def test_a_real_client_in_front_of_real_servers(servers):
    urls = [word for server in servers for word in ("--worker", server.url)]
    router = RouterServer(*urls, "--worker-api-key", "workers", "--api-key", "clients", "--admin-key", "admin")
    try:
        assert "(round_robin; 2 workers; 2 well)" in router.first_line
        client = router.openai(api_key="clients")
        assert [model.id for model in client.models.list()] == [MODEL]
        for prompt in ("one", "two"):
            made = client.completions.create(model=MODEL, prompt=prompt, max_tokens=9)
            assert made.choices[0].text == answer(prompt, 9)
        pieces = client.completions.create(model=MODEL, prompt="streamed", max_tokens=30, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == answer("streamed", 30)
        chat = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            extra_headers={"x-request-id": "me"},
        )
        assert chat.usage is not None and chat.usage.completion_tokens == 5
        raw = client.completions.with_raw_response.create(
            model=MODEL, prompt="x", max_tokens=1, extra_headers={"x-request-id": "mine"}
        )
        assert raw.headers["x-request-id"] == "mine"
        router.http.headers["authorization"] = "Bearer clients"
        turns = []
        opened = router.http.post("/open_session", json={"session_id": "talk"})
        assert opened.json() == {"session_id": "talk"}
        for _ in range(3):
            body = {"input_ids": [5, 6], "session_id": "talk", "sampling_params": {"max_tokens": 4}}
            turns.append(router.http.post("/generate", json=body).json())
        assert [turn["usage"]["prompt_tokens"] for turn in turns] == [2, 8, 14], "each goes on from the one before"
        refused = router.http.post("/v1/completions", json={"model": "another", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert router.http.post("/flush_cache").json() == {"status": "ok"}
        sent = [router.metric("router_answers_total", worker=server.url, status="200") for server in servers]
        assert all(count >= 3 for count in sent)
        assert router.http.get("/workers").status_code == 401
    finally:
        code, said = router.stop()
    assert (code, said) == (0, "")


@pytest.mark.server
def test_a_router_that_is_told_to_end_finishes_its_streams(servers):
    slow = Server("--api-key", "workers", "--time-scale", "1")
    router = RouterServer("--worker", slow.url, "--worker-api-key", "workers")
    try:
        client = router.openai()
        pieces = iter(client.completions.create(model=MODEL, prompt="x", max_tokens=60, stream=True))
        text = next(pieces).choices[0].text
        router.signal(signal.SIGTERM)
        text += "".join(piece.choices[0].text for piece in pieces)
        assert text == answer("x", 60)
        assert router.wait() == (0, "")
    finally:
        router.kill()
        slow.kill()


@pytest.mark.server
def test_a_real_client_in_front_of_real_pairs():
    halves = [Server("--role", role, WORKBENCH_PEER_KEY="k" * 32) for role in ("prefill", "decode", "decode")]
    urls = [server.url for server in halves]
    words = ["--decode-router", "least_requests", "--router", "cache_aware"]
    router = RouterServer("--prefill", urls[0], "--decode", urls[1], "--decode", urls[2], *words)
    try:
        assert "(cache_aware and least_requests; 1 prefill worker, 2 decode workers; 3 well)" in router.first_line
        client = router.openai()
        for number in range(6):
            prompt = f"prompt {number} " * 40
            pieces = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, stream=number % 2 == 0)
            text = "".join(p.choices[0].text for p in pieces) if number % 2 == 0 else pieces.choices[0].text
            assert text == answer(prompt, 20)
        chosen = client.completions.create(model=MODEL, prompt="three", max_tokens=5, n=3).choices
        assert [choice.text for choice in chosen] == [answer("three", 5)] * 3
        refused = router.http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "bad": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "bad")
        assert router.metric("router_answers_total", worker=urls[0], role="prefill", status="200") == 7
        decoded = [router.metric("router_answers_total", worker=url, role="decode", status="200") for url in urls[1:]]
        assert sum(decoded) == 7 and min(decoded) >= 3
        for server in halves:
            server.await_rest()
        assert router.stop() == (0, "")
        mixed = CliRunner().invoke(app, ["route", "--port", "0", "--prefill", urls[1], "--decode", urls[2]])
        assert (mixed.exit_code, mixed.stderr) == (
            2,
            f"error: prefill: {urls[1]} has the role decode, and was given as --prefill\n",
        )
    finally:
        for each in (router, *halves):
            each.kill()


@pytest.mark.server
def test_many_streams_at_once_get_each_its_own_answer(servers):
    urls = [word for server in servers for word in ("--worker", server.url)]
    router = RouterServer(*urls, "--worker-api-key", "workers", "--router", "cache_aware")
    wrong: list[str] = []

    def ask(number: int) -> None:
        client = router.openai()
        for turn in range(4):
            prompt = f"prompt {number} {turn}"
            pieces = client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, stream=True)
            if "".join(piece.choices[0].text for piece in pieces) != answer(prompt, 40):
                wrong.append(prompt)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert sum(router.metric("router_answers_total", worker=s.url, status="200") for s in servers) == 64
        assert router.stop() == (0, "")
    finally:
        router.kill()
