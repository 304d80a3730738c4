"""``--record`` of an instance that prefills or decodes alone: its half of each request."""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.recording.halves import DecodeOutbox, HalfNotes, PrefillOutbox
from workbench.recording.recorder import Recorder, RecordingOutbox
from workbench.scheduler.disaggregated.letters import KVArrived, PagesSetAside
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import StepResult
from workbench.serving.engine.live_record import LiveRecord


class PairedRecord(LiveRecord):
    """:class:`LiveRecord` of one half. Numbers of instances in it are 0: who puts halves together knows them.

    A prefill half has when pages were known, when the prompt was computed and when the first of its KV left, a decode half
    when it had all arrived, the times of tokens, and the trace of the traffic.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.notes = HalfNotes(self._recorder)

    def arrived(self, message: Generate, slo_ttft_s: float | None = None, slo_tpot_s: float | None = None) -> None:
        super().arrived(message, slo_ttft_s, slo_tpot_s)
        row = self._recorder.by_id[message.rid]
        assert row.request is not None
        self._recorder.sent_to_pair(row.request, 0, 0)

    def told(self, letter: object, request_id: str) -> None:
        """Note a letter about a request, which the scheduler is about to be given."""
        raise NotImplementedError


class PrefillRecord(PairedRecord):
    """The record of an instance that prefills alone."""

    def _make_outbox(self, recorder: Recorder, rows: int) -> Any:
        return _EndsHere(recorder, HalfNotes(recorder))

    def told(self, letter: object, request_id: str) -> None:
        if isinstance(letter, PagesSetAside):
            self.notes.pages_known(request_id)

    def send_begins(self, request_id: str) -> None:
        """Note that the first pages of a request are sent from now on."""
        self.notes.transfer_started(request_id)

    def scheduled(self, batch: ScheduleBatch) -> None:
        self._outbox.scheduled(batch)
        for part in batch.prefill:
            if part.req.rid in self._recorder.by_id:  # not of what a decode instance has had prefilled again
                self._taken(part.req)

    def send(self, result: StepResult, at_s: float) -> None:
        self._outbox.send(result)


class _EndsHere(PrefillOutbox):
    """:class:`PrefillOutbox` of a recorder that has nothing of the other half."""

    def __init__(self, recorder: Recorder, notes: HalfNotes) -> None:
        super().__init__(recorder, notes, self._ended, None, 0)

    def _ended(self, req: Req) -> None:
        self._recorder.half_ended(req)


class DecodeRecord(PairedRecord):
    """The record of an instance that decodes alone."""

    def _make_outbox(self, recorder: Recorder, rows: int) -> RecordingOutbox:
        return DecodeOutbox(recorder, rows, on_end=lambda request: None)

    def told(self, letter: object, request_id: str) -> None:
        if isinstance(letter, KVArrived):
            self.notes.transfer_ended(request_id)

    def _tokens_of(self, req: Req, result: StepResult) -> np.ndarray:
        tokens = super()._tokens_of(req, result)
        for joined, token, _ in result.joined:
            if joined is req and token is not None and len(tokens) == req.input_len:
                return np.append(tokens, np.int32(token))  # its only one: it was in no batch here
        return tokens
