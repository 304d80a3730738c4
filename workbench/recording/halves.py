"""The record of requests that one instance prefills and another decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

from reports.record.schema import CHUNK, RETRACTED
from workbench.clients.messages import ClientRequest
from workbench.recording.recorder import HandoverTimes, Recorder, RecordingOutbox, decision_lines
from workbench.scheduler.disaggregated.letters import PagesSetAside
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Finish, Req
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import StepResult

Retries = Callable[[ClientRequest, Finish, bool], bool]
"""Is told of a request that was lost, why, and whether any of its output was sent; tells whether it is sent once more."""


class HalfNotes:
    """Moments of requests, as far as inboxes and wires of their two instances tell."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def _times(self, request_id: str) -> HandoverTimes | None:
        """The times of an open request, as long as it does not decode: nothing that comes later counts."""
        row = self._recorder.by_id.get(request_id)
        times = None if row is None else row.handover
        return times if times is not None and times.decode_admission_s != times.decode_admission_s else None

    def prefill_drained(self, messages: list[object]) -> None:
        """A prefill instance has taken messages out of its inbox."""
        self._recorder.queued([message for message in messages if isinstance(message, Generate)])
        for message in messages:
            if isinstance(message, PagesSetAside):
                self.pages_known(message.request_id)

    def pages_known(self, request_id: str) -> None:
        """A prefill instance has been told of pages for a request."""
        if (times := self._times(request_id)) is not None:
            times.bootstrap_s = self._recorder.now_s()

    def transfer_started(self, request_id: str) -> None:
        if (times := self._times(request_id)) is not None:
            times.transfer_start_s = self._recorder.now_s()

    def transfer_ended(self, request_id: str) -> None:
        if (times := self._times(request_id)) is not None:
            times.transfer_end_s = self._recorder.now_s()

    def prefill_started(self, request_id: str) -> None:
        """The CPU begins to put together a batch in which a request starts."""
        now = self._recorder.now_s()
        row = self._recorder.by_id.get(request_id)
        if row is not None and row.scheduled_s != row.scheduled_s:
            row.scheduled_s = now
        times = self._times(request_id)
        if times is not None and times.prefill_start_s != times.prefill_start_s:
            times.prefill_start_s = now

    def prefill_ended(self, request_id: str) -> None:
        """The result of its last chunk is out."""
        if (times := self._times(request_id)) is not None:
            times.prefill_end_s = self._recorder.now_s()


class PrefillOutbox:
    """The outbox of an instance that prefills alone. ``on_end`` is told of every request that it is done with."""

    def __init__(
        self,
        recorder: Recorder,
        notes: HalfNotes,
        on_end: Callable[[Req], None],
        decisions: IO[str] | None,
        instance: int,
    ) -> None:
        self._recorder, self._notes = recorder, notes
        self._on_end = on_end
        self._decisions = decisions
        self._instance = instance

    def scheduled(self, batch: ScheduleBatch) -> None:
        step = batch.worker.step
        events = self._recorder.events
        events += [(req.rid, self._instance, step, RETRACTED, 0) for req in batch.retracted]
        events += [(part.req.rid, self._instance, step, CHUNK, part.end - part.start) for part in batch.prefill]
        for new in batch.worker.new_requests:
            self._notes.prefill_started(new.request_id)
        if self._decisions is not None:
            self._decisions.writelines(decision_lines(batch, (batch.worker.kv_used_tokens,), self._instance))

    def send(self, result: StepResult) -> None:
        batch = result.batch
        if batch is not None:
            for i, part in enumerate(batch.prefill):
                if part.last and i not in (batch.dropped or ()):
                    self._notes.prefill_ended(part.req.rid)
        for req in result.first:
            row = self._recorder.by_id.get(req.rid)
            if row is not None and row.first_token_s != row.first_token_s:
                row.first_token_s = self._recorder.now_s()
        for req in result.ended:
            self._on_end(req)


class DecodeOutbox(RecordingOutbox):
    """The outbox of an instance that decodes alone."""

    retries: Retries | None = None

    def send(self, result: StepResult, now: float | None = None) -> None:
        recorder = self._recorder
        at = recorder.now_s() if now is None else now
        if result.joined:
            self._settle()
        for req, token, _ in result.joined:
            row = recorder.by_id[req.rid]
            row.table_row, row.started_s = req.row, at
            if row.handover is not None and row.handover.decode_admission_s != row.handover.decode_admission_s:
                row.handover.decode_admission_s = at
            before = row.last_token_s if row.last_token_s == row.last_token_s else row.first_token_s
            if token is not None and req.output_len > 1:
                recorder.gaps_s.append(at - before)
                recorder.gap_counts.append(1)
                before = row.last_token_s = at
            if req.row >= 0:
                self._last_token_s[req.row] = before if before == before else at
        if self.retries is not None and result.ended:
            result.ended = [req for req in result.ended if not self._lost(req)]
        super().send(result, now)

    def _lost(self, req: Req) -> bool:
        """Tell whether a request that has ended here goes on elsewhere."""
        row = self._recorder.by_id[req.rid]
        sent = row.first_token_s == row.first_token_s
        assert req.finish is not None and row.request is not None and self.retries is not None
        return req.finish.kind == "aborted" and self.retries(row.request, req.finish, sent)
