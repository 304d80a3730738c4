"""One observed run: a trace sent to a server that somebody else runs, to a run record.

The clients are those of a simulated run, on a clock that follows the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from reports.record.run_record import RunRecord
from reports.record.schema import ABORTED, FINISHED, REJECTED
from traces import Trace, TraceRequest
from traces.requests.content import TokenIds
from workbench.clients.bounds import Bound, Cause, bound_of, counted
from workbench.clients.live_clock import LiveClock
from workbench.clients.messages import ClientRequest
from workbench.clients.openai_client import Answer, CompletionsClient, ServerRefused
from workbench.clients.sessions import Clients, Waiting
from workbench.recording.meta import run_meta, trace_meta
from workbench.scheduler.config import ConfigError
from workbench.settings.run_settings import LoadSettings

PROGRESS_EVERY_S = 0.1
HOPELESS = 20
"""So many failures before the first success end a run."""
ANY_ID = np.iinfo(np.int32).max
"""The vocabulary of a model of which nothing is known."""
LATE_S = 0.02
"""A client that sends later than this on average is the bottleneck itself: the record says so."""
Progress = Callable[[float, int, int, int, int], None]
"""Called a few times a second with seconds, requests sent, ended and failed, and pieces received."""


@dataclass(frozen=True)
class ObserveSettings(LoadSettings):
    """What to send where. Raises ConfigError for what cannot work."""

    url: str
    model: str | None = None
    """The name the server knows it by; None: the only one it serves."""
    max_tokens: int | None = None
    """Output bound of requests that have none; None: what the trace says they write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens: {self.max_tokens} is less than 1")


@dataclass(slots=True)
class _Row:
    request: ClientRequest
    arrival_s: float
    prompt_tokens: int
    late_s: float
    bound: Bound
    answer: Answer

    def cut(self) -> tuple[Cause, int] | None:
        """What cut the answer, and tokens that were not written; None where nothing did, or nobody can tell."""
        written = _or(self.answer.output_tokens, len(self.answer.chunk_s))
        missing = self.request.trace.output_length - written
        if self.answer.status != FINISHED or missing <= 0:
            return None
        if self.bound.tokens < self.request.trace.output_length and written >= self.bound.tokens:
            return self.bound.cause, missing
        # Fewer than were asked for, and the server says that there was no room for more.
        return ("server", missing) if self.answer.reason == "length" and self.answer.output_tokens is not None else None


class Observer:
    """Sends a trace's requests when they are due and collects what comes back."""

    def __init__(
        self,
        settings: ObserveSettings,
        trace: Trace,
        vocab_of: Callable[[str], int | None],
        *,
        api_key: str | None = None,
        text_of: Callable[[np.ndarray], str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.rows: list[_Row] = []
        self.interrupted = False
        self.progress = progress
        self.waiting: Waiting | None = None
        self._trace, self._vocab_of = trace, vocab_of
        self._began_s = time.monotonic()
        self.client = CompletionsClient(settings.url, settings.model, self.now_s, api_key=api_key, text_of=text_of)
        self._clock = LiveClock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = self._finished = self._failed = self._pieces = 0

    def now_s(self) -> float:
        """Seconds since the trace began."""
        return time.monotonic() - self._began_s

    async def run(self) -> None:
        """To the end of the trace, or to an interrupt from the keyboard.

        Raises ServerRefused when no request could be run, and TraceError.
        """
        async with self.client:
            await self.client.find_model()
            self._vocab = self._vocab_of(self.client.model)
            self._wake = asyncio.Event()
            try:
                with _interrupts(self._interrupt):
                    await self._send_all()
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send_all(self) -> None:
        self._began_s = time.monotonic()
        requests = map(ClientRequest, self._trace)
        self._clients = clients = Clients(self._clock, requests, self._deliver, self.settings.concurrency)
        due_s = 0.0
        while not self.interrupted:
            self._wake.clear()
            self._clock.advance_to(self.now_s())
            if clients.fault is not None:
                raise clients.fault
            if self._finished == 0 and self._failed >= HOPELESS:
                break
            due_next_s = self._clock.peek()
            if not self._tasks:
                if due_next_s == float("inf"):
                    break
                if self.waiting is not None:
                    self.waiting(due_next_s, self.now_s())
            if self.progress is not None and self.now_s() >= due_s:
                self.progress(self.now_s(), len(self.rows), self._ended, self._failed, self._pieces)
                due_s = self.now_s() + PROGRESS_EVERY_S
            wait_s = min(max(due_next_s - self.now_s(), 0.0), PROGRESS_EVERY_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
        if not self._finished and not self.interrupted:
            self._give_up()

    def _give_up(self) -> None:
        words = Counter(
            row.answer.message or row.answer.status for row in self.rows if row.answer.status != "unfinished"
        )
        if not words:
            raise ServerRefused("the trace holds no request")
        word, count = words.most_common(1)[0]
        raise ServerRefused(
            f"{self.client.url}: no request could be run; {count} of {len(self.rows)} ended with: {word}"
        )

    def _interrupt(self) -> None:
        self.interrupted = True
        self._wake.set()

    def _deliver(self, request: ClientRequest, arrival_s: float) -> None:
        prompt = self._prompt(request.trace)
        late_s = self.now_s() - arrival_s
        bound = bound_of(request.trace, self.settings.max_tokens, length_known=True)
        row = _Row(request, arrival_s, len(prompt), late_s, bound, Answer(arrival_s))
        self.rows.append(row)
        task = asyncio.get_running_loop().create_task(self._ask(row, prompt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _prompt(self, request: TraceRequest) -> np.ndarray:
        if self._vocab is not None:
            return request.prompt_tokens(self._vocab, self.settings.seed)
        if isinstance(request.content, TokenIds):
            return request.prompt_tokens(ANY_ID, self.settings.seed)  # the server knows which ids it has
        raise ServerRefused(
            f"model: the trace holds lengths, and {self.client.model!r} is not in the catalogue, so which token ids "
            "it knows is unknown: give --vocab or --tokenizer"
        )

    async def _ask(self, row: _Row, prompt: np.ndarray) -> None:
        request, answer = row.request, row.answer
        try:
            await self.client.complete(request.trace.request_id, prompt, row.bound.tokens, answer)
        except asyncio.CancelledError:
            return  # interrupted: it stays unfinished
        if answer.resent:
            # What it was refused for is not the server's latency: it arrived when it was put in words that the server takes.
            row.arrival_s = answer.sent_s
        self._ended += 1
        self._pieces += len(answer.chunk_s)
        if answer.status == FINISHED:
            self._finished += 1
        else:
            self._failed += 1
        self._clock.advance_to(self.now_s())
        self._clients.ended(request)
        self._wake.set()

    # -- the record ---------------------------------------------------------------------------------------------------

    def record(self, trace_sha256: str, command: str) -> RunRecord:
        """What was seen. ``queued_s`` and ``scheduled_s`` only the server knows."""
        # A request that was put again in other words arrived then; a record is in order of arrival.
        rows = sorted(self.rows, key=lambda row: row.arrival_s)
        answers = [row.answer for row in rows]
        nan = np.full(len(rows), np.nan)
        columns: dict[str, Any] = {
            "request_id": [row.request.trace.request_id for row in rows],
            "session_id": [row.request.trace.session_id or "" for row in rows],
            "instance": np.zeros(len(rows), np.int64),
            "arrival_s": np.array([row.arrival_s for row in rows]),
            "queued_s": nan,
            "scheduled_s": nan,
            "first_token_s": np.array([a.chunk_s[0] if a.chunk_s else np.nan for a in answers]),
            "finish_s": np.array([a.finish_s for a in answers]),
            "input_tokens": np.array([_or(row.answer.prompt_tokens, row.prompt_tokens) for row in rows], np.int64),
            "output_tokens": np.array([_or(a.output_tokens, len(a.chunk_s)) for a in answers], np.int64),
            "cached_tokens": np.array([a.cached_tokens for a in answers], np.int64),
            "retractions": np.zeros(len(rows), np.int64),
            "status": [a.status for a in answers],
            "slo_ttft_s": np.array([_or(row.request.trace.slo_ttft_s, np.nan) for row in rows]),
            "slo_tpot_s": np.array([_or(row.request.trace.slo_tpot_s, np.nan) for row in rows]),
            "priority": np.array([row.request.trace.priority for row in rows], np.int64),
            "turn": np.array([row.request.trace.turn for row in rows], np.int64),
        }
        gaps = np.concatenate([np.empty(0), *(np.diff(a.chunk_s) for a in answers)])
        settings = self.settings
        late = np.array([row.late_s for row in rows]) if rows else np.zeros(1)
        found = {"model": self.client.model, "dp": 1, "pp": 1, "ignore_eos": self.client.dialect.ignore_eos}
        said = trace_meta(self._trace, trace_sha256)
        meta = run_meta(
            name="observed",
            command=command,
            model=self.client.model,
            gpu="unknown",
            gpus=None,
            simulated=False,
            trace={**said, "notes": [*said["notes"], *self._notes(rows, float(late.mean()))]},
            hardware={"url": self.client.url},
            settings=settings,
            found=found,
            ran_on=("simpy", "httpx2"),
            interrupted=self.interrupted,
            totals={
                "requests": len(rows),
                "ended": self._ended,
                "failed": self._failed,
                "iterations": 0,
                "wall_s": round(self.now_s(), 6),
                "pieces": int(sum(len(a.chunk_s) for a in answers)),
                "resent": sum(a.resent for a in answers),
                "late_mean_s": round(float(late.mean()), 6),
                "late_max_s": round(float(late.max()), 6),
                "cut": counted(cut for row in rows if (cut := row.cut()) is not None),
            },
            observed=True,
        )
        return RunRecord(meta, columns, _no_iterations(), (gaps, np.ones(len(gaps), np.int64)))

    def _notes(self, rows: list[_Row], late_s: float) -> list[str]:
        notes = list(self.client.dialect.notes)
        finished = [row for row in rows if row.answer.status == FINISHED]
        if finished and all(row.answer.output_tokens is None for row in finished):
            notes.append("the server reported no token counts: output tokens are the pieces they came in")
        tokens = sum(row.answer.output_tokens or 0 for row in finished)
        pieces = sum(len(row.answer.chunk_s) for row in finished)
        if tokens > 1.02 * pieces > 0:
            notes.append(f"{tokens} tokens came in {pieces} pieces: gaps in itl.csv are between pieces")
        wrong = sum(_or(row.answer.prompt_tokens, row.prompt_tokens) != row.prompt_tokens for row in finished)
        if wrong:
            notes.append(f"{wrong} prompts had another length on the server than in the trace")
        short = sum(
            row.answer.output_tokens is not None and row.answer.output_tokens < row.request.trace.output_length
            for row in finished
            if row.cut() is None
        )
        if short:
            notes.append(f"{short} answers ended before the length in the trace")
        for what, has in (
            ("priorities", any(row.request.trace.priority for row in rows)),
            ("adapters", any(row.request.trace.adapter for row in rows)),
        ):
            if has:
                notes.append(f"{what} of the trace were not sent")
        if late_s > LATE_S:
            notes.append(f"this client was {late_s * 1e3:.0f} ms late on average: it is too slow for this load")
        return notes


def failures(record: RunRecord, answers: Observer) -> str | None:
    """One line about requests that failed, or None."""
    lost = [row for row in answers.rows if row.answer.status.split(":")[0] in (REJECTED, ABORTED)]
    if not lost:
        return None
    counts = Counter(row.answer.status for row in lost)
    listed = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"{len(lost)} of {len(record.requests['status'])} requests failed: {listed}; first: {lost[0].answer.message}"


def observe(observer: Observer) -> None:
    """Run an observer in an event loop of its own."""
    gc.disable()  # a pause of the collector would be measured as the server's
    try:
        asyncio.run(observer.run())
    finally:
        gc.enable()


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value


def _no_iterations() -> dict[str, np.ndarray]:
    from reports.record.schema import ITERATION_COLUMNS

    return {name: np.zeros(0, np.int64) for name in ITERATION_COLUMNS}


@contextlib.contextmanager
def _interrupts(handle: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``handle`` instead of raising in the middle of something; a second one is as usual."""
    loop = asyncio.get_running_loop()

    def once() -> None:
        handle()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, once)
    except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not in the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
