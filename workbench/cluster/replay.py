"""One replayed run: a trace through the scheduler and a real model runner, in real time, to a run record.

Clients and router are those of a simulated run, on a clock that follows the real one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from reports.record.meta import HardwareMeta, RunMeta, Totals
from reports.record.run_record import RunRecord
from traces import Trace
from workbench.clients.bounds import counted
from workbench.clients.live_clock import LiveClock
from workbench.clients.messages import END_OF_SEQUENCE, ClientRequest, Wording
from workbench.clients.sessions import Clients, Waiting
from workbench.cluster.cluster import Cluster
from workbench.cluster.device import DTYPE_NAMES, device_name, held_weights, runner_options
from workbench.cluster.interrupts import Interrupt, Interrupted, noted_interrupts, raised_interrupts
from workbench.cluster.progress import PROGRESS_EVERY_S, Progress
from workbench.cluster.router import Router
from workbench.instance import Recipe, start
from workbench.loops.drive import drive
from workbench.recording.meta_parts import settings_used, trace_meta, versions
from workbench.recording.recorder import Recorder, RecordingOutbox, decisions_file
from workbench.recording.trace_notes import trace_notes
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput
from workbench.scheduler.scheduler import StepResult
from workbench.settings.loop_spec import loop_spec
from workbench.settings.run_settings import RunSettings

if TYPE_CHECKING:
    from backends.torch.backend import TorchBackend, TorchForward


LONGEST_NAP_S = 0.1
"""While nothing is to be done, Ctrl-C is looked for so often."""


class ReplayOver(Exception):
    """Every request of the trace has ended."""


class ReplayInbox:
    """Delivers what the clients of a trace send, when the real clock gets there."""

    def __init__(
        self,
        clock: LiveClock,
        now_s: Callable[[], float],
        on_drain: Callable[[list[object]], None],
        interrupt: Interrupt,
        on_wait: Waiting,
    ) -> None:
        self._clock, self._on_drain = clock, on_drain
        self._messages: list[object] = []
        self._now_s, self._interrupt, self._on_wait = now_s, interrupt, on_wait

    def drain(self) -> list[object]:
        self._clock.advance_to(self._now_s())
        messages, self._messages = self._messages, []
        if messages:
            self._on_drain(messages)
        return messages

    def put(self, message: object) -> None:
        """Deliver a message now."""
        self._messages.append(message)

    def arrival(self) -> Callable[[], None]:
        return self._wait

    def _wait(self) -> None:
        while not self._messages:
            due_s = self._clock.peek()
            if due_s == float("inf"):
                raise ReplayOver
            while (early_s := due_s - self._now_s()) > 0:
                self._on_wait(due_s, due_s - early_s)
                time.sleep(min(early_s, LONGEST_NAP_S))
                self._interrupt.check()
            self._clock.advance_to(self._now_s())


class TraceStops:
    """Ends every request where the trace says, as a simulated model does: the token there becomes the end of sequence.

    A backend around another one; ``output_length(request_id)`` is the trace's.
    """

    def __init__(self, backend: TorchBackend, rows: int, output_length: Callable[[str], int]) -> None:
        self._backend = backend
        self._output_length = output_length
        self._last_len = np.zeros(rows, np.int64)
        """KV length at which each row samples its last token."""
        self.host, self.cpu = backend.host, backend.cpu

    def launch(self, batch: ModelWorkerBatch) -> _StoppedForward:
        for request in batch.new_requests:
            self._last_len[request.row] = request.input_len + self._output_length(request.request_id) - 1
        return _StoppedForward(self._backend.launch(batch), self._last_len[batch.rows])

    def sample(self, forward: _StoppedForward, masks: np.ndarray | None = None) -> None:
        self._backend.sample(forward.inner, masks)

    def copied(self, forward: _StoppedForward) -> Callable[[], object] | None:
        return self._backend.copied(forward.inner)

    def done(self, forward: _StoppedForward) -> Callable[[], object]:
        return self._backend.done(forward.inner)


class _StoppedForward:
    def __init__(self, inner: TorchForward, last_lens: np.ndarray) -> None:
        self.inner, self.batch = inner, inner.batch
        self._last_lens = last_lens

    def output(self) -> StepOutput:
        output = self.inner.output()
        ends = self.batch.seq_lens >= self._last_lens
        return replace(output, tokens=np.where(ends, END_OF_SEQUENCE, output.tokens))


class _Outbox(RecordingOutbox):
    """Records, and shows how far the run is."""

    progress: Progress | None = None
    due_s = 0.0

    def send(self, result: StepResult, now: float | None = None) -> None:
        super().send(result, now)
        self.show()

    def show(self) -> None:
        """Show how far the run is, if it is time to."""
        recorder = self._recorder
        now = recorder.now_s()
        if self.progress is not None and now >= self.due_s:
            self.progress(now, recorder.done, len(recorder.iterations))
            self.due_s = now + PROGRESS_EVERY_S


def replay_loop(
    settings: RunSettings,
    loop: str,
    trace: Trace,
    *,
    device: str,
    load_format: str,
    trace_sha256: str,
    command: str,
    progress: Progress | None = None,
    decisions: Path | None = None,
    waiting: Waiting | None = None,
) -> RunRecord:
    """Run a trace on a real runner under one loop and return its record; ``meta['interrupted']`` tells whether it was
    stopped early.

    Raises ModelNotFound, UnsupportedModel, BadCheckpoint, NoRoomForKV, ConfigError, ValueError for a missing device, and
    TraceError.
    """
    from backends.torch.backend import make_backend

    with raised_interrupts():
        backend = make_backend(runner_options(settings, loop, device, load_format), lambda row: None)
    try:
        with decisions_file(decisions) as file:
            return replay_on(backend, settings, loop, trace, trace_sha256, command, device, progress, file, waiting)
    finally:
        backend.close()


def replay_on(
    backend: TorchBackend,
    settings: RunSettings,
    loop: str,
    trace: Trace,
    trace_sha256: str,
    command: str,
    device: str,
    progress: Progress | None = None,
    decisions: IO[str] | None = None,
    waiting: Waiting | None = None,
) -> RunRecord:
    """Run a trace on a backend that is at rest; it can run another one afterwards, unless it was interrupted."""
    tp, pp = settings.layout(loop)
    config = settings.scheduler(backend.kv_tokens, backend.max_context, settings.slots(loop))
    recipe = Recipe(loop=loop_spec(settings, loop), scheduler=config, eos_token_ids=(END_OF_SEQUENCE,), stages=pp)
    recorder = Recorder(backend.now_s)
    backend.log_to(recorder.iterations.append)
    clock = LiveClock()
    wording = Wording(backend.vocab, settings.seed, settings.max_tokens, settings.ignore_eos, settings.slo_ttft)

    def wait(due_s: float, now_s: float) -> None:
        outbox.show()
        if waiting is not None:
            waiting(due_s, now_s)

    with noted_interrupts() as interrupt:
        inbox = ReplayInbox(clock, backend.now_s, recorder.queued, interrupt, wait)

        cluster = Cluster(Router(settings.router, 1), recorder, [inbox])

        def deliver(request: ClientRequest, arrival_s: float) -> None:
            wording.message(request, arrival_s)
            cluster.send(request)

        def ended(request: ClientRequest) -> None:
            cluster.ended(request)
            clock.advance_to(backend.now_s())
            clients.ended(request)

        stops = TraceStops(backend, recipe.rows, recorder.output_length)
        outbox = _Outbox(recorder, recipe.rows, ended, decisions, 0, config.room)
        outbox.progress = progress
        instance = start(recipe, stops, lambda scheduler: (inbox, outbox), backend.now_s)
        backend.began_s = time.monotonic()  # the model is loaded: the trace begins now
        clients = Clients(clock, map(ClientRequest, trace), deliver, settings.concurrency)
        finished = True

        def waited() -> None:
            interrupt.check()
            backend.rested()

        try:
            drive(instance.loop, waited)
        except ReplayOver:
            if clients.fault is not None:
                raise clients.fault from None
        except Interrupted:
            finished = False
    weights = held_weights(backend.dtype, settings)
    meta = RunMeta(
        kind="replayed",
        name=loop,
        command=command,
        trace=trace_meta(trace, trace_sha256, trace_notes(settings, recorder.rows)),
        model=settings.model,
        hardware=HardwareMeta(device_name(device), tp * pp, simulated=False),
        settings=settings_used(
            settings,
            loop=loop,
            tp=tp,
            pp=pp,
            gpu=None,
            cost=None,
            dtype=weights["dtype"],
            kv_dtype=DTYPE_NAMES[backend.kv_dtype],
            kv_tokens=config.kv_tokens,
            max_context=config.max_context,
            backend=device,
        ),
        weights=weights,
        versions=versions("simpy", "torch"),
        interrupted=not finished,
        totals=Totals(
            requests=len(recorder.rows),
            ended=recorder.done,
            iterations=len(recorder.iterations),
            cut=counted(recorder.cuts),
            wall_s=round(backend.now_s(), 6),
        ),
    )
    return recorder.record(meta)
