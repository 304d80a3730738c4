"""Servers of one role each over HTTP, as a router speaks to them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.serving.server import Server, answer
from workbench.cli.app import app
from workbench.scheduler.config import ConfigError
from workbench.serving.engine.peers import listen_to_peers

ROOMS = count(1)
HELLO = {"prompt": "hello", "max_tokens": 8}


class Halves:
    """A prefill and a decode server, and a router's part between them."""

    def __init__(self) -> None:
        self.prefill = Server("--role", "prefill", "--page-size", "4")
        self.decode = Server("--role", "decode", "--page-size", "4")
        self.info = [server.http.get("/server_info").json() for server in (self.prefill, self.decode)]

    def headers(self, peer: str, room: int) -> dict[str, str]:
        return {"x-workbench-room": str(room), "x-workbench-peer": peer, "x-workbench-router": "test"}

    def ask(self, path: str, body: dict[str, Any], **headers: str) -> tuple[Any, Any]:
        """What the two answer."""
        room, (prefill, decode) = next(ROOMS), self.info
        with ThreadPoolExecutor() as pool:
            sent = [
                pool.submit(server.http.post, path, json=body, headers={**self.headers(peer, room), **headers})
                for server, peer in ((self.prefill, decode["peer"]), (self.decode, prefill["peer"]))
            ]
            return sent[0].result(), sent[1].result()


@pytest.fixture(scope="module")
def halves() -> Iterator[Halves]:
    made = Halves()
    yield made
    for server in (made.prefill, made.decode):
        server.kill()


def test_a_router_is_told_what_a_server_is(halves: Halves) -> None:
    prefill, decode = halves.info
    assert (prefill["role"], decode["role"]) == ("prefill", "decode")
    assert prefill["peer"] != decode["peer"] and prefill["instance_id"] != decode["instance_id"]
    for name in ("model", "page_size", "kv_dtype", "max_running"):
        assert prefill[name] == decode[name]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", HELLO),
        ("/v1/completions", {**HELLO, "prompt": ["hello", "hello you"], "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 8}),
        ("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 8}}),
    ],
)
def test_one_half_answers_and_the_other_says_that_it_is_done(halves: Halves, path: str, body: dict[str, Any]) -> None:
    prefill, decode = halves.ask(path, body)
    assert (prefill.status_code, decode.status_code) == (200, 200)
    told = prefill.json()
    assert (told["object"], told["status"]) == ("handover", "handed_over")
    if path == "/v1/completions" and body["prompt"] == "hello":
        assert decode.json()["choices"][0]["text"] == answer("hello", 8)
    for server in (halves.prefill, halves.decode):
        server.await_rest()


def test_a_stream_comes_from_the_decode_server_alone(halves: Halves) -> None:
    prefill, decode = halves.ask("/v1/completions", {**HELLO, "stream": True})
    assert prefill.json()["status"] == "handed_over"
    lines = [line.removeprefix("data: ") for line in decode.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == answer("hello", 8)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"session_id": "s"}, "session_id"),
        ({"echo": True, "logprobs": 1}, "logprobs"),  # of a model that has none; echo where it has some
    ],
)
def test_what_is_not_handed_over_is_refused_by_name_on_both(
    halves: Halves, changes: dict[str, Any], param: str
) -> None:
    for reply in halves.ask("/v1/completions", {**HELLO, **changes}):
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"x-workbench-room": None}, "x-workbench-room"),
        ({"x-workbench-peer": None}, "x-workbench-peer"),
        ({"x-workbench-router": None}, "x-workbench-router"),
        ({"x-workbench-room": "-1"}, "x-workbench-room"),
        ({"x-workbench-room": str(1 << 47)}, "x-workbench-room"),
        ({"x-workbench-room": "1e3"}, "x-workbench-room"),
        ({"x-workbench-peer": "nowhere"}, "x-workbench-peer"),
        ({"x-workbench-peer": "host:0"}, "x-workbench-peer"),
        ({"x-workbench-router": "two words"}, "x-workbench-router"),
    ],
)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_headers_that_cannot_be_are_a_400_by_name(
    halves: Halves, role: str, changes: dict[str, Any], param: str
) -> None:
    given = {**halves.headers("127.0.0.1:9", next(ROOMS)), **changes}
    headers = {name: value for name, value in given.items() if value is not None}
    reply = getattr(halves, role).http.post("/v1/completions", json=HELLO, headers=headers)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)


def test_a_room_is_taken_once(halves: Halves) -> None:
    prefill, decode = halves.info
    for server, peer in ((halves.decode, prefill["peer"]), (halves.prefill, decode["peer"])):
        server.await_rest()
        room = next(ROOMS)
        with ThreadPoolExecutor() as pool:
            headers = halves.headers(peer, room)
            stays = pool.submit(
                server.http.post, "/generate", json={"text": "x", "request_id": "stays"}, headers=headers
            )
            server.await_metric("open_streams", lambda value: value > 0, process="http")
            reply = server.http.post("/v1/completions", json=HELLO, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (409, "duplicate_room")
            assert "is being served already" in reply.text
            server.http.post("/abort", json={"request_id": "stays"})
            stays.result()
        reply = server.http.post("/v1/completions", json=HELLO, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "duplicate_room")


def test_a_peer_that_is_not_there_is_a_503_that_says_so(halves: Halves) -> None:
    headers = halves.headers("127.0.0.1:9", next(ROOMS))
    reply = halves.decode.http.post("/v1/completions", json=HELLO, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "prefill_gone")


def test_other_weights_and_sessions_are_refused(halves: Halves) -> None:
    for path, body, param in (
        ("/update_weights_from_disk", {"model_path": "/tmp"}, "model_path"),
        ("/open_session", {}, "session_id"),
    ):
        reply = halves.prefill.http.post(path, json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--role", "both", "--peer-port", "9"], "peer_port: has no effect here: it needs role prefill or decode"),
        (["--role", "neither"], "role: 'neither' is not one of both, prefill, decode"),
        (["--role", "prefill", "--peer-host", "0.0.0.0"], "peer_host: '0.0.0.0' is no address to connect to"),
        (["--role", "prefill", "--peer-host", "192.0.2.1"], "needs a --peer-key on both sides"),
        (["--role", "decode", "--pp", "2"], "pp: 2 stages; a decode instance has one"),
        (["--role", "decode", "--chunk", "64"], "chunk: has no effect here"),
        (["--role", "prefill", "--spare-rows", "4"], "spare_rows: has no effect here"),
        (["--role", "decode", "--first-token", "prefill"], "first_token: prefill is for simulation"),
        (["--role", "prefill", "--loop", "module:loop"], "no loop of role prefill"),
        (["--role", "prefill", "--peer-key", ""], "peer_key: is empty"),
    ],
)
def test_what_a_half_cannot_have_is_one_line(flags: list[str], line: str) -> None:
    ran = CliRunner().invoke(app, ["serve", "llama-3.1-8b", "--backend", "simulated", *flags])
    assert ran.exit_code == 2
    (told,) = ran.stderr.strip().splitlines()
    assert line in told


def test_an_address_for_peers_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        asked: Any = SimpleNamespace(peer_host="127.0.0.1", peer_port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"^peer_host: cannot listen on 127.0.0.1:\d+: Address already in use$"):
            listen_to_peers(asked)
