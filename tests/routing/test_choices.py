"""The router chooses as the simulator's does; what it counts of a body; sessions."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench
from tests.routing.fakes import Answer, Call, Client, FakeWorker, routed
from traces.requests.content import TokenIds
from workbench.cluster.router import BLOCK_TOKENS, ROUTERS, Router
from workbench.routing.asked import Asked, asked_in

DETERMINISTIC = settings(derandomize=True, deadline=None, max_examples=60)
INSTANCES = 3
REQUESTS = 150


@dataclass
class Event:
    """What happened at a simulated router, and when."""

    what: str
    among: int
    """How many instances the router has: of a pair the prefill router has fewer."""
    instance: int
    prompt: list[int]
    namespace: str
    now_s: float


def simulated(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Event]:
    """All that a simulation's routers were asked and told. Every prompt has a length of its own, by which it is known."""
    events: list[Event] = []
    prompts: dict[int, tuple[list[int], str]] = {}

    class Heard(Router):
        def choose(self, prompt: np.ndarray, namespace: str = "") -> int:
            chosen = super().choose(prompt, namespace)
            prompts[len(prompt)] = prompt.tolist(), namespace
            self.heard("sent", chosen, len(prompt))
            return chosen

        def answered(self, instance: int, prompt_tokens: int) -> None:
            super().answered(instance, prompt_tokens)
            self.heard("answered", instance, prompt_tokens)

        def ended(self, instance: int, prompt_tokens: int) -> None:
            super().ended(instance, prompt_tokens)
            self.heard("ended", instance, prompt_tokens)

        def heard(self, what: str, instance: int, tokens: int) -> None:
            events.append(Event(what, self.instances, instance, *prompts[tokens], self.clock()))

    monkeypatch.setattr("workbench.cluster.router.Router", Heard)
    trace = [
        workbench.TraceRequest(
            f"r{number}",
            number / 40,
            len(prompt),
            5 + 37 * (number % 4),
            content=TokenIds(np.array(prompt, np.int32), None, "the test"),
            adapter=["x", "y", None][number % 3],
        )
        for number, prompt in enumerate(conversations(REQUESTS))
    ]
    workbench.simulate(trace, gpu="l40s", model="llama-3.1-8b", max_running=6, **settings)
    monkeypatch.undo()
    return events


def conversations(count: int) -> list[list[int]]:
    """Prompts of which many begin as others do, no two of one length."""
    rng = np.random.default_rng(7)
    starts = [rng.integers(0, 1000, 1500).tolist() for _ in range(5)]
    made = []
    for number in range(count):
        length = 300 + 7 * number
        start = starts[rng.integers(0, 5)][: rng.integers(1, length)]
        made.append([*start, *rng.integers(0, 1000, length - len(start)).tolist()])
    return made


class Held:
    """Requests that came to workers and wait for a test to answer them."""

    def __init__(self, client: Client) -> None:
        self._came: asyncio.Queue[tuple[int, Call]] = asyncio.Queue()
        self._over: dict[int, asyncio.Event] = {}
        for number, worker in enumerate(client.workers):
            worker.does = partial(self._hold, number)

    async def _hold(self, number: int, call: Call) -> None:
        over = self._over[id(call)] = asyncio.Event()
        self._came.put_nowait((number, call))
        await over.wait()

    async def come(self) -> tuple[int, Call]:
        return await self._came.get()

    def done(self, call: Call) -> None:
        self._over[id(call)].set()


def body_of(event: Event) -> dict[str, Any]:
    return {"prompt": event.prompt, **({"cache_salt": event.namespace} if event.namespace else {})}


async def write(call: Call, answer: Answer) -> None:
    """The first token, if it is not there yet."""
    if not answer.status:
        await call.begin()
        await call.piece(b"data: 1\n\n")
        await answer.until(lambda: bool(answer.pieces))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTERS)
def test_the_router_chooses_live_what_the_simulators_chooses(kind, monkeypatch):
    events = simulated(monkeypatch, dp=INSTANCES, router=kind)
    assert len({event.instance for event in events}) == INSTANCES

    async def test(client: Client) -> None:
        held = Held(client)
        open_: dict[int, tuple[Answer, Call]] = {}
        for at, event in enumerate(events):
            client.clock.now = event.now_s
            if event.what == "sent":
                answer = client.ask(body=body_of(event))
                chosen, call = await held.come()
                assert chosen == event.instance, f"event {at}"
                open_[len(event.prompt)] = answer, call
                continue
            answer, call = open_[len(event.prompt)]
            await write(call, answer)
            if event.what == "ended":
                await call.end()
                held.done(call)
                await answer.end()
        assert len(open_) == REQUESTS

    routed(test, *(FakeWorker() for _ in range(INSTANCES)), router=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTERS)
def test_pairs_are_chosen_live_as_in_a_simulation(kind, monkeypatch):
    pools = [{"role": "prefill", "count": 2}, {"role": "decode", "count": 3}]
    events = simulated(monkeypatch, pool=pools, router="least_tokens", decode_router=kind)

    async def test(client: Client) -> None:
        held = Held(client)
        open_: dict[int, tuple[Answer, Call, Call]] = {}
        workers = client.front.roster.workers
        for at, event in enumerate(events):
            client.clock.now = event.now_s
            if event.what == "sent" and event.among == 3:
                prefill = events[at + 1]
                assert (prefill.what, prefill.among, prefill.prompt) == ("sent", 2, event.prompt)
                answer = client.ask(body=body_of(event))
                (first, one), (second, two) = sorted([await held.come(), await held.come()], key=itemgetter(0))
                assert (first, second) == (prefill.instance, 2 + event.instance), f"event {at}"
                open_[len(event.prompt)] = answer, one, two
                continue
            answer, one, two = open_[len(event.prompt)]
            if event.among == 2 and event.what == "ended":
                running = workers[event.instance].running
                await one.answer({"object": "handover", "status": "handed_over"})
                held.done(one)
                while workers[event.instance].running == running:
                    await asyncio.sleep(0)
            elif event.among == 3:
                await write(two, answer)
                if event.what == "ended":
                    await two.end()
                    held.done(two)
                    await answer.end()
        assert len(open_) == REQUESTS

    halves = []
    for role in ("prefill", "prefill", "decode", "decode", "decode"):
        halves.append(FakeWorker())
        halves[-1].info = {"role": role, "peer": "127.0.0.1:7"}
    routed(test, *halves, prefills=2, router="least_tokens", decode_router=kind)


def read(body: Any, **headers: str) -> Asked:
    return asked_in(json.dumps(body).encode(), headers, "x-session-id")


@pytest.mark.parametrize(
    "body",
    [{"prompt": [5, 6, 7]}, {"input_ids": [5, 6, 7], "text": None}, {"prompt": [[5, 6], [7]]}, {"input": [5, 6, 7]}],
)
def test_token_ids_are_the_prompt(body):
    assert read(body).prompt.tolist() == [5, 6, 7] and read(body).prompt.dtype == np.int32


@pytest.mark.parametrize(
    ("body", "bytes_"),
    [
        ({"prompt": "x" * 400}, 400),
        ({"text": "é" * 200}, 400),
        ({"prompt": ["x" * 199, "x" * 200]}, 400),
        ({"prompt": "x" * 401}, 404),
        ({"messages": [{"role": "user", "content": "x" * 368}]}, 400),
        ({"input": "x" * 398}, 400),
        ({}, 0),
    ],
)
def test_a_text_counts_a_token_for_every_four_bytes(body, bytes_):
    assert len(read(body).prompt) == bytes_ // 4


@given(start=st.text(max_size=300), rest=st.text(max_size=50))
@DETERMINISTIC
def test_texts_that_begin_alike_have_tokens_that_begin_alike(start, rest):
    one, two = read({"prompt": start}).prompt, read({"prompt": start + rest}).prompt
    alike = len(start.encode(errors="replace")) // 4
    assert one[:alike].tolist() == two[:alike].tolist()


@pytest.mark.parametrize("field", ["messages", "input"])
def test_a_conversation_that_goes_on_begins_as_it_did(field):
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"turn {n} " * 50} for n in range(6)]
    earlier = read({field: turns[:3], "tools": [{"type": "function"}]}).prompt
    later = read({field: turns, "tools": [{"type": "function"}], "temperature": 0.5}).prompt
    assert len(later) > len(earlier) > BLOCK_TOKENS
    assert later[: len(earlier) - 1].tolist() == earlier[:-1].tolist()
    other = read({field: turns[:3], "tools": [{"type": "other"}]}).prompt
    assert other[:8].tolist() != earlier[:8].tolist()


def test_requests_of_other_salts_or_models_share_nothing():
    given = [{"prompt": "x"}, {"prompt": "x", "model": "m"}, {"prompt": "x", "model": "m", "cache_salt": "s"}]
    assert len({read(body).namespace for body in given}) == 3
    assert read({"prompt": "x", "temperature": 1}).namespace == read(given[0]).namespace


def test_turns_go_to_one_worker_while_texts_that_are_new_take_turns():
    async def test(client: Client) -> None:
        one, two = client.workers
        for name in ("a", "b"):
            await client.post(body={"messages": [{"role": "user", "content": name * 4000}]})
        for _ in range(4):
            await client.post(
                body={"messages": [{"role": "user", "content": "a" * 4000}, {"role": "user", "content": "?"}]}
            )
        assert (len(one.calls), len(two.calls)) == (5, 1)

    routed(test, FakeWorker(), FakeWorker(), router="cache_aware")


@pytest.mark.parametrize("header", [None, "x-session-id", "x-conversation"])
def test_a_session_stays_with_its_worker(header):
    async def test(client: Client) -> None:
        def turn(session: str) -> Any:
            if header is None:
                return client.post(body={"prompt": "x", "session_id": session})
            return client.post(**{header.replace("-", "_"): session})

        by = [[(await turn(session)).json["by"] for session in ("a", "b", "c")] for _ in range(3)]
        assert by[0] == by[1] == by[2] and len(set(by[0])) == 3
        gone = next(worker for worker in client.workers if worker.name == by[0][0])
        await gone.stop()
        others = {(await turn("a")).json["by"] for _ in range(3)}
        assert len(others) == 1 and others <= set(by[0][1:]), "it goes on elsewhere, and stays there"
        assert [(await turn(session)).json["by"] for session in ("b", "c")] == by[0][1:]

    extra = {} if header in (None, "x-session-id") else {"session_header": "X-Conversation"}
    routed(test, FakeWorker(), FakeWorker(), FakeWorker(), **extra)


def test_a_session_that_a_server_opened_goes_back_to_it():
    async def test(client: Client) -> None:
        async def does(call: Call) -> None:
            await call.answer({"session_id": call.headers["host"]})

        for worker in client.workers:
            worker.does = does
        opened = [(await client.post("/open_session", {})).json["session_id"] for _ in range(3)]
        assert len(set(opened)) == 3
        for session in (*opened, *reversed(opened)):
            answer = await client.post(body={"session_id": session, "prompt": "x"})
            assert answer.json["session_id"] == session, "the worker that has it"
        for session in opened:
            assert (await client.post("/close_session", {"session_id": session})).json["session_id"] == session
        assert not any(client.front.dispatch.sticky.workers(session) for session in opened)

    routed(test, FakeWorker(), FakeWorker(), FakeWorker(), router="least_requests")
