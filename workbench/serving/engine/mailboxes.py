"""The scheduler process's inbox and outbox: sockets on one side, a loop on the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import zmq

from workbench.backend import Wait
from workbench.scheduler.batch import Logprobs, ModelWorkerBatch
from workbench.scheduler.messages import (
    Abort,
    FlushCache,
    Generate,
    GetState,
    Pause,
    Profile,
    Resume,
    SetState,
    Stop,
    UpdateWeights,
)
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult
from workbench.serving.engine.live_record import LiveRecord
from workbench.serving.engine.upkeep import Upkeep
from workbench.serving.engine.vitals import Vitals
from workbench.serving.engine.wire import (
    Ask,
    Cancel,
    Change,
    Control,
    Done,
    Ended,
    LoadWeights,
    Opened,
    SessionControl,
    Shutdown,
    StartProfile,
    Step,
    StopFound,
    StopProfile,
    Submit,
    TokenLogprob,
    decode_to_scheduler,
    encode,
)
from workbench.serving.sessions import session_message

_CONTROLS = {"flush_cache": FlushCache, "pause": Pause, "resume": Resume}


class Ending(Exception):
    """The server is told to end: leaves the loop through its driver, with the ``messages`` that came before."""

    def __init__(self, messages: list[object]) -> None:
        super().__init__()
        self.messages = messages


class LiveInbox:
    """What other processes send, as messages of the scheduler. ``socket`` is this process's PULL socket."""

    def __init__(self, socket: Any, outbox: LiveOutbox, http: Any, vitals: Vitals, upkeep: Upkeep) -> None:
        self._socket = socket
        self._outbox = outbox
        self._http = http
        self._vitals = vitals
        self._upkeep = upkeep
        self._done: list[Done] = []

    def drain(self) -> list[object]:
        """Everything that has come. Raises :class:`Ending` when that includes a :class:`Shutdown`."""
        self._vitals.moved()
        self.confirm()
        found: list[object] = []
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return found
            message = decode_to_scheduler(data)
            if isinstance(message, Submit):
                found.append(self._outbox.admit(message))
            elif isinstance(message, Cancel):
                found.append(Abort(message.request_id, message.why))
            elif isinstance(message, StopFound):
                # First, for it may have come first: the socket takes turns among its senders, and the client that was
                # told of this end may have sent its session's next turn.
                found.insert(0, Stop(message.request_id, message.output_tokens))
            elif isinstance(message, Control):
                found.append(_CONTROLS[message.action]())
                self._done.append(Done(message.number))
            elif isinstance(message, Ask):
                found.append(self._ask(message.number))
            elif isinstance(message, Change):
                found.append(self._change(message))
            elif isinstance(message, SessionControl):
                found.append(session_message(message, self._done.append))
            elif isinstance(message, LoadWeights):
                found.append(self._load_weights(message))
            elif isinstance(message, StartProfile | StopProfile):
                found.append(self._profile(message))
            else:
                assert isinstance(message, Shutdown)
                raise Ending(found)

    def _ask(self, number: int) -> GetState:
        return GetState(lambda state: self._done.append(Done(number, state)))

    def _change(self, message: Change) -> SetState:
        def tell(refused: str | None) -> None:
            self._done.append(Done(message.number, refused=refused))
            if refused is None:
                self._outbox.changed(message.settings)

        return SetState(message.settings, tell)

    def _load_weights(self, message: LoadWeights) -> UpdateWeights:
        def check() -> None:
            self._vitals.resting()  # reading weights may take minutes, and is not being stuck
            self._upkeep.check_weights(message.folder)

        def tell(refused: str | None) -> None:
            self._vitals.moved()
            self._done.append(Done(message.number, refused=refused))
            if refused is None:
                self._outbox.weights_updated(message.folder)

        return UpdateWeights(check, self._upkeep.write_weights, tell)

    def _profile(self, message: StartProfile | StopProfile) -> Profile:
        files: list[str] = []

        def act() -> None:
            self._vitals.resting()  # writing a trace may take minutes, too
            try:
                if isinstance(message, StartProfile):
                    self._upkeep.start_profile(message.folder, message.steps)
                else:
                    files.extend(self._upkeep.stop_profile())
            finally:
                self._vitals.moved()

        return Profile(act, lambda refused: self._done.append(Done(message.number, {"files": files}, refused)))

    def arrival(self) -> Wait:
        self.confirm()
        return self._wait

    def confirm(self) -> None:
        """Answer the controls of the last drain: the scheduler has handled them by now."""
        for done in self._done:
            self._http.send(encode(done))
        self._done.clear()

    def _wait(self) -> None:
        self._vitals.resting()
        self._socket.poll()
        self._vitals.moved()


class LiveOutbox:
    """Sends what each step has brought to the detokenizer, and keeps the counts.

    Which stream a token belongs to is looked up by table row, for a whole batch at once.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        socket: Any,
        vitals: Vitals,
        record: LiveRecord | None,
        epoch_s: float,
        slo_ttft_s: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._socket = socket
        self._vitals = vitals
        self._record = record
        self._epoch_s = epoch_s
        self._slo_ttft_s = slo_ttft_s
        """Of requests that have none of their own."""
        self._streams: dict[str, int] = {}
        self._logprobs: dict[int, int] = {}
        """By stream, how many alternatives were asked for."""
        self._stream_of_row = np.zeros(scheduler.kv.table.rows, np.int64)
        self._epoch = -1
        self._epoch_streams = b""
        """Of the rows of the batches of ``_epoch``."""

    def admit(self, message: Submit) -> Generate:
        """Note a new sequence; returns it as the scheduler takes it."""
        params = message.params
        stop_ids = () if params.ignore_eos else (*self._scheduler.eos_token_ids, *params.stop_token_ids)
        self._streams[message.request_id] = message.stream
        if params.logprobs is not None:
            self._logprobs[message.stream] = params.logprobs
        self._socket.send(
            encode(
                Opened(
                    message.stream,
                    message.request_id,
                    message.stop,
                    params.min_new_tokens,
                    stop_ids,
                    message.skip_special_tokens,
                )
            )
        )
        generate = Generate(
            message.request_id,
            np.frombuffer(message.prompt, np.int32),
            params,
            message.arrival_s - self._epoch_s,
            message.priority,
            message.namespace,
            self._slo_ttft_s if message.slo_ttft_s is None else message.slo_ttft_s,
            session=message.session,
            bos_tokens=message.bos_tokens,
        )
        if self._record is not None:
            self._record.arrived(generate, message.slo_ttft_s, message.slo_tpot_s)
        return generate

    def changed(self, settings: dict[str, Any]) -> None:
        """The scheduler goes on with other settings."""
        if self._record is not None:
            self._record.changed(settings)

    def weights_updated(self, folder: str) -> None:
        """The model goes on with other weights."""
        if self._record is not None:
            self._record.weights_updated(folder)

    def scheduled(self, batch: ScheduleBatch) -> None:
        for new in batch.worker.new_requests:
            self._stream_of_row[new.row] = self._streams[new.request_id]
        if batch.worker.new_requests:
            self._epoch = -1
        self._vitals.retractions += len(batch.retracted)
        if self._record is not None:
            self._record.scheduled(batch)

    def send(self, result: StepResult) -> None:
        streams, tokens, count = b"", b"", 0
        logprobs = None
        if result.batch is not None and result.output is not None:
            emits = _emitting(result.batch)
            logprobs = self._asked_logprobs(result.batch, emits, result.output.logprobs)
            streams, tokens, count = self._pairs(result.batch.worker, result.output.tokens, emits)
        first = [(self._streams[req.rid], req.input_len, req.cached_tokens) for req in result.first]
        ended = [self._forget(req) for req in result.ended]
        # Noted before it is sent: a client may have it before the next line runs.
        at_s = self._record.now_s() if self._record is not None else 0.0
        if count or ended:
            self._socket.send(encode(Step(streams, tokens, first, ended, logprobs)))
        vitals = self._vitals
        vitals.generated_tokens += count
        computed = [req for req in result.ended if not req.output_len and req.finish and req.finish.kind == "length"]
        for req in (*result.first, *computed):
            vitals.prompt_tokens += req.input_len
            vitals.cached_prompt_tokens += req.cached_tokens
        if self._record is not None:
            self._record.send(result, at_s)

    def _pairs(self, batch: ModelWorkerBatch, tokens: np.ndarray, emits: np.ndarray | None) -> tuple[bytes, bytes, int]:
        rows = batch.rows
        if emits is not None:
            return (
                self._stream_of_row[rows[emits]].tobytes(),
                tokens[emits].astype(np.int32).tobytes(),
                int(emits.sum()),
            )
        if batch.epoch != self._epoch:
            self._epoch, self._epoch_streams = batch.epoch, self._stream_of_row[rows].tobytes()
        return self._epoch_streams, tokens.astype(np.int32, copy=False).tobytes(), len(rows)

    def _forget(self, req: Req) -> Ended:
        assert req.finish is not None
        stream = self._streams.pop(req.rid)
        self._logprobs.pop(stream, None)
        return Ended(stream, req.finish.kind, req.finish.detail, req.input_len, req.cached_tokens)

    def _asked_logprobs(
        self, batch: ScheduleBatch, emits: np.ndarray | None, values: Logprobs | None
    ) -> dict[int, TokenLogprob] | None:
        if values is None or not self._logprobs:
            return None
        chosen, top_values, top_ids = values
        found = {}
        for i, stream in enumerate(self._stream_of_row[batch.worker.rows].tolist()):
            count = self._logprobs.get(stream)
            if count is not None and (emits is None or emits[i]):
                found[stream] = TokenLogprob(
                    float(chosen[i]),
                    [int(t) for t in top_ids[i][:count]],
                    [float(v) for v in top_values[i][:count]],
                )
        return found


def _emitting(batch: ScheduleBatch) -> np.ndarray | None:
    """bool[n]: rows whose sample is a token of their sequence; None when all are."""
    if batch.worker.unsampled is None and not batch.dropped:
        return None
    emits = np.ones(len(batch.worker.rows), bool)
    if batch.worker.unsampled is not None:
        emits[batch.worker.unsampled] = False
    if batch.dropped:
        emits[list(batch.dropped)] = False
    return emits
