"""What goes through the router: bodies, answers, headers, keys, and clients that go or do not read."""

from __future__ import annotations

import asyncio

import pytest

from tests.routing.fakes import EVENTS, Call, Client, FakeWorker, routed

ASKED = b'{ "prompt": "h\\u00e9llo",  "max_tokens": 3, "unknown": [1.50] }'


async def three_pieces(call: Call) -> None:
    await call.begin(
        headers=[*EVENTS, ("x-own", "1"), ("x-request-id", "theirs"), ("connection", "x-hop"), ("x-hop", "1")]
    )
    for piece in (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"):
        await call.piece(piece)
    await call.end()


def test_body_path_and_query_go_through_untouched_and_so_does_the_answer():
    async def test(client: Client) -> None:
        answer = await client.post("/v1/completions?api-version=1%2F2", ASKED, x_request_id="mine", x_more="yes")
        (call,) = client.workers[0].calls
        assert (call.method, call.path, call.body) == ("POST", "/v1/completions?api-version=1%2F2", ASKED)
        assert call.headers["x-request-id"] == answer.headers["x-request-id"] == "mine"
        assert call.headers["x-more"] == "yes" and call.headers["host"] == client.workers[0].url[7:]
        assert answer.status == 200 and answer.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n" and answer.whole
        assert answer.headers["content-type"] == "text/event-stream" and answer.headers["x-own"] == "1"
        assert not {"x-hop", "connection", "transfer-encoding"} & answer.headers.keys()

    routed(test, FakeWorker(three_pieces))


def test_each_piece_is_there_before_the_next_is_written():
    turn = asyncio.Queue[bytes]

    async def test(client: Client) -> None:
        pieces = turn()

        async def as_told(call: Call) -> None:
            await call.begin()
            while piece := await pieces.get():
                await call.piece(piece)
            await call.end()

        client.workers[0].does = as_told
        answer = client.ask(body={"prompt": "x"})
        for count, piece in enumerate((b"data: a\n\n", b"data: b\n\n", b"data: c\n\n"), 1):
            pieces.put_nowait(piece)
            await answer.until(lambda count=count: len(answer.pieces) == count)
            assert answer.pieces[-1] == piece and not answer.whole
        pieces.put_nowait(b"")
        assert (await answer.end()).whole

    routed(test, FakeWorker())


def test_a_client_that_goes_closes_the_request_of_its_worker():
    async def test(client: Client) -> None:
        closed = asyncio.Event()

        async def endless(call: Call) -> None:
            await call.begin()
            await call.piece(b"data: 1\n\n")
            await call.gone()
            closed.set()

        client.workers[0].does = endless
        answer = client.ask(body={"prompt": "x"})
        await answer.until(lambda: bool(answer.pieces))
        assert await client.metric("running", client.workers[0]) == 1
        answer.leave()
        await closed.wait()
        await answer.end()
        assert await client.metric("running", client.workers[0]) == 0
        assert await client.metric("clients_gone_total") == 1
        assert await client.metric("breaker_state", client.workers[0]) == 0

    routed(test, FakeWorker(), breaker_failures=1)


def test_a_client_that_goes_before_the_first_byte_closes_it_too():
    async def test(client: Client) -> None:
        came, closed = asyncio.Event(), asyncio.Event()

        async def silent(call: Call) -> None:
            came.set()
            await call.gone()
            closed.set()

        client.workers[0].does = silent
        answer = client.ask(body={"prompt": "x"})
        await came.wait()
        answer.leave()
        await closed.wait()
        await answer.end()
        assert answer.status == 0 and len(client.workers[0].calls) == 1, "nobody is there for whom to try again"

    routed(test, FakeWorker())


def test_a_client_that_does_not_read_holds_up_its_worker_and_nobody_else():
    async def test(client: Client) -> None:
        written = 0

        async def much(call: Call) -> None:
            nonlocal written
            if call.asked["prompt"] == "short":
                await call.answer({})
                return
            await call.begin()
            for _ in range(2000):
                await call.piece(b"x" * 65536)
                written += 1
            await call.end()

        client.workers[0].does = much
        stalled = client.ask(body={"prompt": "much"}, reads=False)
        seen = -1
        while seen != written:  # until the worker is held up: sockets hold a few of its pieces
            seen = written
            for _ in range(20):
                assert (await client.post(body={"prompt": "short"})).status == 200
        assert written < 1000
        stalled.read_on()
        await stalled.end()
        assert len(stalled.body) == 2000 * 65536

    routed(test, FakeWorker())


def test_the_clients_key_is_checked_and_the_workers_own_is_sent():
    async def test(client: Client) -> None:
        refused = await client.post()
        assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        assert (await client.get("/v1/models")).status == 401
        assert (await client.get("/health")).status == (await client.get("/metrics")).status == 200
        assert (await client.post(authorization="Bearer ours")).status == 200
        (call,) = client.workers[0].calls
        assert call.headers["authorization"] == "Bearer theirs"

    routed(test, FakeWorker(), api_key="ours", worker_api_key="theirs")


@pytest.mark.parametrize(("key", "passed"), [(None, "Bearer mine"), ("mine", None)])
def test_a_key_for_the_router_goes_no_further_and_one_that_is_not_goes_on(key, passed):
    async def test(client: Client) -> None:
        assert (await client.post(authorization="Bearer mine")).status == 200
        assert client.workers[0].calls[0].headers.get("authorization") == passed

    routed(test, FakeWorker(), api_key=key)


def test_what_says_whence_a_page_came_and_what_only_routers_say_does_not_reach_a_worker():
    async def test(client: Client) -> None:
        await client.post(origin="http://localhost", sec_fetch_site="same-origin", x_workbench_room="7", te="trailers")
        assert not {"origin", "sec-fetch-site", "x-workbench-room", "te"} & client.workers[0].calls[0].headers.keys()

    routed(test, FakeWorker())


def test_a_body_that_is_too_large_or_a_bad_id_reaches_no_worker():
    async def test(client: Client) -> None:
        large = await client.post(body={"prompt": "x" * 100})
        assert (large.status, large.error["code"]) == (413, "request_too_large")
        bad = await client.post(body={}, x_request_id="two words")
        assert bad.status == 400 and "x-request-id" in bad.error["message"]
        assert client.workers[0].calls == []
        await client.front.idle.wait()

    routed(test, FakeWorker(), max_body_bytes=50)


def test_a_body_that_is_no_request_is_the_workers_to_refuse():
    async def test(client: Client) -> None:
        async def refuse(call: Call) -> None:
            await call.answer({"error": {"message": "no JSON"}}, 400)

        client.workers[0].does = refuse
        for body in (
            b"{",
            b"[1]",
            b'"x"',
            b"\xff",
            b'{"prompt": 7}',
            b'{"prompt": [[1], "x"]}',
            b'{"prompt": [99999999999]}',
        ):
            answer = await client.post(body=body)
            assert (answer.status, answer.error["message"]) == (400, "no JSON")
            assert client.workers[0].calls[-1].body == body

    routed(test, FakeWorker())


def test_a_path_that_workers_are_asked_for_one_by_one_is_refused():
    async def test(client: Client) -> None:
        for path in ("/settings", "/update_weights_from_disk", "/start_profile", "/nothing"):
            assert (await client.post(path)).status == 404
        assert (await client.get("/v1/completions/7")).status == 200, "any path below /v1 goes on"
        assert [call.path for call in client.workers[0].calls] == ["/v1/completions/7"]

    routed(test, FakeWorker())


def test_what_all_are_asked_is_done_by_all_or_said_not_to_be():
    async def test(client: Client) -> None:
        one, two = client.workers

        async def aborts(call: Call) -> None:
            await call.answer({"aborted": 2})

        one.does = two.does = aborts
        assert (await client.post("/abort", {"all": True})).json == {"aborted": 4}
        assert (await client.post("/flush_cache", b"")).json == {"status": "ok"}

        async def cannot(call: Call) -> None:
            await call.answer({"error": {"message": "no"}}, 400)

        two.does = cannot
        half = await client.post("/flush_cache", b"")
        assert half.status == 502 and half.error["message"] == "/flush_cache: not done by all: worker 1 answers 400"
        one.does = cannot
        assert (await client.post("/pause", b"")).status == 400

    routed(test, FakeWorker(), FakeWorker())


def test_models_of_all_workers_are_listed_once_and_requests_go_to_who_has_theirs():
    async def test(client: Client) -> None:
        listed = (await client.get("/v1/models")).json
        assert listed["object"] == "list" and [card["id"] for card in listed["data"]] == ["a", "b", "c"]
        assert (await client.get("/v1/models/b")).json["id"] == "b"
        missing = await client.get("/v1/models/d")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")
        for _ in range(3):
            await client.post(body={"prompt": "x", "model": "c"})
        assert [len(worker.calls) for worker in client.workers] == [0, 3]
        await client.post(body={"prompt": "x", "model": "d"})
        assert len(client.workers[0].calls) == 1, "that nobody has it is said by a worker"

    routed(test, FakeWorker(models=("a", "b")), FakeWorker(models=("b", "c")))
