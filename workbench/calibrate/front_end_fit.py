"""The front end of our server, from the CPU time that its processes took for known loads, and the file that says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from backends.simulated.cost.models.least_squares import relative_least_squares
from backends.simulated.front_end import FrontEndModel
from ground.errors import InputError
from ground.whole_file import write_whole


@dataclass(frozen=True)
class Spent:
    """What one load was, and the CPU time that the two processes took for it through which answers pass."""

    load: str
    requests: float
    prompt_tokens: float
    chunks: float
    """Tokens that were streamed: one of each request a step."""
    steps: float
    """Of the engine, whose results came together."""
    wall_s: float
    http_s: float
    detokenizer_s: float

    @property
    def row(self) -> tuple[float, ...]:
        """The terms of its CPU time: requests, prompt tokens, chunks, steps, seconds that passed, looking at the clocks."""
        return (self.requests, self.prompt_tokens, self.chunks, self.steps, self.wall_s, 1)


@dataclass(frozen=True)
class ProcessFit:
    """What things take one process, in seconds, and how well that describes what was measured."""

    request_s: float
    prompt_token_s: float
    chunk_s: float
    loads: tuple[tuple[str, float, float], ...]
    """(load, CPU seconds measured, by the fit)."""

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error over the loads."""
        return float(np.mean([abs(fitted / measured - 1) for _, measured, fitted in self.loads]))

    def to_json(self) -> dict[str, object]:
        """Give it as JSON holds it."""
        loads = [{"load": name, "cpu_s": spent, "fitted_s": fitted} for name, spent, fitted in self.loads]
        return {**asdict(self), "loads": loads, "mean_error": self.mean_error}


def medians(rounds: Sequence[Sequence[Spent]]) -> list[Spent]:
    """One of each load, with the median of what its rounds took."""
    found = []
    for each in zip(*rounds, strict=True):
        assert len({spent.load for spent in each}) == 1, "every round has the same loads in the same order"
        middle = {
            name: median(getattr(spent, name) for spent in each)
            for name in ("requests", "prompt_tokens", "chunks", "steps", "wall_s", "http_s", "detokenizer_s")
        }
        found.append(Spent(each[0].load, **middle))
    return found


def fit_process(loads: Sequence[Spent], seconds_of: Callable[[Spent], float]) -> ProcessFit:
    """What a request, a prompt token and a chunk take a process: least squares of relative errors, none below zero.

    Told apart and left out are what time alone takes it (signs of life), looking at its clock, and what the result of a step
    takes whatever it holds: beside many streams that is little, and with few the process has time.

    Raises InputError where the loads do not tell these apart.
    """
    rows = np.array([load.row for load in loads], float)
    if np.linalg.matrix_rank(rows / np.maximum(np.abs(rows).max(axis=0), 1e-300)) < rows.shape[1]:
        raise InputError("the loads do not tell requests, prompt tokens and chunks apart")
    seconds = np.array([seconds_of(load) for load in loads])
    if not (seconds > 0).all():
        raise InputError("no CPU time was seen: the clock of this machine is too coarse")
    found = relative_least_squares(rows, seconds)
    each = zip((load.load for load in loads), seconds.tolist(), (rows @ found).tolist(), strict=True)
    request_s, prompt_token_s, chunk_s = found[:3].tolist()
    return ProcessFit(request_s, prompt_token_s, chunk_s, tuple(each))


def latency_beside(waited_s: Sequence[tuple[float, int]], http: ProcessFit) -> float:
    """What a request at rest waits beside engine and process: ``waited_s`` are (time to the first token as the client saw it
    less the engine's, prompt tokens). The lower quartile, for whatever else the machine does only adds to it."""
    rest = [seconds - http.request_s - http.prompt_token_s * tokens - http.chunk_s for seconds, tokens in waited_s]
    return max(float(np.percentile(rest, 25)), 0.0)


def front_end_of(http: ProcessFit, detokenizer: ProcessFit, latency_s: float) -> FrontEndModel:
    """One process for both: what is streamed passes the slower of the two."""
    chunk_s = max(http.chunk_s, detokenizer.chunk_s)
    return FrontEndModel(http.request_s, http.prompt_token_s, chunk_s, latency_s)


def write_front_end(path: Path, model: FrontEndModel, about: Sequence[str]) -> None:
    """Write the file for ``--front-end``, with lines of comment about it. Raises InputError."""
    lines = [*(f"# {line}" for line in about), *(f"{name} = {value:.4g}" for name, value in asdict(model).items())]
    write_whole(path, "\n".join(lines) + "\n")
