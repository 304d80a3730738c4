"""``--record``: live traffic as a run record and as a trace that ``simulate`` takes."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import sys
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from reports.record.meta import HardwareMeta, RunMeta, Totals, TraceMeta
from reports.record.run_record import RecordError, RunRecord, write_record
from reports.record.schema import PAGE_FILE, TRACE_FILE, TRACE_PARTIAL
from traces import TraceRequest
from traces.requests.content import Blocks, Synthetic, TokenIds
from traces.write import record_of
from workbench.clients.messages import request_of
from workbench.phase_log import IterationRow
from workbench.recording.meta_parts import settings_used, versions
from workbench.recording.recorder import Recorder, RecordingOutbox
from workbench.recording.run_folder import run_folder
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import Req
from workbench.scheduler.schedule_batch import ScheduleBatch
from workbench.scheduler.scheduler import Scheduler, StepResult
from workbench.serving.backends.live_backend import LiveBackend
from workbench.serving.serve_settings import ServeSettings

BLOCK_TOKENS = 16
"""Without content, prompts are told apart in blocks of this many tokens."""


class LiveRecord:
    """Record of what a loop reports, kept until the end, when it writes ``DIR/<loop>/`` and ``DIR/trace.jsonl``.

    A line of the trace is written when its request ends, to a hidden file; in memory stay, until the end, about a kilobyte a
    request and 150 bytes an iteration.
    """

    def __init__(
        self, settings: ServeSettings, built: LiveBackend, scheduler: Scheduler, now_s: Callable[[], float]
    ) -> None:
        assert settings.record is not None
        self._settings = settings
        self._built = built
        self._folder = settings.record
        self._recorder = Recorder(now_s)
        self._outbox = self._make_outbox(self._recorder, scheduler.kv.table.rows)
        self._tokens = RequestTokens(scheduler)
        key = None if settings.record_content else secrets.token_bytes(32)
        if key is not None and settings.part is not None:
            key = settings.part.hash_key
        self._spool = TraceSpool(self._folder / TRACE_PARTIAL, key)
        self._salts: dict[str, str] = {"": ""}
        self._notes: list[str] = []
        self.now_s = now_s

    def _make_outbox(self, recorder: Recorder, rows: int) -> RecordingOutbox:
        return RecordingOutbox(recorder, rows, on_end=lambda request: None)

    def _tokens_of(self, req: Req, result: StepResult) -> np.ndarray:
        """Return int32: the prompt and output of a request that ends with a result."""
        return self._tokens.ended(req)

    def arrived(self, message: Generate, slo_ttft_s: float | None = None, slo_tpot_s: float | None = None) -> None:
        """Note a request that has reached the scheduler, with objectives of its own if any.

        Salts are secrets: the trace has a number for each, so that what shared no prefix shares none in a simulation.
        """
        salt = self._salts.setdefault(message.namespace, f"salt-{len(self._salts)}")
        self._recorder.arrived(request_of(message, salt or None, slo_ttft_s, slo_tpot_s))
        self._recorder.queued([message])

    def changed(self, settings: dict[str, Any]) -> None:
        """Note that the scheduler goes on with other settings than the record's."""
        given = ", ".join(f"{name} {value}" for name, value in sorted(settings.items()))
        self._notes.append(f"settings changed after {self.now_s():.3f} s: {given}")

    def weights_updated(self, folder: str) -> None:
        """Note that from here on another checkpoint of the model writes the tokens."""
        self._notes.append(f"weights updated after {self.now_s():.3f} s: {folder}")

    def log_iteration(self, row: IterationRow) -> None:
        self._recorder.iterations.append(row)

    def scheduled(self, batch: ScheduleBatch) -> None:
        self._tokens.scheduled(batch)
        self._outbox.scheduled(batch)
        for part in batch.prefill:
            self._taken(part.req)

    def _taken(self, req: Req) -> None:
        """Note what only the scheduler knows of a request: where its session stands."""
        row = self._recorder.by_id[req.rid]
        row.input_tokens = req.input_len
        if req.session is not None:
            row.turn = req.session.turns

    def send(self, result: StepResult, at_s: float) -> None:
        """Note what a step brought, which was sent to the clients at ``at_s``."""
        for req in result.ended:
            request = self._recorder.by_id[req.rid].request
            assert request is not None
            tokens = self._tokens_of(req, result)
            if not req.scheduled:
                self._taken(req)
            # One that could never be served, or gave nothing, is no load that a simulation could repeat.
            if len(tokens) > req.input_len:
                self._spool.write(request.number, request.trace, req.input_len, tokens)
        self._outbox.send(result, at_s)

    def close(self) -> None:
        """Write everything. Nothing was served: nothing is written, and that is said; but a part of a fleet's record always
        is, with times as they are and without a page.

        Raises RecordError for what cannot be written.
        """
        alone = self._settings.part is None
        if not self._recorder.rows and alone:
            self._spool.discard()
            print(f"record: no request came, so {self._folder} stays empty", file=sys.stderr)
            return
        trace = self._folder / TRACE_FILE
        try:
            requests = self._spool.close(trace, from_zero=alone)
        except OSError as error:
            raise RecordError(f"{trace}: cannot be written: {error.strerror or error}") from error
        loop = self._settings.loop
        record = self._recorder.record(self._meta(trace, requests))
        write_record(record, run_folder(self._folder, loop))
        if not alone:
            return
        if len(self._recorder.iterations):
            self._write_page(record)
        print(f"record: {run_folder(self._folder, loop)}, {requests} requests in {trace}", file=sys.stderr)

    def _write_page(self, record: RunRecord) -> None:
        from reports.page.report_page import write_report

        title = f"Live traffic: {record.meta['model']} on {record.meta['hardware']['gpu']}"
        run = self._settings.run
        page = self._folder / PAGE_FILE
        write_report({record.name: record}, page, title, self._settings.command, run.slo_ttft, run.slo_tpot)

    def _meta(self, trace: Path, requests: int) -> RunMeta:
        settings, built, recorder = self._settings, self._built, self._recorder
        config = built.recipe.scheduler
        return RunMeta(
            kind="served",
            name=settings.loop,
            command=settings.command,
            trace=TraceMeta("live traffic", "workbench", hashlib.sha256(trace.read_bytes()).hexdigest(), self._notes),
            model=built.model,
            hardware=HardwareMeta(built.device, built.gpus, built.simulated),
            settings=settings_used(
                settings.run,
                backend=built.name,
                max_queue=settings.max_queue,
                record_content=settings.record_content,
                loop=settings.loop,
                dtype=built.weights["dtype"],
                kv_dtype=built.kv_dtype,
                kv_tokens=config.kv_tokens,
                max_context=config.max_context,
                **built.used,
            ),
            versions=versions(*built.packages),
            interrupted=bool(recorder.by_id),
            totals=Totals(
                requests=len(recorder.rows),
                ended=recorder.done,
                iterations=len(recorder.iterations),
                traced=requests,
                wall_s=round(self.now_s(), 9),
            ),
            recorded_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            weights=built.weights,
            kv_budget=built.kv_budget,
            cost_notes=built.cost_notes() if built.cost_notes is not None else None,
        )


class RequestTokens:
    """The tokens of a request that has just ended: they are in the scheduler's token pool, whose rows are not given to
    another before the next batch is formed, or with the request itself if it had lost its row."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._table = scheduler.kv.table
        self._row_of: dict[str, int] = {}

    def scheduled(self, batch: ScheduleBatch) -> None:
        for req in batch.retracted:
            self._row_of.pop(req.rid, None)
        for new in batch.worker.new_requests:
            self._row_of[new.request_id] = new.row

    def ended(self, req: Req) -> np.ndarray:
        """Return int32: its prompt and what it was given of its output. Asked once a request, as soon as it has ended."""
        row = self._row_of.pop(req.rid, None)
        if row is None:
            return req.tokens
        return self._table.tokens(row, req.input_len + max(req.output_len, 0)).copy()


class TraceSpool:
    """Trace lines as requests end, put into order of arrival at the close."""

    def __init__(self, path: Path, hash_key: bytes | None) -> None:
        """Content is kept, or under ``hash_key`` hashes of blocks."""
        self._path = path
        self._file: IO[bytes] = path.open("w+b")
        self._hash = None if hash_key is None else BlockHash(hash_key)
        self._lines: list[tuple[float, int, int, int]] = []
        """(arrival, number, offset in the file, length)."""
        self._encode = msgspec.json.Encoder().encode

    def write(self, number: int, arrival: TraceRequest, inputs: int, tokens: np.ndarray) -> None:
        """Add request ``number`` as it came, with ``tokens`` int32: prompt, of ``inputs`` tokens, and output."""
        content: TokenIds | Synthetic
        if self._hash is None:
            content = TokenIds(tokens[:inputs], tokens[inputs:], "")
        else:
            content = Synthetic(((0, arrival.request_id),), Blocks(self._hash.ids(tokens), BLOCK_TOKENS))
        # Its prompt has its session's tokens: alone it is the whole turn.
        request = dataclasses.replace(
            arrival, input_length=inputs, output_length=len(tokens) - inputs, session_id=None, content=content
        )
        assert arrival.arrival_s is not None
        at = self._file.tell()
        self._lines.append((arrival.arrival_s, number, at, self._file.write(self._encode(record_of(request)))))

    def close(self, path: Path, from_zero: bool = True) -> int:
        """Write the trace, its first request at 0 unless times are to be as they are, and return how many it has."""
        self._lines.sort()
        begin_s = self._lines[0][0] if self._lines and from_zero else 0.0
        with path.open("wb") as out:
            for arrival_s, _, offset, length in self._lines:
                self._file.seek(offset)
                line = msgspec.json.decode(self._file.read(length))
                line["arrival_s"] = round(arrival_s - begin_s, 6)
                out.write(self._encode(line) + b"\n")
        self.discard()
        return len(self._lines)

    def discard(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class BlockHash:
    """Ids for the whole blocks of a token sequence, equal where everything up to the block's end is equal.

    Keyed with 32 bytes that are kept nowhere, so that a prompt cannot be guessed from a trace by hashing candidates.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def ids(self, tokens: np.ndarray) -> np.ndarray:
        """Return int64, one for each whole block of ``tokens`` int32."""
        state = blake2b(key=self._key, digest_size=8)
        ids = np.empty(len(tokens) // BLOCK_TOKENS, np.int64)
        for i in range(len(ids)):
            state.update(tokens[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS].tobytes())
            ids[i] = int.from_bytes(state.copy().digest(), "little") >> 1
        return ids
