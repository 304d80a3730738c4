"""Turning what the loops report into a run record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

from ground.json_file import json_line
from reports.record.meta import RunMeta
from reports.record.run_record import IterationLog, RunRecord
from reports.record.schema import CHUNK, FINISHED, RETRACTED
from workbench.clients.bounds import Cause
from workbench.clients.messages import ClientRequest
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import StepResult

NAN = float("nan")


@dataclass(slots=True)
class HandoverTimes:
    """Columns of requests.csv about a request that one instance prefills and another decodes, of its last attempt."""

    prefill_instance: int
    decode_instance: int
    bootstrap_s: float = NAN
    prefill_start_s: float = NAN
    prefill_end_s: float = NAN
    transfer_start_s: float = NAN
    transfer_end_s: float = NAN
    decode_admission_s: float = NAN


@dataclass(slots=True)
class RequestRow:
    """One line of requests.csv in the making."""

    request_id: str
    session_id: str
    instance: int
    arrival_s: float
    input_tokens: int
    slo_ttft_s: float
    slo_tpot_s: float
    priority: int
    turn: int
    queued_s: float = NAN
    scheduled_s: float = NAN
    first_token_s: float = NAN
    finish_s: float = NAN
    output_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    status: str = "unfinished"
    last_token_s: float = NAN
    wanted_tokens: int = 0
    """What the trace says that it writes; 0 where nobody knows."""
    bound_by: Cause = "trace"
    """Who would cut it at its bound."""
    request: ClientRequest | None = None
    """What it is the row of, until it ends."""
    table_row: int = -1
    """Its row of the scheduler's table."""
    started_s: float = NAN
    """When it got that row."""
    handover: HandoverTimes | None = None
    """Of one that two instances share."""


class Recorder:
    """Collector of requests, iterations and inter-token gaps of all instances of a run."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.now_s = now_s
        self.iterations = IterationLog()
        self.rows: list[RequestRow] = []
        self.by_id: dict[str, RequestRow] = {}
        """Of requests that have come and not ended."""
        self.done = 0
        self.gaps_s: list[float] = []
        self.gap_counts: list[int] = []
        self.gap_arrays: list[np.ndarray] = []
        self.events: list[tuple[str, int, int, str, int]] = []
        """Rows of events.csv: which request was prefilled or retracted in which iteration."""
        self.cuts: list[tuple[Cause, int]] = []
        """(what cut a request's output, tokens that it did not write)."""

    def arrived(self, request: ClientRequest) -> RequestRow:
        """A request has come, with its message. With its ``bound`` it counts as cut if it ends before the trace says."""
        trace, message = request.trace, request.message
        assert message is not None
        row = RequestRow(
            trace.request_id,
            trace.session_id or "",
            request.instance,
            message.arrival_s,
            len(message.prompt),
            NAN if trace.slo_ttft_s is None else trace.slo_ttft_s,
            NAN if trace.slo_tpot_s is None else trace.slo_tpot_s,
            trace.priority,
            trace.turn,
        )
        if request.bound is not None:
            row.wanted_tokens, row.bound_by = trace.output_length, request.bound.cause
        row.request, request.number = request, len(self.rows)
        self.rows.append(row)
        self.by_id[trace.request_id] = row
        return row

    def sent_to_pair(self, request: ClientRequest, prefill: int, decode: int) -> None:
        """An open request is sent to a pair of instances, which is its first one or another."""
        row = self.by_id[request.trace.request_id]
        row.instance = decode
        row.handover = HandoverTimes(prefill, decode)

    def lost(self, request: ClientRequest, status: str, output_tokens: int) -> None:
        """An open request has ended with its instance, and nobody else will say so. So much of its output had come."""
        row = self.by_id.pop(request.trace.request_id)
        row.finish_s, row.status, row.output_tokens, row.request = self.now_s(), status, output_tokens, None
        self.done += 1

    def half_ended(self, req: Req) -> None:
        """A request has ended on its prefill instance, and of its other half nothing is recorded here."""
        row = self.by_id.pop(req.rid)
        assert req.finish is not None
        row.finish_s, row.status, row.request = self.now_s(), req.finish.status, None
        row.cached_tokens, row.retractions = req.cached_tokens, req.retractions
        self.done += 1

    @property
    def over_s(self) -> float:
        """When the last request ended."""
        return max((row.finish_s for row in self.rows if row.finish_s == row.finish_s), default=0.0)

    def output_length(self, request_id: str) -> int:
        """Return what the trace says that an open request writes."""
        request = self.by_id[request_id].request
        assert request is not None
        return request.trace.output_length

    def note_cut(self, row: RequestRow, req: Req, room: Cause) -> None:
        """A request has ended with fewer tokens than the trace says. ``room`` is what leaves none for longer sequences."""
        missing = row.wanted_tokens - req.output_len
        if row.status == "aborted:kv_exhausted":
            self.cuts.append(("kv_tokens", missing))
        elif row.status == FINISHED:
            self.cuts.append((row.bound_by if req.output_len >= req.params.max_new_tokens else room, missing))

    def queued(self, messages: list[object]) -> None:
        """A scheduler has taken messages out of its inbox."""
        now = self.now_s()
        for message in messages:
            row = self.by_id.get(getattr(message, "rid", ""))
            if row is not None:
                row.queued_s = now

    def record(self, meta: RunMeta) -> RunRecord:
        """The record of the run that ``meta`` describes."""
        return RunRecord(
            meta.to_json(),
            self.request_columns(),
            self.iterations.columns(),
            self.inter_token_gaps(),
            self.event_columns(),
        )

    def request_columns(self) -> dict[str, np.ndarray | list]:
        """Columns of requests.csv, in order of arrival."""
        rows = self.rows

        def floats(name: str) -> np.ndarray:
            return np.array([getattr(row, name) for row in rows], np.float64)

        def ints(name: str) -> np.ndarray:
            return np.array([getattr(row, name) for row in rows], np.int64)

        return {
            "request_id": [row.request_id for row in rows],
            "session_id": [row.session_id for row in rows],
            "instance": ints("instance"),
            "arrival_s": floats("arrival_s"),
            "queued_s": floats("queued_s"),
            "scheduled_s": floats("scheduled_s"),
            "first_token_s": floats("first_token_s"),
            "finish_s": floats("finish_s"),
            "input_tokens": ints("input_tokens"),
            "output_tokens": ints("output_tokens"),
            "cached_tokens": ints("cached_tokens"),
            "retractions": ints("retractions"),
            "status": [row.status for row in rows],
            "slo_ttft_s": floats("slo_ttft_s"),
            "slo_tpot_s": floats("slo_tpot_s"),
            "priority": ints("priority"),
            "turn": ints("turn"),
            **self._handover_columns(),
        }

    def _handover_columns(self) -> dict[str, np.ndarray]:
        """Columns about handovers; none where there were none."""
        times = [row.handover for row in self.rows]
        if not any(times):
            return {}
        return {
            declared.name: np.array([NAN if one is None else getattr(one, declared.name) for one in times], np.float64)
            for declared in fields(HandoverTimes)
        }

    def event_columns(self) -> dict[str, list | np.ndarray]:
        """Columns of events.csv."""
        ids, instances, iterations, events, tokens = zip(*self.events, strict=True) if self.events else ((),) * 5
        ints = [np.array(values, np.int64) for values in (instances, iterations, tokens)]
        return {
            "request_id": list(ids),
            "instance": ints[0],
            "iteration": ints[1],
            "event": list(events),
            "tokens": ints[2],
        }

    def inter_token_gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """(gap in seconds, how many tokens had it)."""
        singles = np.concatenate(self.gap_arrays) if self.gap_arrays else np.empty(0)
        return (
            np.concatenate((np.array(self.gaps_s), singles)),
            np.concatenate((np.array(self.gap_counts, np.int64), np.ones(len(singles), np.int64))),
        )


class RecordingOutbox:
    """The outbox of one instance. ``on_end`` is told every request that ends; ``room`` is what leaves none for longer
    sequences there: the context, or a KV pool that is smaller."""

    def __init__(
        self,
        recorder: Recorder,
        table_rows: int,
        on_end: Callable[[ClientRequest], None],
        decisions: IO[str] | None = None,
        instance: int = 0,
        room: Cause = "max_context",
    ) -> None:
        self._recorder = recorder
        self._room = room
        self._on_end = on_end
        self._decisions = decisions
        self._instance = instance
        self.on_first: Callable[[ClientRequest], None] | None = None
        """Is told of every request that gets its first token."""
        self._last_token_s = np.full(table_rows, NAN)
        self._steady: dict[int, tuple[int, np.ndarray, float]] = {}
        """By slot, the epoch and rows of the last batch and when its tokens went out, where all of its rows had one."""

    def scheduled(self, batch: ScheduleBatch) -> None:
        if batch.retracted:
            self._settle()
            self._recorder.events += [
                (req.rid, self._instance, batch.worker.step, RETRACTED, 0) for req in batch.retracted
            ]
            for req in batch.retracted:
                record = self._recorder.by_id[req.rid]
                last_token_s = float(self._last_token_s[record.table_row])
                if last_token_s > record.started_s:  # else it is of the row's owner before
                    record.last_token_s = last_token_s
        if batch.prefill:
            now = self._recorder.now_s()
            self._recorder.events += [
                (part.req.rid, self._instance, batch.worker.step, CHUNK, part.end - part.start)
                for part in batch.prefill
            ]
            for row, request_id, *_ in batch.worker.new_requests:
                record = self._recorder.by_id[request_id]
                record.table_row, record.started_s = row, now
                if record.scheduled_s != record.scheduled_s:
                    record.scheduled_s = now
        if self._decisions is not None:
            self.scheduled_decodes(batch, (batch.worker.kv_used_tokens,))

    def scheduled_decodes(self, newest: ScheduleBatch, kv_used_tokens: Sequence[int]) -> None:
        """Decode batches of the same requests have been launched, the last one ``newest``; with each of them so many tokens
        of KV were held."""
        if self._decisions is not None:
            self._decisions.writelines(decision_lines(newest, kv_used_tokens, self._instance))

    def send(self, result: StepResult, now: float | None = None) -> None:
        """Note what a step has brought, which was sent at ``now`` seconds, or is sent now."""
        recorder = self._recorder
        if now is None:
            now = recorder.now_s()
        batch = result.batch
        if batch is not None:
            output = result.output
            if output is not None and output.counts is not None:
                # Those of a run of tokens after its first come with it.
                runs = output.counts
                recorder.gaps_s.append(0.0)
                recorder.gap_counts.append(int(runs.sum() - np.count_nonzero(runs)))
            steady = self._steady.get(batch.slot)
            if steady is not None and steady[0] == batch.worker.epoch and not batch.late:
                # While the same requests decode, the gap is one number for all of them that have not ended.
                epoch, rows, before = steady
                tokens = len(rows) - len(batch.dropped or ())
                if tokens:
                    recorder.gaps_s.append(now - before)
                    recorder.gap_counts.append(tokens)
                self._steady[batch.slot] = (epoch, rows, now)
            else:
                self._gaps(batch, now)
        for req in result.first:
            recorder.by_id[req.rid].first_token_s = now
        if self.on_first is not None:
            for req in result.first:
                if (request := recorder.by_id[req.rid].request) is not None:
                    self.on_first(request)
        for req in result.ended:
            assert req.finish is not None
            row = recorder.by_id.pop(req.rid)
            row.finish_s = now
            if req.finish.kind == "length" and not req.output_len:
                row.first_token_s = now  # it asked for its prompt alone: what a first token waits for is done
            row.output_tokens = req.output_len
            row.cached_tokens = req.cached_tokens
            row.retractions = req.retractions
            row.status = req.finish.status
            if req.output_len < row.wanted_tokens:
                recorder.note_cut(row, req, self._room)
            request, row.request = row.request, None
            recorder.done += 1
            if request is not None:
                self._on_end(request)

    def send_decodes(self, batch: ScheduleBatch, moments_s: list[float]) -> None:
        """Results of consecutive decode steps of the same requests, of which none ends: ``send`` at each of the moments."""
        epoch, rows = batch.worker.epoch, batch.worker.rows
        steady = self._steady.get(batch.slot)
        if steady is None or steady[0] != epoch:
            self._gaps(batch, moments_s[0])
        else:
            moments_s = [steady[2], *moments_s]
        self._recorder.gaps_s += [now - before for before, now in pairwise(moments_s)]
        self._recorder.gap_counts += [len(rows)] * (len(moments_s) - 1)
        self._steady[batch.slot] = (epoch, rows, moments_s[-1])

    def _gaps(self, batch: ScheduleBatch, now: float) -> None:
        """Gaps between tokens where the requests are not those of the step before."""
        epoch, rows = batch.worker.epoch, batch.worker.rows
        if self._steady:
            self._settle()
        if not (batch.prefill or batch.dropped or batch.late):
            self._recorder.gap_arrays.append(now - self._last_token_s[rows])
            self._steady[batch.slot] = (epoch, rows, now)  # settled before anybody looks
            return
        # A row starts afresh; a request retracted before has been silent since its last token.
        by_id = self._recorder.by_id
        silent_s = [
            by_id[rid].last_token_s if part.last and (rid := part.req.rid) in by_id else NAN for part in batch.prefill
        ]
        for req in (batch.late or {}).values():
            if req.rid in by_id:
                by_id[req.rid].last_token_s = now
        if batch.worker.decode_tokens or any(at == at for at in silent_s):
            before = self._last_token_s[rows]
            before[: len(silent_s)] = silent_s
            if batch.dropped:
                before[list(batch.dropped)] = NAN
            gaps = now - before
            gaps = gaps[gaps == gaps]
            if len(gaps):
                self._recorder.gap_arrays.append(gaps)
        sampled = rows if batch.worker.unsampled is None else np.delete(rows, batch.worker.unsampled)
        self._last_token_s[sampled] = now
        if not batch.prefill:
            self._steady[batch.slot] = (epoch, rows, now)

    def _settle(self) -> None:
        for _, rows, at in self._steady.values():
            self._last_token_s[rows] = at
        self._steady.clear()


@contextmanager
def decisions_file(path: Path | None) -> Iterator[IO[str] | None]:
    """Open the decisions.jsonl of a run; None where none is asked for."""
    if path is None:
        yield None
        return
    with path.open("w", encoding="utf-8") as file:
        yield file


def decision_lines(newest: ScheduleBatch, kv_used_tokens: Sequence[int], instance: int) -> Iterator[str]:
    """Lines of decisions.jsonl, which say what the scheduler chose, without times: of the batch ``newest`` and of those
    before it that decode the same requests, as many as there are ``kv_used_tokens``, one of each."""
    worker = newest.worker
    line = {
        "instance": instance,
        "step": worker.step,
        "slot": newest.slot,
        "mode": worker.mode,
        "prefill": [[part.req.rid, part.start, part.end, part.cached] for part in newest.prefill],
        "decode": [req.rid for req in newest.reqs[worker.num_prefill :]],
        "retracted": [req.rid for req in newest.retracted],
        "kv_used_tokens": worker.kv_used_tokens,
        "waiting": worker.waiting,
    }
    for step, used in enumerate(kv_used_tokens, start=worker.step + 1 - len(kv_used_tokens)):
        line |= {"step": step, "kv_used_tokens": used}
        yield json_line(line) + "\n"
