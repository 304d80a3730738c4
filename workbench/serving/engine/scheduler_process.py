"""The scheduler process: the scheduler, its loop and its backend, driven in real time."""

from __future__ import annotations

import sys
import time
import traceback
import uuid
from typing import Any

import zmq

from reports.record.run_record import RecordError
from workbench.backend import BackendDied
from workbench.instance import start
from workbench.loops import LOOPS
from workbench.loops.drive import drive
from workbench.loops.intake import report_ended
from workbench.phase_log import IterationRow
from workbench.scheduler.capacity import Capacity
from workbench.scheduler.config import ConfigError, Role
from workbench.scheduler.scheduler import Scheduler
from workbench.serving.backends.live_backend import LiveBackend, SyntheticText
from workbench.serving.child import begin_child
from workbench.serving.engine.inbox import Ending, LiveInbox
from workbench.serving.engine.live_record import LiveRecord
from workbench.serving.engine.matchers import Matchers, teller
from workbench.serving.engine.outbox import LiveOutbox
from workbench.serving.engine.paired_inbox import Alarm, PairedInbox
from workbench.serving.engine.paired_outbox import DecodeLiveOutbox, PrefillLiveOutbox
from workbench.serving.engine.paired_record import DecodeRecord, PairedRecord, PrefillRecord
from workbench.serving.engine.peers import listen_to_peers, wire_of
from workbench.serving.engine.vitals import Vitals, heartbeat
from workbench.serving.serve_settings import ServeSettings
from workbench.serving.wire import Addresses, Failed, Ready, Shutdown, encode, pull_socket, push_socket

OUTBOXES: dict[Role, type[LiveOutbox]] = {
    "both": LiveOutbox,
    "prefill": PrefillLiveOutbox,
    "decode": DecodeLiveOutbox,
}
RECORDS: dict[Role, type[LiveRecord]] = {"both": LiveRecord, "prefill": PrefillRecord, "decode": DecodeRecord}


class _Failure(Exception):
    """The process cannot go on, and has said so."""


def run_engine(settings: ServeSettings, addresses: Addresses, text: SyntheticText | None) -> None:
    """Run the process: from building the backend to :class:`Shutdown`. What it cannot survive it says before it ends."""
    begin_child()
    context: Any = zmq.Context()
    http = push_socket(context, addresses.http)
    try:
        _run(settings, addresses, text, context, http)
        failed = False
    except _Failure:
        failed = True
    context.destroy(linger=1000)
    sys.exit(failed)


def _run(settings: ServeSettings, addresses: Addresses, text: SyntheticText | None, context: Any, http: Any) -> None:
    epoch_s = time.monotonic() if settings.part is None else settings.part.epoch_s
    log = _IterationTee()
    try:
        built = settings.spec.build(settings.run, settings.loop, text, log, epoch_s)
    except ValueError as error:  # every error of bad input is one
        http.send(encode(Failed(str(error), True)))
        raise _Failure from error
    except BackendDied as error:
        http.send(encode(Failed(str(error), False)))
        raise _Failure from error
    try:
        _serve(settings, addresses, built, log, epoch_s, context, http)
    except ConfigError as error:  # of the address for peers
        http.send(encode(Failed(str(error), True)))
        raise _Failure from error
    finally:
        built.close()


def _serve(
    settings: ServeSettings,
    addresses: Addresses,
    built: LiveBackend,
    log: _IterationTee,
    epoch_s: float,
    context: Any,
    http: Any,
) -> None:
    def now_s() -> float:
        return time.monotonic() - epoch_s

    def mailboxes(scheduler: Scheduler) -> tuple[LiveInbox, LiveOutbox]:
        record = None
        if settings.record is not None:
            record = RECORDS[built.recipe.role](settings, built, scheduler, now_s)
        vitals = Vitals(scheduler, built.worked_s, built.heard_s)
        log.vitals, log.record = vitals, record
        outbox = OUTBOXES[built.recipe.role](scheduler, detokenizer, vitals, record)
        socket = pull_socket(context, addresses.scheduler)
        matchers = Matchers(built.vocab, built.recipe.eos_token_ids, teller(context, addresses), vitals.grammars)
        own = socket, outbox, http, vitals, built.control, epoch_s, settings.run.slo_ttft, matchers
        if wire is None:
            return LiveInbox(*own), outbox
        assert record is None or isinstance(record, PairedRecord)
        if isinstance(record, PrefillRecord):
            wire.on_first_pages = record.send_begins
        config = built.recipe.scheduler
        inbox = PairedInbox(*own, wire=wire, alarm=alarm, config=config, vocab=built.vocab, now_s=now_s, record=record)
        return inbox, outbox

    detokenizer = push_socket(context, addresses.detokenizer)
    instance_id, alarm = uuid.uuid4().hex, Alarm()
    wire = None if built.kv is None else wire_of(settings, built, instance_id, listen_to_peers(settings), alarm.ring)
    instance = start(built.recipe, built.backend, mailboxes, now_s, wire)
    scheduler, vitals, record = instance.scheduler, log.vitals, log.record
    assert vitals is not None
    peer = None if wire is None else wire.address
    http.send(encode(_ready(settings, built, vitals, instance_id, peer)))
    try:
        with heartbeat(vitals, context, addresses, built.failure, built.end_asked):
            drive(instance.loop, built.rested)
    except Ending as ending:
        scheduler.receive(ending.messages)  # requests that were cut off with the server end as such
        report_ended(scheduler, instance.outbox)
        detokenizer.send(encode(Shutdown()))
        _close(record, http)
    except Exception as error:
        # Said before the record is written: clients wait.
        line = str(error)
        if not isinstance(error, BackendDied):
            traceback.print_exc(file=sys.stderr)
            line = f"the scheduler process failed: {type(error).__name__}: {error}"
        http.send(encode(Failed(line, False)))
        _close(record, http)
        raise _Failure from error
    finally:
        if wire is not None:
            wire.close()


def _close(record: LiveRecord | None, http: Any) -> None:
    if record is None:
        return
    try:
        record.close()
    except RecordError as error:
        http.send(encode(Failed(f"the record is not complete: {error}", False)))
        raise _Failure from error


def _ready(settings: ServeSettings, built: LiveBackend, vitals: Vitals, instance_id: str, peer: str | None) -> Ready:
    config = built.recipe.scheduler
    return Ready(
        Capacity.of(config),
        config.kv_tokens,
        config.max_running,
        built.vocab,
        built.logprobs,
        built.profiles,
        built.name,
        built.device,
        settings.loop,
        vitals.beat(),
        _no_grammars(built, settings.loop),
        config.page_size,
        built.kv_dtype,
        config.role,
        peer,
        instance_id,
    )


def _no_grammars(built: LiveBackend, loop: str) -> str:
    """Return why no output can be constrained, or nothing."""
    if built.recipe.role != "both":
        return f"an instance of role {built.recipe.role} hands over no form of an output"
    if built.recipe.scheduler.draft_tokens:
        return "drafted tokens are not verified against a grammar"
    return "" if loop in LOOPS else f"the loop {loop} need not wait for masks"


class _IterationTee:
    """Receiver of the backend's rows of iterations.csv. They may come before anybody listens."""

    def __init__(self) -> None:
        self.vitals: Vitals | None = None
        self.record: LiveRecord | None = None

    def __call__(self, row: IterationRow) -> None:
        if self.vitals is not None:
            self.vitals.note_iteration(row)
        if self.record is not None:
            self.record.log_iteration(row)
