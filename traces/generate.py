"""Synthetic traces: arrivals, lengths, sessions and shared system prompts, all from one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from ground.errors import InputError
from traces.requests.content import Blocks, Synthetic
from traces.requests.lengths import Lengths
from traces.requests.trace_request import TraceRequest

ArrivalKind = Literal["poisson", "gamma", "burst", "constant", "closed-loop"]
ARRIVALS: tuple[str, ...] = get_args(ArrivalKind)

_BURST_SPEEDUP = 20.0  # Inside a burst, requests come this many times as fast as on average.


@dataclass(frozen=True, slots=True)
class Workload:
    """A load to generate. Raises InputError when it makes no sense."""

    requests: int
    """Requests in all, every turn counted; the last session may be cut."""
    arrivals: str = "poisson"
    """One of `ARRIVALS`; closed-loop starts every session at 0."""
    rate: float = 1.0
    """Session starts a second (requests a second where sessions have one turn)."""
    cv: float = 2.0
    """Coefficient of variation of the gaps between gamma arrivals; 1 is Poisson."""
    burst_size: int = 8
    """Session starts in a burst."""
    input_lengths: Lengths = field(default=Lengths("fixed", 512, 512))
    """New prompt tokens of a turn: what the user adds to the conversation, without the system prompt."""
    output_lengths: Lengths = field(default=Lengths("fixed", 128, 128))
    turns: Lengths = field(default=Lengths("fixed", 1, 1))
    system_prompts: int = 0
    """Number of different system prompts; each session begins with one of them. 0 for none."""
    system_tokens: int = 1024
    think_time_s: float = 0.0
    """Mean of the exponential think time before a later turn."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise InputError(f"unknown arrivals '{self.arrivals}'; known: {', '.join(ARRIVALS)}")
        for name in ("requests", "rate", "cv", "burst_size", "system_tokens"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in ("system_prompts", "think_time_s", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be finite and not negative, not {getattr(self, name)}")


def generate(workload: Workload) -> Iterator[TraceRequest]:
    """The workload's requests, a session's turns one after the other. Equal workloads give equal requests."""
    # A stream of its own for arrivals: changing the lengths leaves them where they were.
    arrival_rng, rng = (np.random.default_rng([workload.seed, stream]) for stream in (0, 1))
    made = 0
    for number, arrival_s in enumerate(arrival_times_s(workload, arrival_rng)):
        for request in _session(workload, rng, number, arrival_s):
            if made == workload.requests:
                return
            yield request
            made += 1


def _session(workload: Workload, rng: np.random.Generator, number: int, arrival_s: float) -> Iterator[TraceRequest]:
    turns = workload.turns.draw(rng)
    many = workload.turns.high > 1
    session_id = f"s{number}" if many else None
    first_id = f"s{number}.0" if many else f"r{number}"
    blocks, said = None, 0
    if workload.system_prompts:
        prompt = int(rng.integers(workload.system_prompts))
        # One block as long as the system prompt: the shortest way to say that it is shared.
        blocks, said = Blocks(np.array([prompt], np.int64), workload.system_tokens), workload.system_tokens
    for turn in range(turns):
        input_length = said + workload.input_lengths.draw(rng)
        output_length = workload.output_lengths.draw(rng)
        think_s = float(rng.exponential(workload.think_time_s)) if turn and workload.think_time_s else 0.0
        yield TraceRequest(
            request_id=f"s{number}.{turn}" if many else first_id,
            arrival_s=None if turn else round(arrival_s, 6),
            input_length=input_length,
            output_length=output_length,
            session_id=session_id,
            turn=turn,
            think_time_s=round(think_s, 3),
            content=Synthetic(spans=((0, first_id),), blocks=blocks, inherited=turn > 0),
        )
        said = input_length + output_length


def arrival_times_s(workload: Workload, rng: np.random.Generator) -> Iterator[float]:
    """Session starts without end, the first at 0."""
    mean_s = 1.0 / workload.rate
    at_s = 0.0
    number = 0
    while True:
        yield at_s
        number += 1
        if workload.arrivals == "poisson":
            at_s += float(rng.exponential(mean_s))
        elif workload.arrivals == "gamma":
            shape = 1.0 / workload.cv**2
            at_s += float(rng.gamma(shape, mean_s / shape))
        elif workload.arrivals == "constant":
            at_s = number * mean_s
        elif workload.arrivals == "burst":
            size = workload.burst_size
            inside_s = mean_s / _BURST_SPEEDUP
            # The pause makes up for the haste, so that the average rate is the one asked for.
            pause_s = size * mean_s - (size - 1) * inside_s
            at_s += float(rng.exponential(inside_s if number % size else pause_s))
