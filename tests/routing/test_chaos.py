"""Streams over one router and two pairs, while instances are killed, stopped and started again, and the router, too.

Nothing depends on how fast anything is: what is done next waits for so many answers, or for a metric.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2
import openai
import pytest

from tests.event_loop import in_a_loop
from tests.patience import PATIENCE_S
from tests.serving.server import MODEL, RouterServer, Server, answer

STREAMS = 100
MOST = 1000
AT_ONCE = 20
TOKENS = 80
KEY = "k" * 32
ROUTE = (
    *("--decode-router", "least_requests", "--health-interval", "0.2", "--health-timeout", "120"),
    *("--breaker-failures", "2", "--breaker-open-for", "0.5", "--breaker-successes", "1"),
)


@dataclass
class Outcome:
    """What a client got."""

    prompt: str
    text: str = ""
    finished: str | None = None
    error: str | None = None


@dataclass
class Traffic:
    """Clients that ask one after the other, so many at a time."""

    client: openai.AsyncOpenAI
    outcomes: list[Outcome] = field(default_factory=list)
    over: bool = False
    up: asyncio.Event = field(default_factory=asyncio.Event)
    """Nobody begins while it is not set."""
    _one_more: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, number: int) -> None:
        got = Outcome(f"chaos {number} " * 30)
        asked = {"model": MODEL, "prompt": got.prompt, "max_tokens": TOKENS}
        try:
            if number % 4:
                async for piece in await self.client.completions.create(**asked, stream=True):
                    got.text += piece.choices[0].text
                    got.finished = piece.choices[0].finish_reason
            else:
                choice = (await self.client.completions.create(**asked)).choices[0]
                got.text, got.finished = choice.text, choice.finish_reason
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            got.error = f"{type(error).__name__}: {error}"
        self.outcomes.append(got)
        self._one_more.set()

    async def flow(self) -> None:
        """Ask, so many at a time, until there were enough and nobody wants more."""
        numbers = iter(range(MOST))

        async def one_after_the_other() -> None:
            for number in numbers:
                await self.up.wait()
                if self.over and number >= STREAMS:
                    return
                await self.ask(number)

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))

    async def more(self, count: int) -> None:
        """Until so many more have got what they got."""
        until = len(self.outcomes) + count
        while len(self.outcomes) < until:
            self._one_more.clear()
            await asyncio.wait_for(self._one_more.wait(), PATIENCE_S)


def half(role: str, port: int = 0) -> Server:
    return Server("--role", role, "--time-scale", "2", "--port", str(port), WORKBENCH_PEER_KEY=KEY)


def port_of(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


async def until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(round(PATIENCE_S / 0.02)):
        if await asyncio.to_thread(holds):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"never: {what}")


class Site:
    """Two instances of either role and a router."""

    def __init__(self) -> None:
        roles = ("prefill", "prefill", "decode", "decode")
        with ThreadPoolExecutor(len(roles)) as pool:
            self.halves = list(pool.map(half, roles))
        self.roles = dict(enumerate(roles))
        self.router = self.routed(0)

    def routed(self, port: int) -> RouterServer:
        urls = [word for number, server in enumerate(self.halves) for word in (f"--{self.roles[number]}", server.url)]
        return RouterServer("--port", str(port), *urls, *ROUTE)

    def running(self, number: int) -> float:
        return self.router.metric("router_running", worker=self.halves[number].url)

    def changes(self, number: int, state: str) -> float:
        try:
            return self.router.metric("router_breaker_changes_total", worker=self.halves[number].url, state=state)
        except KeyError:
            return 0.0

    def signal(self, number: int, what: int) -> None:
        """All processes of an instance."""
        server = self.halves[number]
        for pid in (*server.children().values(), server.process.pid):
            os.kill(pid, what)

    async def kill(self, number: int) -> None:
        """As a machine that loses its power."""
        self.signal(number, signal.SIGKILL)
        await asyncio.to_thread(self.halves[number].wait)

    async def start_again(self, number: int) -> None:
        self.halves[number] = await asyncio.to_thread(half, self.roles[number], port_of(self.halves[number]))

    def end(self) -> None:
        for each in (self.router, *self.halves):
            each.kill()


async def chaos(site: Site) -> list[Outcome]:
    prefill, _, decode, other = range(4)
    traffic = Traffic(site.router.async_openai())
    traffic.up.set()
    flowing = asyncio.create_task(traffic.flow())

    await traffic.more(8)
    await site.kill(prefill)
    await traffic.more(8)

    await until(lambda: site.running(decode) >= 2, "requests at the decode instance")
    await site.kill(decode)
    await until(lambda: site.changes(decode, "open") >= 1, "the breaker opens")
    await traffic.more(4)
    await asyncio.gather(site.start_again(prefill), site.start_again(decode))
    await until(lambda: site.changes(decode, "closed") >= 1, "the breaker closes")

    await until(lambda: site.running(decode) >= 4 and site.running(other) >= 2, "requests at both")
    site.signal(other, signal.SIGSTOP)
    await traffic.more(3)
    site.signal(other, signal.SIGCONT)
    await traffic.more(AT_ONCE)

    port = port_of(site.router)
    traffic.up.clear()
    await until(lambda: sum(map(site.running, (decode, other))) >= 2, "streams that lose their router")
    await asyncio.to_thread(site.router.kill)
    site.router = await asyncio.to_thread(site.routed, port)
    traffic.up.set()
    well = sum(got.error is None for got in traffic.outcomes)
    while sum(got.error is None for got in traffic.outcomes) < well + 8:
        await traffic.more(1)
    traffic.over = True
    await flowing
    return traffic.outcomes


@pytest.mark.server
@pytest.mark.slow
def test_whatever_dies_every_client_gets_its_own_answer_or_one_clear_error_and_nothing_is_left():
    site = Site()
    try:
        outcomes = in_a_loop(chaos(site))
        assert STREAMS <= len(outcomes) < MOST
        for got in outcomes:
            whole = answer(got.prompt, TOKENS)
            assert whole.startswith(got.text), "nothing of another's, and nothing twice"
            if got.error is None:
                assert (got.text, got.finished) == (whole, "length")
        # Only who was decoded at the instance that was killed, or was under way at the router, may have lost its answer.
        assert sum(got.error is not None for got in outcomes) <= 2 * AT_ONCE
        for server in site.halves:
            server.await_rest()
        for number in range(4):
            site.router.await_metric("router_running", lambda value: value == 0, worker=site.halves[number].url)
        assert site.router.stop()[0] == 0
    finally:
        site.end()
