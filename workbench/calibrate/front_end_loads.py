"""Loads that tell apart what a request, a prompt token and a streamed chunk take a server: each varies one of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reports.record.schema import FINISHED
from workbench.clients.openai_client import Answer, CompletionsClient, ServerRefused

_TEXT = (
    "the of and to in is that for it with as was on be at by this had not are but from or have an they which one you were "
    "all her she there would their we him been has when who will no more if out so up said what its about than into them "
    "can only other time new some could these two may first then do any like my now over such our man me even most made "
    "after also did many off before must well back through years much where your way down should because long each just "
    "state people those how too little good world make very year still see own work men day get here between both life "
    "being under three never know same last another while us might great go come since against right came take used "
    "scheduler request kernel network throughput latency tokenizer observation measurement considerable"
)
WORDS = _TEXT.split()
NUMBERED = 12
"""One word in so many is a number, which no cache of a tokenizer holds."""


@dataclass(frozen=True)
class Asked:
    """One request of a load."""

    words: int
    outputs: int
    due_s: float = 0.0
    """Since the load began."""


@dataclass(frozen=True)
class Load:
    """Requests that are sent together."""

    name: str
    asked: tuple[Asked, ...] = ()
    streams: int = 1
    """At a time."""
    rest_s: float = 0.3
    """Nothing is asked for so long after them."""


def _alike(name: str, count: int, words: int, outputs: int, streams: int) -> Load:
    return Load(name, (Asked(words, outputs),) * count, streams)


AT_REST = _alike("24 requests, one at a time", 24, 8, 1, 1)
"""For the latency: it is fitted to nothing, for a process that sleeps between requests takes longer for each."""


def loads() -> list[Load]:
    """What the costs are fitted to: several at a time, as where it matters what the process takes."""
    return [
        _alike("96 requests, 16 at a time", 96, 8, 1, 16),
        _alike("256 requests, 64 at a time", 256, 8, 1, 64),
        _alike("24 prompts of 400 words, 8 at a time", 24, 400, 1, 8),
        _alike("16 prompts of 1,500 words, 8 at a time", 16, 1500, 1, 8),
        _alike("32 streams of 60 tokens", 32, 8, 60, 32),
        _alike("64 streams of 60 tokens", 64, 8, 60, 64),
        _alike("128 streams of 40 tokens", 128, 8, 40, 128),
        Load("nothing for a short while", rest_s=0.6),
        Load("nothing for a while", rest_s=2.0),
    ]


def held_out(seed: int = 1) -> Load:
    """A load that is fitted to nothing: requests of all kinds, as they come."""
    chance, due_s, asked = random.Random(seed), 0.0, []
    for _ in range(80):
        due_s += chance.expovariate(8.0)
        asked.append(Asked(round(chance.lognormvariate(4.5, 1.0)) + 1, chance.randint(10, 90), due_s))
    return Load("held out", tuple(asked), len(asked))


def text_of(words: int, seed: int) -> str:
    """Text of so many words, different for every seed."""
    chance = random.Random(seed)
    return " ".join(
        str(chance.randrange(1_000_000)) if chance.randrange(NUMBERED) == 0 else chance.choice(WORDS)
        for _ in range(words)
    )


@dataclass(frozen=True)
class Answered:
    """One request, and what its client saw; moments are seconds since the load began."""

    request_id: str
    sent_s: float
    prompt_tokens: int
    tokens: int
    first_s: float
    last_s: float

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def itl_s(self) -> float:
        """Mean gap between its tokens; NaN of one alone."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else float("nan")


def send(url: str, load: Load, number: int) -> list[Answered]:
    """Send a load as text, so that the server has to encode it. ``number`` tells it from all others that the server had.

    Raises ServerRefused where a request does not get all of its answer.
    """
    return asyncio.run(_send(url, load, number))


async def _send(url: str, load: Load, number: int) -> list[Answered]:
    texts = [text_of(asked.words, 100_000 * number + place) for place, asked in enumerate(load.asked)]
    began_s = time.monotonic()
    client = CompletionsClient(
        url, None, lambda: time.monotonic() - began_s, text_of=lambda place: texts[int(place[0])]
    )
    client.dialect.token_ids = False
    places = asyncio.Semaphore(load.streams)

    async def ask(place: int, asked: Asked) -> Answered:
        async with places:
            await asyncio.sleep(max(asked.due_s - (time.monotonic() - began_s), 0.0))
            answer, name = Answer(0.0), f"{number}-{place}"
            await client.complete(name, np.array([place]), asked.outputs, answer)
        if answer.status != FINISHED or answer.output_tokens != asked.outputs or answer.prompt_tokens is None:
            raise ServerRefused(f"{load.name}: a request ended with {answer.message or answer.status}")
        first_s, last_s = answer.chunk_s[0], answer.chunk_s[-1]
        return Answered(name, answer.sent_s, answer.prompt_tokens, answer.output_tokens, first_s, last_s)

    async with client:
        await client.find_model()
        began_s = time.monotonic()
        return list(await asyncio.gather(*(ask(place, asked) for place, asked in enumerate(load.asked))))


def mean(values: Sequence[float]) -> float:
    """Mean of those that are numbers."""
    return float(np.nanmean(values))
