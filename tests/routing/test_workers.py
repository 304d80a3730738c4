"""Workers that are added and removed while the router runs, and who may do so."""

from __future__ import annotations

import asyncio

import pytest

from tests.routing.fakes import Call, Client, FakeWorker, routed


def test_a_worker_that_is_added_gets_requests_and_one_that_is_removed_none():
    async def test(client: Client) -> None:
        one, two = client.workers[0], FakeWorker()
        await two.start()
        added = await client.post("/workers", {"url": f"{two.url}/v1/"})
        assert added.status == 201
        assert added.json == {
            "id": "1",
            "url": two.url,
            "role": "both",
            "state": "healthy",
            "breaker": "closed",
            "running": 0,
            "models": ["m"],
            "why": None,
        }
        assert [(await client.post()).json["by"] for _ in range(4)] == [one.name, two.name] * 2
        assert [each["id"] for each in (await client.get("/workers")).json["workers"]] == ["0", "1"]
        assert (await client.ask(f"/workers/{one.url}", method="DELETE").end()).json["state"] == "draining"
        assert [(await client.post()).json["by"] for _ in range(2)] == [two.name] * 2
        assert [each["url"] for each in (await client.get("/workers")).json["workers"]] == [two.url]
        assert (await client.ask("/workers/1", method="DELETE").end()).status == 200
        assert (await client.post()).error["code"] == "no_worker"
        again = await client.post("/workers", {"url": one.url})
        assert again.json["id"] == "2", "ids are not used again"
        assert (await client.post()).json == {"by": one.name}
        await two.stop()

    routed(test, FakeWorker())


def test_a_worker_that_is_removed_ends_what_it_has():
    async def test(client: Client) -> None:
        one, two = client.workers
        begun, go = asyncio.Event(), asyncio.Event()

        async def long(call: Call) -> None:
            await call.begin()
            await call.piece(b"data: 1\n\n")
            begun.set()
            await go.wait()
            await call.piece(b"data: 2\n\n")
            await call.end()

        one.does = long
        stream = client.ask(body={"prompt": "x"})
        await begun.wait()
        removed = await client.ask("/workers/0", method="DELETE").end()
        assert (removed.json["state"], removed.json["running"]) == ("draining", 1)
        assert [(await client.post()).json["by"] for _ in range(3)] == [two.name] * 3
        assert await client.metric("draining", one) == 1
        go.set()
        assert (await stream.end()).body == b"data: 1\n\ndata: 2\n\n"
        assert [each["id"] for each in (await client.get("/workers")).json["workers"]] == ["1"]

    routed(test, FakeWorker(), FakeWorker())


@pytest.mark.parametrize("kind", ["cache_aware", "least_requests", "expected_ttft"])
def test_a_worker_in_the_place_of_another_begins_with_nothing(kind):
    async def test(client: Client) -> None:
        one, two, three = *client.workers, FakeWorker()
        await three.start()
        prompt = {"prompt": list(range(1000))}
        assert (await client.post(body=prompt)).json["by"] == one.name
        await client.ask("/workers/0", method="DELETE").end()
        await client.post("/workers", {"url": three.url})
        assert (await client.post(body=prompt)).json["by"] == two.name, "its turn, for nobody has seen the prompt"
        assert (await client.get("/workers")).json["workers"][-1]["running"] == 0
        await three.stop()

    routed(test, FakeWorker(), FakeWorker(), router=kind)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "is required"),
        ({"url": "ftp://x"}, "is not a URL"),
        ({"url": "http://x:0"}, "nothing else"),
        ({"url": "http://user:secret@x"}, "nothing else"),
        ({"url": "http://x/?a=1"}, "nothing else"),
        ({"url": "http://x:99999"}, "is not a URL"),
        ({"url": "http://x", "role": "prefill"}, "'prefill' is not one of both"),
        ({"url": "http://x", "role": "other"}, "role"),
        ({"url": "http://x", "weight": 2}, "unknown field"),
        (b"{", "not valid JSON"),
    ],
)
def test_a_worker_that_cannot_be_is_a_400_that_says_why(body, said):
    async def test(client: Client) -> None:
        answer = await client.ask("/workers", body).end()
        assert answer.status == 400 and said in answer.error["message"]
        again = await client.post("/workers", {"url": client.workers[0].url.replace("http", "HTTP")})
        assert again.status == 400 and "already" in again.error["message"]
        assert len((await client.get("/workers")).json["workers"]) == 1
        assert (await client.ask("/workers/7", method="DELETE").end()).error["code"] == "worker_not_found"

    routed(test, FakeWorker())


class Own:
    """A router of one's own."""

    def __init__(self, instances: int) -> None:
        self.instances = instances

    def choose(self, prompt: object, namespace: str = "") -> int:
        return self.instances - 1

    def ended(self, instance: int, prompt_tokens: int) -> None:
        pass


def test_a_router_of_ones_own_takes_as_many_workers_as_it_was_made_for():
    async def test(client: Client) -> None:
        assert (await client.post()).json["by"] == client.workers[1].name
        three = FakeWorker()
        await three.start()
        refused = await client.post("/workers", {"url": three.url})
        assert refused.status == 400 and "was made for 2 workers and takes no more" in refused.error["message"]
        await client.ask("/workers/1", method="DELETE").end()
        assert (await client.post()).json["by"] == client.workers[0].name
        assert (await client.post("/workers", {"url": three.url})).status == 201
        assert (await client.post()).json["by"] == three.name
        await three.stop()

    routed(test, FakeWorker(), FakeWorker(), router="tests.routing.test_workers:Own")


class Lost(Own):
    """A router of one's own with a fault."""

    def choose(self, prompt: object, namespace: str = "") -> int:
        return self.instances if len(prompt) % 2 else 1 // 0  # type: ignore[arg-type]


def test_what_fails_in_a_router_of_ones_own_is_an_error_that_says_so():
    async def test(client: Client) -> None:
        for prompt, said in ((b"[1]", "which is none of the instances 0 to 1"), (b"[1, 2]", "ZeroDivisionError")):
            answer = await client.post(body=b'{"prompt": ' + prompt + b"}")
            assert (answer.status, answer.error["code"]) == (500, "router_failed")
            assert said in answer.error["message"] and "\n" not in answer.error["message"]
        assert all(worker.calls == [] for worker in client.workers)

    routed(test, FakeWorker(), FakeWorker(), router="tests.routing.test_workers:Lost")


def test_who_may_add_workers():
    async def test(client: Client) -> None:
        for sent in ({}, {"authorization": "Bearer client"}):
            refused = await client.get("/workers", **sent)
            assert (refused.status, refused.error["code"]) == (403, "no_admin_key")
        assert (await client.post(authorization="Bearer client")).status == 200

    async def with_key(client: Client) -> None:
        for sent in ({}, {"authorization": "Bearer client"}):
            assert (await client.get("/workers", **sent)).status == 401
        assert (await client.get("/workers", authorization="Bearer admin")).status == 200
        assert (await client.post(authorization="Bearer admin")).status == 401

    routed(test, FakeWorker(), api_key="client")
    routed(with_key, FakeWorker(), api_key="client", admin_key="admin")


def test_a_worker_of_its_own_key_is_sent_that():
    async def test(client: Client) -> None:
        two = FakeWorker()
        await two.start()
        added = await client.post("/workers", {"url": two.url, "api_key": "second"})
        assert "second" not in added.body.decode()
        for _ in range(2):
            await client.post(authorization="Bearer client")
        assert [worker.calls[0].headers["authorization"] for worker in (client.workers[0], two)] == [
            "Bearer first",
            "Bearer second",
        ]
        await two.stop()

    routed(test, FakeWorker(), worker_api_key="first")


@pytest.mark.parametrize(
    ("role", "said"),
    [("prefill", "has the role prefill, and was given as --worker"), ("decode", "has the role decode")],
)
def test_half_a_worker_is_refused_as_a_whole_one(role, said):
    async def test(client: Client) -> None:
        half = FakeWorker()
        half.info = {"role": role, "model": "m"}
        await half.start()
        refused = await client.post("/workers", {"url": half.url})
        assert refused.status == 400 and said in refused.error["message"]
        assert len((await client.get("/workers")).json["workers"]) == 1
        await half.stop()

    routed(test, FakeWorker())
