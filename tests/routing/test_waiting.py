"""Requests that wait for a worker: in order, so many, so long."""

from __future__ import annotations

import asyncio

from tests.routing.fakes import Call, Client, FakeWorker, routed


class Held:
    """A worker's answers, given when a test says so."""

    def __init__(self) -> None:
        self.came = asyncio.Queue[Call]()

    async def __call__(self, call: Call) -> None:
        go = asyncio.Event()
        call.go = go  # type: ignore[attr-defined]
        self.came.put_nowait(call)
        await go.wait()
        await call.answer({"answers": call.asked["prompt"]})


def test_beyond_the_limit_requests_wait_in_order_and_beyond_the_queue_they_are_refused():
    async def test(client: Client) -> None:
        held = client.workers[0].does = Held()
        running = client.ask(body={"prompt": "1"})
        first = await held.came.get()
        waiting = [client.ask(body={"prompt": str(number)}) for number in (2, 3)]
        while await client.metric("waiting") < 2:
            await asyncio.sleep(0)
        refused = await client.post()
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        first.go.set()
        assert (await running.end()).json == {"answers": "1"}
        for number in (2, 3):
            call = await held.came.get()
            assert call.asked["prompt"] == str(number)
            assert len(client.workers[0].calls) == number, "one at a time"
            call.go.set()
        for answer, number in zip(waiting, (2, 3), strict=True):
            assert (await answer.end()).json == {"answers": str(number)}
        assert await client.metric("waiting") == 0

    routed(test, FakeWorker(), worker_requests=1, max_queue=2)


def test_who_waits_for_too_long_gets_a_503():
    async def test(client: Client) -> None:
        held = client.workers[0].does = Held()
        running = client.ask(body={"prompt": "1"})
        call = await held.came.get()
        waits = client.ask(body={"prompt": "2"})
        while await client.metric("waiting") < 1:
            await asyncio.sleep(0)
        client.clock.goes_on(60)
        late = await waits.end()
        assert (late.status, late.error["code"], late.headers["retry-after"]) == (503, "queue_timeout", "1")
        call.go.set()
        assert (await running.end()).status == 200
        assert len(client.workers[0].calls) == 1

    routed(test, FakeWorker(), worker_requests=1)


def test_a_client_that_goes_while_it_waits_leaves_its_place():
    async def test(client: Client) -> None:
        held = client.workers[0].does = Held()
        running = client.ask(body={"prompt": "1"})
        call = await held.came.get()
        leaves, stays = client.ask(body={"prompt": "2"}), client.ask(body={"prompt": "3"})
        while await client.metric("waiting") < 2:
            await asyncio.sleep(0)
        leaves.leave()
        await leaves.end()
        assert await client.metric("waiting") == 1
        call.go.set()
        await running.end()
        call = await held.came.get()
        assert call.asked["prompt"] == "3"
        call.go.set()
        await stays.end()
        assert await client.metric("running", client.workers[0]) == 0

    routed(test, FakeWorker(), worker_requests=1)


def test_who_can_go_to_an_idle_worker_does_not_wait_behind_who_cannot():
    async def test(client: Client) -> None:
        held = client.workers[0].does = Held()
        running = client.ask(body={"prompt": "1", "model": "a"})
        call = await held.came.get()
        waits = client.ask(body={"prompt": "2", "model": "a"})
        while await client.metric("waiting") < 1:
            await asyncio.sleep(0)
        assert (await client.post(body={"prompt": "3", "model": "b"})).status == 200
        call.go.set()
        await running.end()
        (await held.came.get()).go.set()
        await waits.end()

    routed(test, FakeWorker(models=("a",)), FakeWorker(models=("b",)), worker_requests=1)


def test_a_request_that_is_sent_again_does_not_wait_behind_others():
    async def test(client: Client) -> None:
        one, two = client.workers
        held = two.does = Held()
        failing = asyncio.Event()

        async def fails(call: Call) -> None:
            await failing.wait()
            call.die()

        one.does = fails
        again = client.ask(body={"prompt": "again"})
        while not one.calls:
            await asyncio.sleep(0)
        running = client.ask(body={"prompt": "running"})
        call = await held.came.get()
        later = client.ask(body={"prompt": "later"})
        while await client.metric("waiting") < 1:
            await asyncio.sleep(0)
        one.ill = 500
        await client.look()
        failing.set()
        while await client.metric("waiting") < 2:
            await asyncio.sleep(0)
        call.go.set()
        await running.end()
        for prompt in ("again", "later"):
            call = await held.came.get()
            assert call.asked["prompt"] == prompt
            call.go.set()
        await again.end()
        await later.end()

    routed(test, FakeWorker(), FakeWorker(), worker_requests=1, max_queue=1, health_failures=1)
