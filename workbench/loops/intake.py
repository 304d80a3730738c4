"""The intake of messages before a loop chooses a batch."""

from __future__ import annotations

from workbench.backend import Backend, Inbox, Outbox
from workbench.scheduler.scheduler import Scheduler, StepResult


def take_in(scheduler: Scheduler, backend: Backend, inbox: Inbox, outbox: Outbox) -> None:
    """Drain the inbox into the scheduler, and report at once what that ended."""
    messages = inbox.drain()
    scheduler.receive(messages)
    backend.host("receive", None, len(messages))
    if scheduler.lifecycle.ended:  # asked twice: on nearly every step it saves a call
        report_ended(scheduler, outbox)


def report_ended(scheduler: Scheduler, outbox: Outbox) -> None:
    """Report requests that ended without a batch being processed."""
    if scheduler.lifecycle.ended:
        outbox.send(StepResult(None, None, ended=scheduler.take_ended()))
