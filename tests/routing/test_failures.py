"""Workers that refuse, hang, die or answer with errors: who is tried next, when a breaker opens, and what a client gets."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.routing.fakes import EVENTS, JSON, Answer, Call, Client, FakeWorker, Handler, routed


async def dies(call: Call) -> None:
    call.die()


async def error_500(call: Call) -> None:
    await call.answer({"error": {"message": "broken"}}, 500)


async def error_503(call: Call) -> None:
    await call.answer({"error": {"message": "full", "code": "overloaded"}}, 503, [("retry-after", "7")])


async def slow_headers(call: Call) -> None:
    await call.raw(b"HTTP/1.1 200 OK\r\nx-slow: ")
    await call.gone()


async def hangs(call: Call) -> None:
    await call.gone()


async def dies_after_the_headers(call: Call) -> None:
    await call.begin()
    call.die()


async def dies_within_json(call: Call) -> None:
    await call.begin(headers=[*JSON, ("content-length", "100")])
    await call.piece(b'{"half": ')
    call.die()


async def no_http(call: Call) -> None:
    await call.raw(b"SSH-2.0-OpenSSH\r\n\r\n")


async def late(client: Client, fault: Handler, answer: Answer, tries: int = 1) -> Answer:
    """Let the time for a first byte pass where a worker lets it."""
    if fault in (slow_headers, hangs):
        while sum(len(worker.calls) for worker in client.workers) < tries:
            await asyncio.sleep(0)
        client.clock.goes_on(600)
    return answer


FAULTS = [dies, error_500, slow_headers, hangs, dies_after_the_headers, dies_within_json, no_http]


@pytest.mark.parametrize("fault", [*FAULTS, error_503], ids=lambda fault: fault.__name__)
def test_before_the_first_byte_another_worker_is_tried_and_the_client_does_not_notice(fault):
    async def test(client: Client) -> None:
        bad, good = client.workers
        answer = await (await late(client, fault, client.ask(body={"prompt": "x"}, x_request_id="same"))).end()
        assert (answer.status, answer.json) == (200, {"by": good.name})
        assert [call.headers["x-request-id"] for call in (*bad.calls, *good.calls)] == ["same", "same"]
        assert bad.calls[0].body == good.calls[0].body
        assert await client.metric("retries_total", bad) == 1
        assert await client.metric("running", bad) == await client.metric("running", good) == 0

    routed(test, FakeWorker(fault), FakeWorker())


def test_a_worker_that_is_gone_is_passed_over():
    async def test(client: Client) -> None:
        bad, good = client.workers
        await bad.stop()
        assert (await client.post()).json == {"by": good.name}
        assert await client.metric("answers_total", bad, status="none") == 1

    routed(test, FakeWorker(), FakeWorker())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_when_nobody_can_answer_the_client_gets_one_clear_error(fault):
    async def test(client: Client) -> None:
        answer = client.ask(body={"prompt": "x"})
        for tries in (1, 2, 3):
            await late(client, fault, answer, tries)
        await answer.end()
        if fault is error_500:
            assert (answer.status, answer.error) == (500, {"message": "broken"}), "the worker's own"
        else:
            assert answer.status == 502 and answer.error["code"] == "worker_failed"
            assert answer.error["message"].startswith("worker ")
        # An answer is an answer: nobody is asked for a better one twice. Who gave none is, when there is no other.
        assert sum(len(worker.calls) for worker in client.workers) == (2 if fault is error_500 else 3)

    routed(test, FakeWorker(fault), FakeWorker(fault))


def test_overload_of_all_is_passed_on_with_its_retry_after():
    async def test(client: Client) -> None:
        answer = await client.post()
        assert (answer.status, answer.headers["retry-after"], answer.error["code"]) == (503, "7", "overloaded")
        assert [len(worker.calls) for worker in client.workers] == [1, 1], "nobody is asked twice"
        for worker in client.workers:
            assert await client.metric("breaker_state", worker) == 0, "to be full is no fault"

    routed(test, FakeWorker(error_503), FakeWorker(error_503), breaker_failures=1)


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422])
def test_what_is_wrong_with_a_request_is_said_once(status):
    async def test(client: Client) -> None:
        async def refuse(call: Call) -> None:
            await call.answer({"error": {"message": "yours"}}, status)

        client.workers[0].does = client.workers[1].does = refuse
        assert (await client.post()).status == status
        assert sum(len(worker.calls) for worker in client.workers) == 1
        assert await client.metric("breaker_state", client.workers[0]) == 0

    routed(test, FakeWorker(), FakeWorker(), breaker_failures=1)


def test_without_retries_the_first_failure_is_the_answer():
    async def test(client: Client) -> None:
        assert (await client.post()).status == 502
        assert [len(worker.calls) for worker in client.workers] == [1, 0]

    routed(test, FakeWorker(dies), FakeWorker(), retries=0)


def test_an_only_worker_is_tried_again_for_it_may_just_have_closed_an_idle_connection():
    async def test(client: Client) -> None:
        (worker,) = client.workers
        works = worker.does

        async def once(call: Call) -> None:
            worker.does = works
            call.die()

        worker.does = once
        assert (await client.post()).status == 200
        assert len(worker.calls) == 2

    routed(test, FakeWorker())


@pytest.mark.parametrize("cut", [b"data: 1\n\n", b'data: {"half": '])
def test_a_stream_whose_worker_dies_ends_with_an_error_and_is_not_begun_again(cut):
    async def test(client: Client) -> None:
        async def dies_within(call: Call) -> None:
            await call.begin()
            await call.piece(cut)
            call.die()

        for worker in client.workers:
            worker.does = dies_within
        answer = await client.post()
        assert answer.status == 200 and answer.whole
        assert answer.body.startswith(cut)
        event = answer.body.removeprefix(cut).strip()
        said = json.loads(event.removeprefix(b"data: "))["error"]
        assert said["code"] == "worker_failed" and "ended in the middle of its answer" in said["message"]
        assert answer.body.endswith(b"\n\n") and b"\n\ndata: {" in answer.body
        assert sum(len(worker.calls) for worker in client.workers) == 1
        assert await client.metric("cut_off_total", client.workers[0]) == 1

    routed(test, FakeWorker(), FakeWorker())


def test_an_answer_of_another_kind_whose_worker_dies_is_left_without_its_end():
    async def test(client: Client) -> None:
        async def dies_within(call: Call) -> None:
            await call.begin(headers=[("content-type", "application/octet-stream"), ("content-length", "9")])
            await call.piece(b"1234")
            call.die()

        client.workers[0].does = dies_within
        answer = await client.post()
        assert answer.body == b"1234" and not answer.whole

    routed(test, FakeWorker())


@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_without_a_length_ends_where_the_connection_is_closed_and_not_where_it_is_cut(cut):
    async def test(client: Client) -> None:
        async def old(call: Call) -> None:
            await call.raw(b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nhello")
            answer = answers[-1]
            await answer.until(lambda: bool(answer.pieces))
            if cut:
                call.reset()
            else:
                call.close()

        client.workers[0].does = old
        answers = [client.ask(body={"prompt": "x"})]
        answer = await answers[0].end()
        assert answer.body == b"hello" and answer.whole is not cut

    routed(test, FakeWorker())


def test_a_silent_stream_is_given_up():
    async def test(client: Client) -> None:
        async def falls_silent(call: Call) -> None:
            await call.begin()
            await call.piece(b"data: 1\n\n")
            await call.gone()

        client.workers[0].does = falls_silent
        answer = client.ask(body={"prompt": "x"})
        await answer.until(lambda: bool(answer.pieces))
        client.clock.goes_on(60)
        await answer.end()
        assert b"silent for 60 s" in answer.body and answer.whole

    routed(test, FakeWorker(), silence_timeout_s=60)


def test_a_breaker_opens_after_failures_in_a_row_and_closes_when_the_worker_answers_again():
    async def test(client: Client) -> None:
        bad, good = client.workers
        for _ in range(6):
            assert (await client.post()).status == 200
        assert len(bad.calls) == 3, "then it got nothing more"
        assert (await client.state_of(bad))["breaker"] == "open"
        assert await client.metric("breaker_state", bad) == 1
        assert await client.metric("breaker_changes_total", bad, state="open") == 1
        client.clock.goes_on(29)
        await client.post()
        assert len(bad.calls) == 3
        client.clock.goes_on(1)
        assert await client.metric("breaker_state", bad) == 2
        for _ in range(2):
            await client.post()
        assert len(bad.calls) == 4, "one was tried, and failed"
        assert await client.metric("breaker_changes_total", bad, state="open") == 2
        bad.does = good.does
        client.clock.goes_on(30)
        for _ in range(4):
            await client.post()
        assert await client.metric("breaker_state", bad) == 0
        assert await client.metric("breaker_changes_total", bad, state="closed") == 1
        assert client.said == [
            f"note: the breaker of worker {bad.url} is {state}" for state in ("open", "open", "closed")
        ]

    routed(test, FakeWorker(error_500), FakeWorker(), breaker_failures=3, breaker_open_s=30.0, breaker_successes=2)


def test_half_open_one_request_at_a_time_is_tried():
    async def test(client: Client) -> None:
        (worker,) = client.workers
        assert (await client.post()).status == 500
        refused = await client.post()
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "no_worker", "5")
        assert (await client.get("/health")).status == 503
        client.clock.goes_on(30)
        come, go = asyncio.Event(), asyncio.Event()

        async def waits(call: Call) -> None:
            come.set()
            await go.wait()
            await call.answer({})

        worker.does = waits
        tried = client.ask(body={"prompt": "x"})
        await come.wait()
        assert (await client.post()).status == 503
        go.set()
        assert (await tried.end()).status == 200
        assert await client.metric("breaker_state", worker) == 0

    routed(test, FakeWorker(error_500), retries=0, breaker_failures=1, breaker_open_s=30.0, breaker_successes=1)


def test_looks_at_health_take_a_worker_out_and_bring_it_back():
    async def test(client: Client) -> None:
        one, two = client.workers
        one.ill = 503
        await client.look()
        await client.look()
        await client.post()
        assert len(one.calls) == 1, "not ill for long enough"
        await client.look()
        for _ in range(3):
            await client.post()
        assert (len(one.calls), len(two.calls)) == (1, 3)
        state = await client.state_of(one)
        assert (state["state"], state["why"]) == ("unhealthy", "/health answers 503")
        assert await client.metric("healthy", one) == 0
        one.ill = None
        await client.look()
        await client.post()
        assert len(one.calls) == 2
        assert client.said == [
            f"warning: worker {one.url} gets nothing new: /health answers 503",
            f"note: worker {one.url} is well again",
        ]

    routed(test, FakeWorker(), FakeWorker(), health_failures=3)


def test_a_worker_that_does_not_answer_looks_is_ill():
    async def test(client: Client) -> None:
        (worker,) = client.workers
        worker.hangs, looks = True, worker.looks
        look = asyncio.create_task(client.look())
        while worker.looks == looks:
            await asyncio.sleep(0)
        client.clock.goes_on(5)
        await look
        assert (await client.state_of(worker))["why"] == "no answer within 5 s"
        assert (await client.post()).error["code"] == "no_worker"

    routed(test, FakeWorker(), health_failures=1)


def test_a_failed_request_has_its_worker_looked_at_at_once():
    async def test(client: Client) -> None:
        bad, _ = client.workers
        looks = bad.looks
        await client.post()
        while bad.looks == looks:
            await asyncio.sleep(0)

    routed(test, FakeWorker(dies), FakeWorker())


def test_a_worker_that_is_not_there_yet_gets_requests_once_it_is():
    async def test(client: Client) -> None:
        (worker,) = client.workers
        assert (await client.get("/health")).status == 503
        assert (await client.post()).error["code"] == "no_worker"
        await worker.start()
        await client.look()
        assert (await client.get("/health")).json == {"status": "ok", "workers": 1}
        assert (await client.post()).status == 200

    routed(test, FakeWorker(), down=(0,))


def test_streams_of_before_say_nothing_about_a_breaker_that_has_opened_since():
    async def test(client: Client) -> None:
        (worker,) = client.workers
        begun, go = asyncio.Event(), asyncio.Event()

        async def long(call: Call) -> None:
            await call.begin(headers=EVENTS)
            await call.piece(b"data: 1\n\n")
            begun.set()
            await go.wait()
            await call.end()

        worker.does = long
        stream = client.ask(body={"prompt": "x"})
        await begun.wait()
        worker.does = error_500
        await client.post()
        client.clock.goes_on(30)
        assert await client.metric("breaker_state", worker) == 2
        go.set()
        await stream.end()
        assert await client.metric("breaker_state", worker) == 2

    routed(test, FakeWorker(), retries=0, breaker_failures=1, breaker_successes=1)
