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

from reports.record.schema import FINISHED
from traces import Trace, TraceRequest
from traces.requests.content import TokenIds
from workbench.clients.bounds import Bound, Cause, bound_of
from workbench.clients.live_clock import LiveClock
from workbench.clients.messages import ClientRequest
from workbench.clients.openai_client import Answer, CompletionsClient, ServerRefused
from workbench.clients.sessions import Clients, Waiting
from workbench.scheduler.config import ConfigError
from workbench.settings.run_settings import LoadSettings

PROGRESS_EVERY_S = 0.1
HOPELESS = 20
"""So many failures before the first success end a run."""
ANY_ID = np.iinfo(np.int32).max
"""The vocabulary of a model of which nothing is known."""
Progress = Callable[[float, int, int, int, int], None]
"""Called a few times a second with seconds, requests sent, ended and failed, and pieces received."""


@dataclass(frozen=True)
class ObserveSettings(LoadSettings):
    """The load to send, and the server to send it to. Raises ConfigError for what cannot work."""

    url: str
    model: str | None = None
    """The name the server knows it by; None: the only one it serves."""
    max_tokens: int | None = None
    """Output bound of requests that have none; None: what the trace says they write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens: {self.max_tokens} is less than 1")


def known_or(value: Any, other: Any) -> Any:
    """Return ``value``, or ``other`` where it is None."""
    return other if value is None else value


@dataclass(slots=True)
class Sent:
    """One request, and what came back."""

    request: ClientRequest
    arrival_s: float
    prompt_tokens: int
    late_s: float
    bound: Bound
    answer: Answer

    def cut(self) -> tuple[Cause, int] | None:
        """Return what cut the answer, and tokens that were not written; None where nothing did, or nobody can tell."""
        written = known_or(self.answer.output_tokens, len(self.answer.chunk_s))
        missing = self.request.trace.output_length - written
        if self.answer.status != FINISHED or missing <= 0:
            return None
        if self.bound.tokens < self.request.trace.output_length and written >= self.bound.tokens:
            return self.bound.cause, missing
        # Fewer than were asked for, and the server says that there was no room for more.
        return ("server", missing) if self.answer.reason == "length" and self.answer.output_tokens is not None else None


class Observer:
    """Client that sends a trace's requests when they are due and collects what comes back."""

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
        self.rows: list[Sent] = []
        self.interrupted = False
        self.progress = progress
        self.waiting: Waiting | None = None
        self.trace, self._vocab_of = trace, vocab_of
        self._began_s = time.monotonic()
        self.client = CompletionsClient(settings.url, settings.model, self.now_s, api_key=api_key, text_of=text_of)
        self._clock = LiveClock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended = self.failed = 0
        self._finished = self._pieces = 0

    def now_s(self) -> float:
        """Seconds since the trace began."""
        return time.monotonic() - self._began_s

    async def run(self) -> None:
        """Run to the end of the trace, or to an interrupt from the keyboard.

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
        requests = map(ClientRequest, self.trace)
        self._clients = clients = Clients(self._clock, requests, self._deliver, self.settings.concurrency)
        due_s = 0.0
        while not self.interrupted:
            self._wake.clear()
            self._clock.advance_to(self.now_s())
            if clients.fault is not None:
                raise clients.fault
            if self._finished == 0 and self.failed >= HOPELESS:
                break
            due_next_s = self._clock.peek()
            if not self._tasks:
                if due_next_s == float("inf"):
                    break
                if self.waiting is not None:
                    self.waiting(due_next_s, self.now_s())
            if self.progress is not None and self.now_s() >= due_s:
                self.progress(self.now_s(), len(self.rows), self.ended, self.failed, self._pieces)
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
        row = Sent(request, arrival_s, len(prompt), late_s, bound, Answer(arrival_s))
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

    async def _ask(self, row: Sent, prompt: np.ndarray) -> None:
        request, answer = row.request, row.answer
        try:
            await self.client.complete(request.trace.request_id, prompt, row.bound.tokens, answer)
        except asyncio.CancelledError:
            return  # interrupted: it stays unfinished
        if answer.resent:
            # What it was refused for is not the server's latency: it arrived when it was put in words that the server takes.
            row.arrival_s = answer.sent_s
        self.ended += 1
        self._pieces += len(answer.chunk_s)
        if answer.status == FINISHED:
            self._finished += 1
        else:
            self.failed += 1
        self._clock.advance_to(self.now_s())
        self._clients.ended(request)
        self._wake.set()


def observe(observer: Observer) -> None:
    """Run an observer in an event loop of its own."""
    gc.disable()  # a pause of the collector would be measured as the server's
    try:
        asyncio.run(observer.run())
    finally:
        gc.enable()


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
