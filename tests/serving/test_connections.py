"""How many connections a server has, and clients that do not read or do not wait."""

from __future__ import annotations

import json
import signal
import socket
import threading
from urllib.parse import urlsplit

import pytest

from tests.event_loop import in_a_loop
from tests.patience import PATIENCE_S, until
from tests.serving.server import MODEL, Server, answer
from workbench.scheduler.capacity import Capacity
from workbench.scheduler.request import SamplingParams
from workbench.serving.chunks import Chunk
from workbench.serving.engine import engine_client
from workbench.serving.engine.engine_client import EngineClient
from workbench.serving.metrics import Metrics
from workbench.serving.refusals import Refusal
from workbench.serving.requests import ServiceRequest
from workbench.serving.wire import Addresses, Ready


@pytest.fixture
def start():
    servers = []

    def run(*flags: str, limits: str = "", **env: str) -> Server:
        servers.append(Server(*flags, limits=limits, **env))
        return servers[-1]

    yield run
    for server in servers:
        server.kill()


def connect(server: Server) -> socket.socket:
    at = urlsplit(server.url)
    return socket.create_connection((at.hostname, at.port), PATIENCE_S)


def post(connection: socket.socket, path: str, body: dict) -> None:
    data = json.dumps(body).encode()
    connection.sendall(head(path, len(data)) + data)


def head(path: str, length: int) -> bytes:
    lines = f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", f"content-length: {length}"
    return "\r\n".join((*lines, "", "")).encode()


def test_beyond_the_limit_of_open_files_a_request_gets_a_503_and_health_an_answer(start):
    server = start(limits="ulimit -Sn 100; ulimit -Hn 256")
    silent = [connect(server) for _ in range(250)]
    until(lambda: server.http.get("/health").is_success, "healthy")
    refused = server.http.post("/v1/completions", json={"prompt": "one too many"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert server.metric("request_refused_total", status="503") >= 1
    for connection in silent:
        connection.close()
    until(lambda: server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).is_success, "room again")
    code, said = server.stop()
    assert code == 0
    lines = said.splitlines()
    assert lines[0].startswith("note: the limit of open files lets ")
    room = int(lines[0].split()[7])
    assert 100 < room < 256, "the limit was raised"
    assert lines[1:] and all(line.startswith("warning: ") and "more are answered 503" in line for line in lines[1:])
    assert "Traceback" not in said


def test_a_reader_that_stalls_does_not_hold_up_the_end(start):
    server = start("--drain-timeout", "1", "--max-context", "100000", "--kv-tokens", "200000")
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        at = urlsplit(server.url)
        stalled.connect((at.hostname, at.port))
        post(stalled, "/generate", {"text": "x", "stream": True, "sampling_params": {"max_tokens": 30_000}})
        server.await_metric("request_success_total", lambda value: value == 1, finished_reason="length")
        assert server.metric("open_streams", process="http") == 0, "its tokens are there, and nobody reads them"
        code, said = server.stop()
    assert code == 0
    assert said == "warning: some requests were cut off at the end of --drain-timeout\n"


def test_a_body_that_never_ends_does_not_hold_up_the_end(start):
    server = start("--drain-timeout", "0.2")
    with connect(server) as half:
        half.sendall(head("/generate", 100) + b"{")
        server.http.get("/health")
        assert server.stop() == (0, "")


def test_requests_that_their_clients_leave_are_counted_however_far_they_were(start):
    server = start("--time-scale", "3", "--max-running", "1")
    streams = server.openai().completions
    stream = streams.create(model=MODEL, prompt="in the midst", max_tokens=5000, stream=True)
    next(iter(stream))
    queued = connect(server)
    post(queued, "/v1/completions", {"prompt": "queued", "max_tokens": 50})
    server.await_metric("num_requests_waiting", lambda value: value == 1)
    aborted = threading.Thread(
        target=server.http.post, args=("/generate",), kwargs={"json": {"text": "x", "request_id": "told"}}
    )
    aborted.start()
    server.await_metric("num_requests_waiting", lambda value: value == 2)
    queued.close()
    server.await_metric("request_success_total", lambda value: value == 1, finished_reason="abort")
    server.http.post("/abort", json={"request_id": "told"})
    aborted.join()
    server.await_metric("request_success_total", lambda value: value == 2, finished_reason="abort")
    stream.close()
    server.await_metric("request_success_total", lambda value: value == 3, finished_reason="abort")
    with connect(server) as whole:
        post(whole, "/v1/completions", {"prompt": "not in a stream", "max_tokens": 5000})
        server.await_metric("num_requests_running", lambda value: value == 1)
    server.await_metric("request_success_total", lambda value: value == 4, finished_reason="abort")
    assert server.metric("e2e_request_latency_seconds_count") == 4
    assert server.metric("request_generation_tokens_sum") >= 1
    server.signal(signal.SIGTERM)
    assert server.wait() == (0, "")


def test_what_waits_for_slow_readers_is_bounded_and_the_slowest_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_client, "MAX_UNREAD_BYTES", 50_000)

    async def check() -> None:
        engine = EngineClient(Addresses.within(tmp_path), Metrics("m"), 10)
        engine.ready.set_result(
            Ready(Capacity(1000, 1000), 1000, 8, 300, False, False, "simulated", "none", "normal", None)
        )  # type: ignore[arg-type]
        slow, quick = (engine.submit(ServiceRequest([[1]], SamplingParams()), name) for name in ("slow", "quick"))
        (slow_stream,), (quick_stream,) = slow.open, quick.open
        reader = quick.events()
        for _ in range(200):
            engine._deliver(Chunk(slow_stream, "x", [1]), 0.0)
            engine._deliver(Chunk(quick_stream, "y", [1]), 0.0)
            assert (await anext(reader))[1].text == "y"
            assert engine.unread_bytes <= 50_000
        with pytest.raises(Refusal, match="read too slowly"):
            await anext(slow.events())
        assert engine.unread_bytes == 0
        quick.close()
        engine.destroy()

    in_a_loop(check())


def test_four_hundred_clients_at_a_soft_limit_of_256_are_all_served(start):
    server = start("--max-running", "64", limits="ulimit -Sn 256")

    async def all_of_them() -> list[str]:
        import asyncio

        async with server.async_openai() as client:

            async def one(i: int) -> str:
                made = await client.completions.create(model=MODEL, prompt=f"many {i}", max_tokens=2)
                return made.choices[0].text

            return await asyncio.gather(*(one(i) for i in range(400)))

    assert in_a_loop(all_of_them()) == [answer(f"many {i}", 2) for i in range(400)]
    assert server.stop() == (0, "")
