"""The smallest replay there is: requests that arrive by the clock, or so many at a time, through scheduler and runner, to a
run record.

``workbench replay`` does this for any trace, with sessions and service levels, and needs simpy and msgspec. A machine lent
with torch alone has neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from backends.torch.backend import TorchBackend
from reports.record.run_record import IterationLog, RunRecord, write_record
from workbench.instance import LoopSpec, Recipe, start
from workbench.loops.drive import drive
from workbench.scheduler.config import Batching, SchedulerConfig
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Req, SamplingParams
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import StepResult

NAN = float("nan")


@dataclasses.dataclass(slots=True)
class Arrival:
    """A request of a trace."""

    request_id: str
    arrival_s: float
    prompt: list[int]
    new_tokens: int
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Sampling parameters other than a greedy request's."""

    def message(self, at_s: float) -> Generate:
        """The request as a scheduler gets it."""
        params = SamplingParams(
            **{"ignore_eos": True, "temperature": 0.0, **self.asked, "max_new_tokens": self.new_tokens}
        )
        return Generate(self.request_id, np.array(self.prompt, np.int32), params, at_s)


@dataclasses.dataclass(slots=True)
class Row:
    """What happened to it: its line of requests.csv."""

    arrival: Arrival
    queued_s: float = NAN
    scheduled_s: float = NAN
    first_token_s: float = NAN
    finish_s: float = NAN
    output_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    status: str = "unfinished"


class Over(Exception):
    """Every request has ended."""


class Inbox:
    """Delivers requests when their time has come."""

    def __init__(self, arrivals: list[Arrival], rows: dict[str, Row], now_s: Callable[[], float]) -> None:
        self._due = [(a.arrival_s, a.message(a.arrival_s)) for a in sorted(arrivals, key=lambda a: a.arrival_s)]
        self._next, self._rows, self._now_s = 0, rows, now_s

    def drain(self) -> list[object]:
        now, first = self._now_s(), self._next
        while self._next < len(self._due) and self._due[self._next][0] <= now:
            self._rows[self._due[self._next][1].rid].queued_s = now
            self._next += 1
        return [message for _, message in self._due[first : self._next]]

    def arrival(self) -> Callable[[], None]:
        return self._wait

    def _wait(self) -> None:
        if self._next == len(self._due):
            raise Over
        time.sleep(max(self._due[self._next][0] - self._now_s(), 0.0))


class ClosedInbox:
    """Delivers the next request as soon as fewer than ``concurrency`` are on their way."""

    def __init__(
        self, arrivals: list[Arrival], rows: dict[str, Row], now_s: Callable[[], float], concurrency: int
    ) -> None:
        self._left, self._rows, self._now_s, self._most = list(reversed(arrivals)), rows, now_s, concurrency
        self._on_their_way: list[Row] = []

    def drain(self) -> list[object]:
        now = self._now_s()
        self._on_their_way = [row for row in self._on_their_way if row.finish_s != row.finish_s]
        messages: list[object] = []
        while self._left and len(self._on_their_way) < self._most:
            arrival = self._left.pop()
            row = self._rows[arrival.request_id]
            arrival.arrival_s = row.queued_s = now
            self._on_their_way.append(row)
            messages.append(arrival.message(now))
        return messages

    def arrival(self) -> Callable[[], None]:
        return self._wait

    def _wait(self) -> None:
        if not self._left:
            raise Over


class Outbox:
    """Notes when what came out."""

    def __init__(self, rows: dict[str, Row], table_rows: int, now_s: Callable[[], float], keep_tokens: bool) -> None:
        self._rows, self._now_s, self._keep = rows, now_s, keep_tokens
        self._last_s = np.full(table_rows, NAN)
        self._row_of: dict[str, int] = {}
        self._before: dict[str, float] = {}
        """When requests without a row, because they were retracted, got their last token."""
        self.gaps: list[np.ndarray] = []
        self.tokens: dict[str, list[int]] = {}

    def scheduled(self, batch: ScheduleBatch) -> None:
        for req in batch.retracted or ():
            self._before[req.rid] = float(self._last_s[self._row_of[req.rid]])
        if batch.worker.new_requests:
            now = self._now_s()
            for new in batch.worker.new_requests:
                self._row_of[new.request_id] = new.row
                self._last_s[new.row] = self._before.pop(new.request_id, NAN)
                row = self._rows[new.request_id]
                if row.scheduled_s != row.scheduled_s:
                    row.scheduled_s = now

    def send(self, result: StepResult) -> None:
        now = self._now_s()
        if result.batch is not None and result.output is not None:
            self._sampled(result.batch, result.output.tokens, now)
        for req in result.first:
            self._rows[req.rid].first_token_s = now
        for req in result.ended:
            self._ended(req, now)

    def _sampled(self, batch: ScheduleBatch, tokens: np.ndarray, now: float) -> None:
        keep = np.ones(len(tokens), bool)
        for silent in (batch.dropped, batch.late, batch.worker.unsampled):
            if silent is not None and len(silent):
                keep[list(silent)] = False
        rows = batch.worker.rows[keep]
        gaps = now - self._last_s[rows]
        self.gaps.append(gaps[~np.isnan(gaps)])
        self._last_s[rows] = now
        if self._keep:
            for i in keep.nonzero()[0].tolist():
                self.tokens.setdefault(batch.reqs[i].rid, []).append(int(tokens[i]))

    def _ended(self, req: Req, now: float) -> None:
        assert req.finish is not None
        row = self._rows[req.rid]
        row.finish_s, row.output_tokens, row.cached_tokens = now, req.output_len, req.cached_tokens
        row.retractions, row.status = req.retractions, req.finish.status


@dataclasses.dataclass(slots=True)
class Replayed:
    """What a replay left."""

    config: SchedulerConfig
    rows: list[Row]
    gaps: np.ndarray
    tokens: dict[str, list[int]]
    wall_s: float

    def finish_times(self) -> list[float]:
        """Ascending."""
        return sorted(row.finish_s for row in self.rows)


def replay(
    backend: TorchBackend,
    loop: str,
    arrivals: list[Arrival],
    *,
    max_running: int,
    keep_tokens: bool = False,
    concurrency: int | None = None,
    batching: Batching = "prefill-first",
) -> Replayed:
    """Send requests through a loop over a runner, as their times come or ``concurrency`` at a time, and wait until all have
    ended."""
    config = SchedulerConfig(
        backend.kv_tokens, min(backend.max_context, backend.kv_tokens + 1), max_running=max_running, batching=batching
    )
    rows = {arrival.request_id: Row(arrival) for arrival in arrivals}
    recipe = Recipe(loop=LoopSpec(loop), scheduler=config, eos_token_ids=backend.eos_token_ids)
    backend.began_s = time.monotonic()
    outbox = Outbox(rows, max_running, backend.now_s, keep_tokens)
    backend.rested()
    inbox: Inbox | ClosedInbox = Inbox(arrivals, rows, backend.now_s)
    if concurrency is not None:
        inbox = ClosedInbox(arrivals, rows, backend.now_s, concurrency)
    with contextlib.suppress(Over):
        drive(start(recipe, backend, lambda scheduler: (inbox, outbox), backend.now_s).loop, backend.rested)
    gaps = np.concatenate(outbox.gaps) if outbox.gaps else np.empty(0)
    found = [rows[arrival.request_id] for arrival in arrivals]
    unfinished = [row.arrival.request_id for row in found if row.status != "finished"]
    assert not unfinished, f"{len(unfinished)} requests did not finish, {unfinished[0]} among them"
    return Replayed(config, found, gaps, outbox.tokens, backend.now_s())


def poisson(
    prompts: list[list[int]],
    outputs: list[int],
    rate: float,
    window_s: float,
    *,
    seed: int = 0,
    most: int | None = None,
) -> list[Arrival]:
    """Requests in turn, as Poisson arrivals at ``rate`` a second for ``window_s`` seconds, at least one."""
    draw = random.Random(seed)
    arrivals: list[Arrival] = []
    at = draw.expovariate(rate)
    while not arrivals or (at < window_s and (most is None or len(arrivals) < most)):
        i = len(arrivals)
        # A second round of the same prompts would be found in the prefix cache: a token in front makes them new.
        prompt = [1 + i // len(prompts), *prompts[i % len(prompts)][1:]]
        arrivals.append(Arrival(f"r{i}", at, prompt, outputs[i % len(prompts)]))
        at += draw.expovariate(rate)
    return arrivals


def write_trace(arrivals: list[Arrival], path: Path) -> None:
    """The trace in our own format; prompts share nothing, so lengths say all."""
    with path.open("w") as file:
        for a in arrivals:
            row = {
                "request_id": a.request_id,
                "arrival_s": round(a.arrival_s, 9),
                "input_length": len(a.prompt),
                "output_length": a.new_tokens,
            }
            file.write(json.dumps(row) + "\n")


def summary(done: Replayed) -> dict[str, float]:
    """The figures that predictions are held against; seconds."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in done.rows], np.float64)

    arrival = np.array([row.arrival.arrival_s for row in done.rows])
    first, finish, tokens = column("first_token_s"), column("finish_s"), column("output_tokens")
    several = tokens > 1
    tpot = (finish - first)[several] / (tokens - 1)[several] if several.any() else np.zeros(1)
    found = {
        "tokens_per_s": float(tokens.sum() / (finish.max() - arrival.min())),
        "requests": len(done.rows),
        "wall_s": done.wall_s,
    }
    for name, values in (("ttft", first - arrival), ("tpot", tpot), ("e2e", finish - arrival)):
        found[f"{name}_mean_s"] = float(values.mean())
        found[f"{name}_p99_s"] = float(np.percentile(values, 99))
    return found


def write_run(
    folder: Path,
    done: Replayed,
    log: IterationLog,
    backend: TorchBackend,
    *,
    run_name: str,
    trace: str,
    model: str,
    hardware: str,
) -> None:
    """The run record, as docs/run-record.md has it."""
    import shutil

    rows = done.rows
    times = ("queued_s", "scheduled_s", "first_token_s", "finish_s")
    counts = ("output_tokens", "cached_tokens", "retractions")
    requests: dict[str, Any] = {
        "request_id": [row.arrival.request_id for row in rows],
        "session_id": [""] * len(rows),
        "instance": np.zeros(len(rows), np.int64),
        "arrival_s": [row.arrival.arrival_s for row in rows],
        **{name: np.array([getattr(row, name) for row in rows], np.float64) for name in times},
        "input_tokens": np.array([len(row.arrival.prompt) for row in rows], np.int64),
        **{name: np.array([getattr(row, name) for row in rows], np.int64) for name in counts},
        "status": [row.status for row in rows],
    }
    meta = {
        "name": run_name,
        "trace": {"name": trace, "sha256": "", "notes": []},
        "model": model,
        "hardware": {"gpu": hardware, "gpus": 1, "simulated": False},
        "settings": {
            **dataclasses.asdict(done.config),
            "loop": run_name,
            "tp": 1,
            "pp": 1,
            "dp": 1,
            "ignore_eos": True,
        },
        "versions": {"numpy": np.__version__},
        "interrupted": False,
        "totals": {"requests": len(rows), "ended": len(rows), "iterations": len(log), "wall_s": round(done.wall_s, 6)},
    }
    if folder.exists():
        shutil.rmtree(folder)  # an earlier run of the same benchmark
    gaps = (done.gaps, np.ones(len(done.gaps), np.int64))
    write_record(RunRecord(meta, requests, log.columns(), gaps), folder)
