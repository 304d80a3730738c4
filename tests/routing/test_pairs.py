"""Pairs: both halves of a request, what becomes of one when the other fails, and which pair is chosen."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from tests.event_loop import in_a_loop
from tests.routing.fakes import Answer, Call, Client, FakeWorker, routed
from workbench.cluster.pairs import RETRIED
from workbench.routing.clocks import Clocks
from workbench.routing.front import Front
from workbench.routing.route_settings import RouteSettings
from workbench.scheduler.settings import ConfigError

HEADERS = ("x-workbench-room", "x-workbench-peer", "x-workbench-router")
HANDED_OVER = {"object": "handover", "status": "handed_over"}


def half(role: str, **info: Any) -> FakeWorker:
    """A worker of a role, which does its half at once unless told otherwise."""

    async def prefills(call: Call) -> None:
        await call.answer(HANDED_OVER)

    async def decodes(call: Call) -> None:
        await call.answer({"by": worker.name})

    worker = FakeWorker(prefills if role == "prefill" else decodes)
    alike = {"model": "m", "page_size": 16, "kv_dtype": "bf16"}
    worker.info = {"role": role, "peer": "127.0.0.1:7099", **alike, **info}
    return worker


def paired(test: Any, prefill: list[FakeWorker], decode: list[FakeWorker], **settings: Any) -> None:
    for number, worker in enumerate((*prefill, *decode)):
        assert worker.info is not None
        worker.info["peer"] = f"127.0.0.1:{7000 + number}"
    routed(test, *prefill, *decode, prefills=len(prefill), **settings)


def rejects(status: int, code: str) -> Any:
    async def does(call: Call) -> None:
        await call.answer({"error": {"message": code, "code": code}}, status)

    return does


async def waits(call: Call) -> None:
    await call.gone()


def test_both_halves_get_the_request_and_where_the_other_is():
    async def test(client: Client) -> None:
        one, two = client.workers
        body = b'{"prompt":  [1, 2]}'
        answer = await client.post("/v1/chat/completions", body, x_request_id="mine", x_workbench_room="5")
        assert (answer.status, answer.json, answer.headers["x-request-id"]) == (200, {"by": two.name}, "mine")
        (prefilled,), (decoded,) = one.calls, two.calls
        for call in (prefilled, decoded):
            assert (call.path, call.body, call.headers["x-request-id"]) == ("/v1/chat/completions", body, "mine")
        room, _, router = (prefilled.headers[name] for name in HEADERS)
        assert (decoded.headers["x-workbench-room"], decoded.headers["x-workbench-router"]) == (room, router)
        assert re.fullmatch(r"\d+", room) and 0 <= int(room) < 2**47 and room != "5"
        assert prefilled.headers["x-workbench-peer"] == "127.0.0.1:7001"
        assert decoded.headers["x-workbench-peer"] == "127.0.0.1:7000"
        await client.post()
        assert len({call.headers["x-workbench-room"] for call in one.calls}) == 2
        assert await client.metric("answers_total", one, role="prefill", status="200") == 2
        assert await client.metric("answers_total", two, role="decode", status="200") == 2
        assert await client.metric("running", one) == await client.metric("running", two) == 0

    paired(test, [half("prefill")], [half("decode")])


def test_the_answer_streams_while_the_other_half_is_open():
    async def test(client: Client) -> None:
        one, two = client.workers
        go, over = asyncio.Event(), asyncio.Event()

        async def slow_to_say(call: Call) -> None:
            await go.wait()
            await call.answer(HANDED_OVER)
            over.set()

        async def streams(call: Call) -> None:
            await call.begin()
            await call.piece(b"data: 1\n\n")
            await over.wait()
            await call.piece(b"data: 2\n\n")
            await call.end()

        one.does, two.does = slow_to_say, streams
        answer = client.ask(body={"prompt": "x"})
        await answer.until(lambda: bool(answer.pieces))
        assert await client.metric("running", one) == 1
        go.set()
        assert (await answer.end()).body == b"data: 1\n\ndata: 2\n\n"

    paired(test, [half("prefill")], [half("decode")])


def test_a_prefill_half_that_says_so_last_is_waited_for():
    async def test(client: Client) -> None:
        one, two = client.workers
        go = asyncio.Event()

        async def last(call: Call) -> None:
            await go.wait()
            await call.answer(HANDED_OVER)

        one.does = last
        answer = client.ask(body={"prompt": "x"})
        await answer.until(lambda: answer.whole)
        answer.leave()  # as every client does whose answer is whole
        assert answer.json == {"by": two.name}
        assert await client.metric("running", one) == 1
        go.set()
        await answer.end()
        assert await client.metric("answers_total", one, status="200") == 1
        assert await client.metric("running", one) == await client.metric("clients_gone_total") == 0

    paired(test, [half("prefill")], [half("decode")])


@pytest.mark.parametrize(("status", "code"), [(400, "invalid_value"), (404, "model_not_found"), (503, "overloaded")])
def test_an_error_of_the_prefill_half_is_the_answer_and_ends_the_other(status, code):
    async def test(client: Client) -> None:
        closed = asyncio.Event()

        async def until_closed(call: Call) -> None:
            await call.gone()
            closed.set()

        client.workers[0].does, client.workers[1].does = rejects(status, code), until_closed
        answer = await client.post()
        assert (answer.status, answer.error["code"]) == (status, code)
        await closed.wait()
        assert [await client.metric("running", worker) for worker in client.workers] == [0, 0]

    paired(test, [half("prefill")], [half("decode")])


def test_an_error_of_the_decode_half_is_the_answer_and_ends_the_other():
    async def test(client: Client) -> None:
        closed = asyncio.Event()

        async def until_closed(call: Call) -> None:
            await call.gone()
            closed.set()

        client.workers[0].does, client.workers[1].does = until_closed, rejects(409, "duplicate_room")
        assert (await client.post()).status == 409
        await closed.wait()

    paired(test, [half("prefill")], [half("decode")])


def test_a_client_that_goes_ends_both_halves():
    async def test(client: Client) -> None:
        closed = []

        async def until_closed(call: Call) -> None:
            await call.gone()
            closed.append(call)

        client.workers[0].does = client.workers[1].does = until_closed
        answer = client.ask(body={"prompt": "x"})
        while not all(worker.calls for worker in client.workers):
            await asyncio.sleep(0)
        answer.leave()
        while len(closed) < 2:
            await asyncio.sleep(0)
        await answer.end()
        assert [await client.metric("running", worker) for worker in client.workers] == [0, 0]

    paired(test, [half("prefill")], [half("decode")])


@pytest.mark.parametrize("code", sorted(RETRIED))
def test_what_a_pair_lost_is_sent_once_more_to_another_pair(code):
    async def test(client: Client) -> None:
        _, _, bad, good = client.workers
        bad.does = rejects(503, code)
        answer = await client.post()
        assert (answer.status, answer.json) == (200, {"by": good.name})
        first, second = bad.calls[0].headers, good.calls[0].headers
        assert first["x-workbench-room"] != second["x-workbench-room"]
        assert await client.metric("breaker_state", bad) == 0
        good.does = bad.does
        lost = await client.post()
        assert (lost.status, lost.error["code"]) == (503, code)
        assert len(bad.calls) + len(good.calls) == 4, "once more, and not again"

    paired(test, [half("prefill"), half("prefill")], [half("decode"), half("decode")], breaker_failures=1)


def test_with_one_decode_worker_another_prefill_worker_is_chosen():
    async def test(client: Client) -> None:
        one, two, decode = client.workers
        answers = iter((rejects(503, "transfer_failed"), decode.does))

        async def first_fails(call: Call) -> None:
            await next(answers)(call)

        decode.does = first_fails
        assert (await client.post()).status == 200
        assert [len(worker.calls) for worker in (one, two, decode)] == [1, 1, 2]

    paired(test, [half("prefill"), half("prefill")], [half("decode")])


def test_a_prefill_worker_that_cannot_be_reached_is_passed_over():
    async def test(client: Client) -> None:
        gone, good, decode = client.workers
        answers = iter((waits, decode.does))

        async def first_waits(call: Call) -> None:
            await next(answers)(call)

        decode.does = first_waits
        await gone.stop()
        assert (await client.post()).status == 200
        assert len(good.calls) == 1
        assert await client.metric("answers_total", gone, role="prefill", status="none") == 1

    paired(test, [half("prefill"), half("prefill")], [half("decode")])


def test_a_decode_worker_that_dies_after_the_first_byte_ends_the_stream_with_an_error():
    async def test(client: Client) -> None:
        async def dies_within(call: Call) -> None:
            await call.begin()
            await call.piece(b"data: 1\n\n")
            call.die()

        client.workers[1].does = dies_within
        answer = await client.post()
        assert answer.body.startswith(b"data: 1\n\ndata: {") and b"worker_failed" in answer.body and answer.whole

    paired(test, [half("prefill")], [half("decode")])


def test_without_a_worker_of_either_role_nothing_is_sent():
    async def test(client: Client) -> None:
        one, two = client.workers
        two.ill = 500
        await client.look()
        refused = await client.post()
        assert (refused.status, refused.error["code"]) == (503, "no_worker")
        assert refused.error["message"] == "no decode worker can take requests now"
        assert one.calls == [] and (await client.get("/health")).status == 503

    paired(test, [half("prefill")], [half("decode")], health_failures=1)


def test_a_session_stays_with_its_pair_until_that_loses_it():
    async def test(client: Client) -> None:
        async def turn() -> Answer:
            return await client.post(x_session_id="talk")

        first = await turn()
        for _ in range(3):
            assert (await turn()).json == first.json
        used = [worker for worker in client.workers if worker.calls]
        assert [len(worker.calls) for worker in used] == [4, 4]
        used[1].does = rejects(503, "transfer_failed")
        assert (await turn()).json != first.json
        assert (await turn()).json != first.json and len(used[1].calls) == 5

    paired(test, [half("prefill"), half("prefill")], [half("decode"), half("decode")])


def test_what_no_pair_answers_is_refused():
    async def test(client: Client) -> None:
        for path in ("/open_session", "/tokenize", "/v1/embeddings"):
            assert (await client.post(path)).status == 404
        assert [worker.calls for worker in client.workers] == [[], []]

    paired(test, [half("prefill")], [half("decode")])


def foreign() -> FakeWorker:
    return FakeWorker()


def whole() -> FakeWorker:
    return half("both")


@pytest.mark.parametrize(
    ("prefill", "decode", "said"),
    [
        (foreign, lambda: half("decode"), "prefill: {0} is no workbench server, and only these hand KV to each other"),
        (lambda: half("prefill"), foreign, "decode: {1} is no workbench server, and only these hand KV to each other"),
        (whole, lambda: half("decode"), "prefill: {0} does both halves of a request, and was given as --prefill"),
        (
            lambda: half("decode"),
            lambda: half("decode"),
            "prefill: {0} has the role decode, and was given as --prefill",
        ),
        (
            lambda: half("prefill"),
            lambda: half("prefill"),
            "decode: {1} has the role prefill, and was given as --decode",
        ),
        (lambda: half("prefill"), lambda: half("decode", page_size=1), "decode: {1} page_size is 1, and 16 at {0}"),
        (lambda: half("prefill"), lambda: half("decode", model="n"), "decode: {1} model is 'n', and 'm' at {0}"),
        (
            lambda: half("prefill"),
            lambda: half("decode", kv_dtype="fp8"),
            "decode: {1} kv_dtype is 'fp8', and 'bf16' at",
        ),
    ],
)
def test_a_pair_that_cannot_work_is_refused_in_one_line_before_anything_is_sent(prefill, decode, said):
    async def run() -> None:
        workers = prefill(), decode()
        for worker in workers:
            await worker.start()
        urls = [worker.url for worker in workers]
        front = Front(RouteSettings(prefill=(urls[0],), decode=(urls[1],)), clocks=Clocks(), say=lambda line: None)
        with pytest.raises(ConfigError) as refused:
            await front.start()
        assert str(refused.value).startswith(said.format(*urls))
        await front.close()
        for worker in workers:
            assert worker.calls == []
            await worker.stop()

    in_a_loop(run())


def test_half_a_pair_that_is_added_is_held_to_the_others():
    async def test(client: Client) -> None:
        async def added(worker: FakeWorker, role: str) -> Answer:
            await worker.start()
            answer = await client.post("/workers", {"url": worker.url, "role": role})
            if answer.status != 201:
                await worker.stop()
            return answer

        assert "no workbench server" in (await added(foreign(), "decode")).error["message"]
        assert "page_size is 1" in (await added(half("decode", page_size=1), "decode")).error["message"]
        assert "is not one of prefill, decode" in (await added(foreign(), "both")).error["message"]
        more = half("decode", peer="127.0.0.1:7009")
        assert (await added(more, "decode")).json["role"] == "decode"
        for _ in range(2):
            assert (await client.post()).status == 200
        assert len(more.calls) == 1
        assert client.workers[0].calls[1].headers["x-workbench-peer"] == "127.0.0.1:7009"
        await more.stop()

    paired(test, [half("prefill")], [half("decode")])


def test_one_that_comes_late_and_is_another_does_not_turn_the_others_out():
    async def test(client: Client) -> None:
        late, *others = client.workers
        await late.start()
        await client.look()
        assert (await client.state_of(late))["state"] == "refused"
        assert (await client.post()).status == 200 and late.calls == []
        for worker in others:  # all become what the late one is, one after the other
            worker.info = {**(worker.info or {}), "model": "n"}
            await client.look()
            await client.look()
        assert {each["state"] for each in (await client.get("/workers")).json["workers"]} == {"healthy"}
        for _ in range(2):
            assert (await client.post()).status == 200
        assert len(late.calls) == 1

    paired(test, [half("prefill", model="n"), half("prefill")], [half("decode")], down=(0,))


def test_a_worker_that_does_not_say_what_it_is_is_not_well():
    async def test(client: Client) -> None:
        worker = client.workers[1]
        worker.info_status = 401
        await client.look()
        state = await client.state_of(worker)
        assert (state["state"], state["why"]) == ("unhealthy", "/server_info answers 401")
        worker.info_status = 200
        await client.look()
        assert (await client.post()).status == 200

    paired(test, [half("prefill")], [half("decode")], health_failures=1)


def test_one_that_comes_back_as_something_else_gets_nothing():
    async def test(client: Client) -> None:
        worker = client.workers[1]
        worker.info = {**(worker.info or {}), "model": "other"}
        await client.look()
        assert (await client.post()).error["code"] == "no_worker"
        assert (await client.state_of(worker))["state"] == "refused"
        assert client.said[-1].endswith(f"cannot be used: model is 'other', and 'm' at {client.workers[0].url}")

    paired(test, [half("prefill")], [half("decode")])
