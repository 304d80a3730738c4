"""Many clients at once: every answer complete, none crossed, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.event_loop import in_a_loop
from tests.serving.server import MODEL, Server, answer


@pytest.fixture(scope="module")
def server():
    server = Server("--max-running", "64")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def slow_server():
    # About 20 ms a step: clients leave in the midst of it.
    server = Server("--time-scale", "3", "--max-running", "64", "--page-size", "16")
    yield server
    server.kill()


async def read(client, prompt: str, tokens: int, leave_after: int | None = None) -> tuple[str, str | None]:
    """(text, finish reason) of a stream, left after so many chunks if asked to."""
    text, reason, chunks = "", None, 0
    stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=tokens, stream=True)
    async for chunk in stream:
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
        chunks += 1
        if leave_after is not None and chunks >= leave_after:
            await stream.close()
            break
    return text, reason


def test_two_hundred_streams_are_complete_and_none_is_crossed(server):
    lengths = [1 + i % 61 for i in range(200)]

    async def all_of_them():
        async with server.async_openai() as client:
            return await asyncio.gather(*(read(client, f"client {i}", n) for i, n in enumerate(lengths)))

    for i, (text, reason) in enumerate(in_a_loop(all_of_them())):
        assert (text, reason) == (answer(f"client {i}", lengths[i]), "length")
    server.await_rest()


def test_clients_that_leave_at_random_take_their_kv_with_them(slow_server):
    chance = random.Random(3)
    leaves = [chance.choice([None, 1, 2, 5]) for _ in range(200)]

    async def all_of_them():
        async with slow_server.async_openai() as client:
            return await asyncio.gather(
                *(read(client, f"leaver {i}", 8 if leave is None else 10_000, leave) for i, leave in enumerate(leaves))
            )

    for i, (text, reason) in enumerate(in_a_loop(all_of_them())):
        if leaves[i] is None:
            assert (text, reason) == (answer(f"leaver {i}", 8), "length")
        else:
            assert text and answer(f"leaver {i}", 200).startswith(text)
    slow_server.await_rest()
    assert slow_server.metric("request_success_total", finished_reason="length") >= leaves.count(None)


def test_a_client_that_leaves_before_its_answer_frees_its_place(slow_server):
    async def leave():
        async with slow_server.async_openai() as client:
            asked = asyncio.create_task(client.completions.create(model=MODEL, prompt="gone", max_tokens=10_000))
            await asyncio.to_thread(slow_server.await_metric, "num_requests_running", lambda value: value == 1)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    in_a_loop(leave())
    slow_server.await_rest()


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def test_a_thousand_requests_leave_no_growth(server):
    async def some(count: int, name: str) -> None:
        async with server.async_openai() as client:
            limit = asyncio.Semaphore(50)

            async def one(i: int) -> None:
                async with limit:
                    text, _ = await read(client, f"{name} {i}", 5)
                    assert text == answer(f"{name} {i}", 5)

            await asyncio.gather(*(one(i) for i in range(count)))

    def sizes() -> dict[str, int]:
        server.await_rest()
        assert server.http.post("/flush_cache").is_success
        server.await_metric("kv_cached_tokens", lambda value: value == 0)
        return {name: resident_bytes(pid) for name, pid in {**server.children(), "http": server.process.pid}.items()}

    in_a_loop(some(200, "warm"))
    before = sizes()
    in_a_loop(some(1000, "count"))
    after = sizes()
    grown = {name: after[name] - before[name] for name in before if after[name] - before[name] > 8 << 20}
    assert grown == {}
