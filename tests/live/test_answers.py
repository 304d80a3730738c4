"""When a streamed answer counts as finished, in all the shapes that servers give to streams and errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httpx2")

import httpx2

from tests.event_loop import in_a_loop
from workbench.clients.event_stream import Event, events
from workbench.clients.openai_client import Answer, CompletionsClient

ASKED = 3
DONE = "data: [DONE]\n\n"


def piece(text: str = "x", reason: Any = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason, **more}]}


def sse(*chunks: Any, end: str = DONE) -> bytes:
    return ("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end).encode()


def answer_to(body: bytes, status: int = 200, cuts: list[int] | None = None, broken: bool = False) -> Answer:
    """What becomes of one request whose server answers so; ``cuts`` are where the packets end."""

    async def blocks() -> AsyncIterator[bytes]:
        edges = [0, *sorted(cuts or []), len(body)]
        for begin, end in pairwise(edges):
            if body[begin:end]:
                yield body[begin:end]
        if broken:
            raise httpx2.RemoteProtocolError("peer closed connection")

    async def ask() -> Answer:
        moments = iter(range(10_000))
        client = CompletionsClient("http://server", "m", lambda: float(next(moments)))
        await client._http.aclose()
        client._http = httpx2.AsyncClient(
            base_url="http://server",
            transport=httpx2.MockTransport(lambda request: httpx2.Response(status, content=blocks())),
        )
        answer = Answer(0.0)
        async with client:
            await client.complete("r", np.array([1, 2], np.int32), ASKED, answer)
        return answer

    return in_a_loop(ask())


USAGE = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": ASKED}}

FINISHED_STREAMS = {
    "a finish reason": sse(piece(), piece("y", "stop")),
    "a finish reason and no [DONE]": sse(piece(), piece("y", "length"), end=""),
    "a finish reason without text": sse(piece(), piece("", "stop")),
    "the length asked for and no reason": sse(piece(), piece(), piece()),
    "the length asked for, as the server counts": sse(piece("xyz"), USAGE),
    "usage after the reason": sse(piece(), piece("", "stop"), USAGE),
    "reasons of other servers": sse(piece(), piece("", "eos_token")),
    "a reason as an object": sse(piece(), piece("", {"type": "length", "length": 2})),
    "a null error in every chunk": sse({**piece(), "error": None}, {**piece("", "stop"), "error": None}),
    "signs of life": sse({"type": "ping"}, piece(), {"id": "c", "object": "text_completion"}, piece("", "stop")),
    "comments, other fields and CRLF": (
        b": keep-alive\r\n\r\nid: 7\r\nretry: 100\r\ndata: " + json.dumps(piece()).encode() + b"\r\n\r\n: again\r\n\r\n"
        b"event: message\r\ndata:" + json.dumps(piece("", "stop")).encode() + b"\r\n\r\ndata: [DONE]\r\n\r\n"
    ),
    "data of several lines": (
        "data: " + json.dumps(piece("a", "stop"), indent=1).replace("\n", "\ndata: ") + "\n\n"
    ).encode(),
    "no empty lines between events": (
        f"data: {json.dumps(piece())}\ndata: {json.dumps(piece('', 'stop'))}\ndata: [DONE]\n"
    ).encode(),
    "no line end at the end": sse(piece(), end=f"data: {json.dumps(piece('', 'stop'))}"),
    "a byte order mark": b"\xef\xbb\xbf" + sse(piece("", "stop")),
    "odd counts": sse(
        piece("a", "stop"),
        {"choices": [], "usage": {"completion_tokens": "two", "prompt_tokens": 2.0, "prompt_tokens_details": [1]}},
    ),
}


@pytest.mark.parametrize("name", FINISHED_STREAMS)
def test_an_answer_has_finished_with(name):
    answer = answer_to(FINISHED_STREAMS[name])
    assert (answer.status, answer.message) == ("finished", "")
    assert answer.finish_s == answer.finish_s


ERRORS: dict[str, Any] = {
    "OpenAI": {"error": {"message": "out of memory", "code": 500}},
    "a text": {"error": "out of memory"},
    "vLLM": {"object": "error", "message": "out of memory", "code": 400},
    "Anthropic": {"type": "error", "error": {"type": "overloaded_error", "message": "out of memory"}},
    "FastAPI": {"detail": "out of memory"},
    "FastAPI's list": {"detail": [{"loc": ["body"], "msg": "out of memory"}]},
    "a list": {"errors": [{"message": "out of memory"}]},
    "a message alone": {"message": "out of memory", "status": 500},
    "in a choice": {"choices": [{"index": 0, "text": "", "error": {"message": "out of memory"}}]},
    "beside choices": {**piece("y"), "error": {"message": "out of memory"}},
    "not an object": "out of memory",
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_the_stream_is_no_finish_even_before_done(name):
    answer = answer_to(sse(piece(), ERRORS[name]))
    assert (answer.status, answer.message) == ("aborted:error", "out of memory")


def test_an_error_after_the_reason_is_an_error():
    assert answer_to(sse(piece("x", "stop"), {"error": "out of memory"})).status == "aborted:error"


def test_an_event_called_error_is_one_whatever_it_holds():
    stream = f'data: {json.dumps(piece())}\n\nevent: error\ndata: {{"why": "out of memory"}}\n\n{DONE}'.encode()
    answer = answer_to(stream)
    assert (answer.status, answer.message) == ("aborted:error", '{"why":"out of memory"}')


@pytest.mark.parametrize("reason", ["abort", "error", "content_filter", "cancelled"])
def test_a_finish_reason_can_be_a_failure(reason):
    assert answer_to(sse(piece(), piece("", reason))).status == f"aborted:{reason}"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (sse(piece()), "aborted:cut_off", "no finish_reason, and 1 of 3 tokens"),
        (sse(piece(), {"choices": []}), "aborted:cut_off", "1 of 3"),
        (sse(piece(), piece("", "")), "aborted:cut_off", "2 of 3"),
        (sse(piece(), end='data: {"choices": [{"te'), "aborted:error", "not JSON"),
        (sse(piece(), end="data: \xff\xfe\n\n"), "aborted:error", "not JSON"),
        (b"", "aborted:cut_off", "0 of 3"),
        (DONE.encode(), "aborted:cut_off", "0 of 3"),
        (b"<html>Welcome</html>", "aborted:cut_off", "0 of 3"),
        (json.dumps({"error": {"message": "out of memory"}}).encode(), "aborted:error", "out of memory"),
        (json.dumps({"detail": "out of memory"}).encode(), "aborted:error", "out of memory"),
        (json.dumps(piece("all of it", "stop")).encode(), "aborted:error", "answered in one piece, without streaming"),
    ],
)
def test_what_did_not_finish_says_why(body, status, says):
    answer = answer_to(body)
    assert answer.status == status and says in answer.message


def test_a_connection_that_breaks_counts_what_had_come():
    assert answer_to(sse(piece(), end=""), broken=True).status == "aborted:connection"
    assert answer_to(b"", broken=True).status == "rejected:connection"
    assert answer_to(sse(piece(), piece("", "stop"), end=""), broken=True).status == "finished"


@given(st.lists(st.integers(0, 400), max_size=12), st.sampled_from(["\n", "\r\n", "\r"]))
@pytest.mark.slow
def test_packets_may_end_anywhere(cuts, line_end):
    text = "".join(f"data: {json.dumps(piece(word), ensure_ascii=False)}\n\n" for word in ("größer", "日本語", "🙂"))
    body = (text + f"data: {json.dumps(USAGE)}\n\n{DONE}").replace("\n", line_end).encode()
    answer = answer_to(body, cuts=[cut for cut in cuts if cut < len(body)])
    assert (answer.status, len(answer.chunk_s), answer.prompt_tokens) == ("finished", 3, 2)


def test_events_keep_their_names_and_lines():
    async def read(*blocks: bytes) -> list[Event]:
        async def source() -> AsyncIterator[bytes]:
            for block in blocks:
                yield block

        return [event async for event in events(source())]

    found = in_a_loop(read(b"event: a\r", b"\ndata: 1\r\n\r", b"\ndata\ndata: {\ndata:  }\n\n"))
    assert found == [Event("a", b"1"), Event("", b"{\n }")]
