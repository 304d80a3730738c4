"""Scenarios whose decisions are compared with an engine's: requests that come by step, and sizes of a scheduler.

Nothing here depends on time, and nothing beyond the standard library is imported: what records an engine's decisions, in an
environment of that engine, takes its scenarios from here too. Steps are calls of the scheduling function.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

KV_BLOCK_TOKENS = 16
"""Tokens of each of a case's ``blocks``, whatever the page size."""
CONTEXT_TOKENS = 8192
"""Longest context of the model that a scheduler serves."""
RETRACTED = "!"
"""In a step's entry: the ids that lost their KV in it. All other keys are ids, with the tokens computed for them."""


@dataclass(frozen=True)
class Case:
    """Sizes of a scheduler and what is asked of it. Lengths are tokens."""

    blocks: int
    """KV pool, in blocks of :data:`KV_BLOCK_TOKENS`."""
    budget: int
    """Prompt tokens of a chunk, or all tokens of a step, whichever the engine bounds."""
    running: int
    """Requests that run at a time."""
    policy: str = "fcfs"
    """Order of the waiting queue: fcfs, lpm, or priority with preemption of running requests."""
    mixed: bool = False
    """Decodes join prefill batches."""
    long_prefill: int = 0
    """Most prompt tokens that one request computes in a step; 0: as many as there is budget for."""
    partial_prefills: int = 1
    """Requests whose prompt may be computed in part at a time."""
    engines: tuple[str, ...] = ("vllm", "sglang", "mini-sglang")
    """Those that have what it asks for."""


@dataclass(frozen=True)
class Request:
    """One request. It stops by length alone."""

    id: str
    step: int
    """From which on it may be chosen."""
    prompt: list[int]
    output: int
    """Tokens that it writes, unless it is aborted."""
    priority: int = 0
    """Higher goes first."""
    abort_step: int | None = None
    """When an abort arrives, before anything is chosen in that step; one that comes too late does nothing."""


CASES = {
    "roomy": Case(3000, 512, 32),
    "small-budget": Case(3000, 64, 16),
    "tight": Case(260, 512, 32),
    "tight-burst": Case(260, 256, 64),
    "few-rows": Case(600, 256, 6),
    "priority": Case(260, 256, 16, policy="priority", engines=("vllm", "sglang")),
    "priority-rows": Case(600, 256, 6, policy="priority", engines=("sglang",)),
    "aborts": Case(260, 256, 24, engines=("vllm", "sglang")),
    "long-prompts": Case(700, 128, 16, engines=("vllm", "sglang")),
    "conversations": Case(400, 256, 16, engines=("vllm", "sglang")),
    "long-prefill": Case(600, 256, 16, long_prefill=48, partial_prefills=3, engines=("vllm",)),
    "mixed": Case(400, 256, 24, mixed=True, engines=("sglang",)),
    "lpm": Case(400, 256, 12, policy="lpm", engines=("sglang",)),
}
"""By name. The name and a seed give the requests: what is here changes no recording that there is."""


def scenario(case: str, seed: int) -> list[Request]:
    """The requests of a case, in order of arrival."""
    draw = random.Random(f"{case}/{seed}")
    if case == "conversations":
        return _conversations(draw)
    shared = [draw.randrange(2, 500) for _ in range(400)]
    step, requests = 0, []
    long = case in ("long-prompts", "long-prefill")
    for i in range(60):
        if "burst" not in case:
            step += draw.choice([0, 0, 1, 2, 5])
        prefix = shared[: draw.randrange(0, 300)] if draw.random() < 0.5 else []
        prompt = prefix + [draw.randrange(2, 500) for _ in range(draw.randrange(5, 400))]
        output = draw.randrange(1, 120)
        priority, abort_step = 0, None
        if long and draw.random() < 0.3:
            prompt = prompt + [draw.randrange(2, 500) for _ in range(draw.randrange(500, 2500))]
        if case.startswith("priority"):
            priority = draw.choice([0, 0, 1, 2, 5])
        if case == "aborts" and draw.random() < 0.4:
            abort_step = step + draw.choice([0, 1, 2, 3, 10, 40, 100])
        requests.append(Request(f"r{i:03d}", step, prompt, output, priority, abort_step))
    return requests


def _conversations(draw: random.Random) -> list[Request]:
    """Twelve conversations of five turns, each with all before it in front: what comes back is in the cache, or was."""
    system = [draw.randrange(2, 500) for _ in range(70)]
    coming: list[tuple[int, int, list[int]]] = []
    for number in range(12):
        coming.append((draw.randrange(0, 120), number, system + _words(draw, 5, 120)))
    turns = [0] * 12
    requests: list[Request] = []
    while coming:
        coming.sort(key=lambda turn: turn[:2])
        step, number, prompt = coming.pop(0)
        output = draw.randrange(5, 80)
        request = Request(f"r{len(requests):03d}", step, prompt, output)
        requests.append(request)
        turns[number] += 1
        if turns[number] < 5:
            said = [token(request.id, position) for position in range(output)]
            # Later than it can end in a step a token; an engine that is crowded may still be at it, which changes nothing.
            coming.append((step + output + draw.randrange(20, 300), number, prompt + said + _words(draw, 5, 120)))
    return requests


def _words(draw: random.Random, least: int, most: int) -> list[int]:
    return [draw.randrange(2, 500) for _ in range(draw.randrange(least, most))]


def token(request_id: str, position: int) -> int:
    """The token that a request writes at a position of its output."""
    return ((int(request_id[1:]) * 1000003 + position * 7919) * 2654435761 >> 7) % 498 + 2
