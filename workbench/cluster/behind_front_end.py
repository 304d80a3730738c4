"""A front end between the clients of a simulated run and an instance: requests pass it, and so does what they are told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from backends.simulated.clock import Clock
from backends.simulated.front_end import FrontEnd
from workbench.clients.messages import ClientRequest
from workbench.cluster.cluster import Mailbox
from workbench.recording.recorder import Recorder, RecordingOutbox
from workbench.scheduler.messages import Generate
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import StepResult


class FrontEndInbox:
    """The inbox of an instance as clients see it: messages are there once the front end has handled them."""

    def __init__(self, clock: Clock, front_end: FrontEnd, inner: Mailbox) -> None:
        self._clock, self._front_end, self._inner = clock, front_end, inner
        self.drain, self.arrival = inner.drain, inner.arrival

    def put(self, message: object) -> None:
        """A client sends a message now."""
        self._clock.call_at(self._clock.now_s() + self._front_end.model.latency_s, partial(self._handle, message))

    def _handle(self, message: object) -> None:
        tokens = len(message.prompt) if isinstance(message, Generate) else 0
        handled_s = self._front_end.request(self._clock.now_s(), tokens)
        self._clock.call_at(handled_s, partial(self._inner.put, message))


class FrontEndOutbox(RecordingOutbox):
    """The outbox of an instance behind a front end: records what clients see, and when. They are told of an end when they
    see it."""

    def __init__(
        self,
        clock: Clock,
        front_end: FrontEnd,
        recorder: Recorder,
        table_rows: int,
        on_end: Callable[[ClientRequest], None],
        *more: Any,
    ) -> None:
        super().__init__(recorder, table_rows, self._told, *more)
        self._clock, self._front_end, self._tell = clock, front_end, on_end
        self._moment_s = 0.0

    def send(self, result: StepResult, now: float | None = None) -> None:
        batch = result.batch
        chunks = 0 if batch is None else batch.worker.num_samples - len(batch.dropped or ())
        self._moment_s = self._front_end.result(self._clock.now_s() if now is None else now, chunks)
        super().send(result, self._moment_s)

    def send_decodes(self, batch: ScheduleBatch, moments_s: list[float]) -> None:
        super().send_decodes(batch, self._front_end.results(moments_s, len(batch.worker.rows)))

    def _told(self, request: ClientRequest) -> None:
        self._clock.call_at(self._moment_s, partial(self._tell, request))
