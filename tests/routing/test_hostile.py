"""What clients, workers and those who add workers may write: never a traceback, and never another's harm."""

from __future__ import annotations

import asyncio

import pytest

from tests.routing.fakes import JSON, Call, Client, FakeWorker, routed
from tests.routing.test_pairs import half
from workbench.routing.admin import TO_ALL
from workbench.routing.headers import to_client
from workbench.routing.route_settings import parse_url
from workbench.scheduler.settings import ConfigError


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../settings",
        "/v1/./x",
        "/v1/..",
        "/v1/..\\settings",
        "/v1/a/../../update_weights_from_disk",
        "/v1/models/../..",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(path):
    async def test(client: Client) -> None:
        answer = await client.ask(path, {"prompt": "x"}).end()
        assert answer.status == 400 and "." in answer.error["message"]
        assert not client.workers[0].calls
        assert (await client.post("/v1/.well-known/x...y")).status == 200

    routed(test, FakeWorker())


@pytest.mark.parametrize("value", ["a\nb", "a\r\nx-evil: 1", "a\x00b"])
def test_what_http_cannot_carry_is_the_clients_fault_and_no_workers(value):
    async def test(client: Client) -> None:
        for _ in range(3):
            answer = await client.post(x_note=value)
            assert answer.status == 400 and "cannot be sent" in answer.error["message"]
        assert not client.workers[0].calls
        state = await client.state_of(client.workers[0])
        assert (state["breaker"], state["running"], state["state"]) == ("closed", 0, "healthy")
        assert await client.metric("retries_total") == 0
        assert (await client.post()).status == 200

    routed(test, FakeWorker(), breaker_failures=1)


@pytest.mark.parametrize("name", TO_ALL)
def test_nor_is_it_of_all_workers_where_all_are_asked(name):
    async def test(client: Client) -> None:
        answer = await client.ask(f"/{name}", {}, x_note="a\nb").end()
        assert answer.status == 400 and "cannot be sent" in answer.error["message"]
        assert not any(worker.calls for worker in client.workers)
        assert (await client.post()).status == 200

    routed(test, FakeWorker(), FakeWorker())


@pytest.mark.parametrize("body", [b"", b"null", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_a_worker_answers_that_is_no_object_says_nothing(body):
    async def answers(call: Call) -> None:
        await call.begin(headers=[*JSON, ("content-length", str(len(body)))])
        await call.piece(body)
        await call.end()

    async def test(client: Client) -> None:
        assert (await client.post("/abort", {})).json == {"aborted": 0}

    routed(test, FakeWorker(answers))


def test_it_is_no_pairs_either_and_both_halves_are_free_again():
    async def test(client: Client) -> None:
        answer = await client.post(x_note="a\nb")
        assert answer.status == 400 and "cannot be sent" in answer.error["message"]
        for worker in client.workers:
            state = await client.state_of(worker)
            assert (state["breaker"], state["running"]) == ("closed", 0)

    routed(test, half("prefill"), half("decode"), prefills=1, breaker_failures=1)


@pytest.mark.parametrize("peer", [None, "", "nowhere", 5, "127.0.0.1:1\r\nx-evil: 1", "127.0.0.1:99999"])
def test_half_a_pair_that_does_not_say_where_it_can_be_met_is_refused(peer):
    async def test(client: Client) -> None:
        more = half("decode")
        await more.start()
        more.info["peer"] = peer
        answer = await client.ask("/workers", {"url": more.url, "role": "decode"}).end()
        assert answer.status == 400 and "does not say where" in answer.error["message"]
        assert len((await client.get("/workers")).json["workers"]) == 2
        await more.stop()

    routed(test, half("prefill"), half("decode"), prefills=1)


@pytest.mark.parametrize("status", [600, 999])
def test_a_status_that_is_none_is_no_answer(status):
    async def answers(call: Call) -> None:
        await call.raw(b"HTTP/1.1 %d What\r\ncontent-length: 0\r\n\r\n" % status)

    async def test(client: Client) -> None:
        answer = await client.post()
        assert answer.status == 502 and f"status {status}" in answer.error["message"]

    routed(test, FakeWorker(answers))


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_is_whole(status):
    async def answers(call: Call) -> None:
        await call.raw(b"HTTP/1.1 %d No\r\n\r\n" % status)

    async def test(client: Client) -> None:
        for _ in range(2):  # on one connection
            answer = await client.post()
            assert (answer.status, answer.body, answer.whole) == (status, b"", True)
        assert (await client.state_of(client.workers[0]))["running"] == 0

    routed(test, FakeWorker(answers))


def test_a_length_beside_chunks_is_not_passed_on():
    given = [(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked"), (b"x", b"y")]
    assert to_client(given) == [(b"x", b"y")]
    assert to_client(given[:1]) == [(b"content-length", b"5")]


@pytest.mark.parametrize("host", ["a" * 64, "a..b", ".", "a." + "b" * 70])
def test_a_name_that_no_host_has_is_no_url(host):
    with pytest.raises(ConfigError, match="no such host"):
        parse_url("worker", f"http://{host}:80")


def test_urls_of_all_kinds_stay_as_they_are():
    for url in ("http://[::1]:8000", "https://x.example./prefix", "http://" + "a" * 63 + ".example:1/a/b"):
        assert parse_url("worker", url) == url


@pytest.mark.parametrize("key", ["", "a\r\nx-evil: 1", "é", " a"])
def test_a_workers_key_that_no_header_carries_is_refused(key):
    async def test(client: Client) -> None:
        answer = await client.ask("/workers", {"url": "http://127.0.0.1:9", "api_key": key}).end()
        assert answer.status == 400 and answer.error["param"] == "api_key"
        assert len((await client.get("/workers")).json["workers"]) == 1

    routed(test, FakeWorker())


def test_a_worker_that_is_removed_while_it_is_looked_at_stays_removed():
    async def test(client: Client) -> None:
        looked, goes_on = asyncio.Event(), asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            looked.set()
            await goes_on.wait()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        adding = client.ask("/workers", {"url": url})
        await looked.wait()
        assert (await client.ask(f"/workers/{url}", method="DELETE").end()).status == 200
        goes_on.set()
        answer = await adding.end()
        assert (answer.status, answer.error["code"]) == (409, "worker_removed")
        assert len((await client.get("/workers")).json["workers"]) == 1
        assert set(client.front.health._tasks) == {0}, "somebody still looks at it"
        server.close()

    routed(test, FakeWorker())


def test_places_are_given_back_whoever_goes_at_whatever_moment():
    """Clients that wait, are served or are being answered go in any order: in the end nothing is counted as under way."""

    async def test(client: Client) -> None:
        for round_ in range(6):
            answers = [client.ask(body={"prompt": f"{i}"}) for i in range(12)]
            for i, answer in enumerate(answers):
                for _ in range((i * 7 + round_ * 3) % 11):
                    await asyncio.sleep(0)
                if (i + round_) % 3:
                    answer.leave()
            for answer in answers:
                await answer.end()
        assert client.front.dispatch.room.waiting == 0
        for worker in client.workers:
            assert (await client.state_of(worker))["running"] == 0
        assert (await client.post()).status == 200

    routed(test, FakeWorker(), FakeWorker(), worker_requests=2)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "x", "model": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"model": "\\ud800", "prompt": "\\ud800", "session_id": "\\ud800", "cache_salt": "\\ud800"}',
        b'{"model": "\xff", "prompt": "\xff"}',
        b'{"prompt": [1e400, 99999999999999999999999999, -1]}',
        b'{"prompt": [[1, 2], "x", null]}',
        b'{"messages": 5, "input": {"a": NaN}}',
        b"\xef\xbb\xbf[]",
        b"",
    ],
    ids=range(9),
)
@pytest.mark.parametrize("router", ["round_robin", "cache_aware", "least_tokens", "expected_ttft"])
def test_a_body_of_any_kind_reaches_a_worker_as_it_is_and_nothing_stays_open(body, router):
    async def test(client: Client) -> None:
        for _ in range(2):
            assert (await client.ask(body=body).end()).status == 200
        assert [call.body for call in client.workers[0].calls] == [body, body]
        assert client.front.idle.is_set()

    routed(test, FakeWorker(), router=router)


def test_who_waits_gets_a_worker_whose_breaker_is_half_open_by_now_though_nobody_else_comes_or_goes():
    async def hangs(call: Call) -> None:
        await call.gone()

    async def breaks_once(call: Call) -> None:
        await call.answer({}, 500 if len(broken.calls) == 1 else 200)

    broken = FakeWorker(breaks_once)

    async def test(client: Client) -> None:
        first = client.ask(body={"prompt": "x"})  # fails there, and hangs at the other
        while len(client.workers[1].calls) < 1:
            await asyncio.sleep(0)
        second = client.ask(body={"prompt": "y"})
        while client.front.dispatch.room.waiting < 1:
            await asyncio.sleep(0)
        client.clock.goes_on(31)
        await client.look()
        assert (await second.end()).status == 200
        assert len(broken.calls) == 2
        first.leave()
        await first.end()

    routed(test, broken, FakeWorker(hangs), worker_requests=1, breaker_failures=1)
