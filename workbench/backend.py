"""The contract between an event loop and what runs its batches.

A loop is a generator. It calls the backend, and yields a :class:`Wait` wherever the CPU has to wait; a driver sends it on
when that is over. Simulated, the loop is a SimPy process and a wait is a SimPy event. Live, the driver is a few lines and a
wait blocks on a device event or a socket.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from workbench.scheduler.batch import ModelWorkerBatch, StepOutput

Phase = Literal["receive", "schedule", "launch", "process"]
Wait = Any
"""Whatever the driver of a loop can wait for; a loop only hands it on."""


def no_wait(value: object) -> TypeError:
    """Make the error of a loop that yields what is no :data:`Wait`; drivers throw it where the loop stands."""
    return TypeError(f"{value!r} is nothing to wait for that the backend or the inbox gave")


class BackendDied(RuntimeError):
    """The end of what runs batches, which names it and says why, in one line."""


class Forward(Protocol):
    """A launched batch."""

    batch: ModelWorkerBatch

    def output(self) -> StepOutput:
        """Return what was sampled, once the wait of :meth:`Backend.done` is over.

        Lengths that a batch was launched with become confirmed ones by it: a decode row has got as many tokens as
        ``counts`` says, of at most ``query_lens``.
        """
        ...


class Backend(Protocol):
    """Runs batches in the order of their launch."""

    def host(self, phase: Phase, batch: ModelWorkerBatch | None, count: int = 0) -> None:
        """Note that a CPU phase has just been done for ``batch`` (None: there was none); ``count`` is the number of
        messages received or of requests that ended.

        Live, this reads the clock: the notes are what calibrates a model. Simulated, it charges the phase's modelled cost
        to the CPU, to pass with the next wait.
        """
        ...

    def launch(self, batch: ModelWorkerBatch) -> Forward:
        """Start a batch behind those launched before; returns at once.

        A batch is launched with the lengths that its rows will have if everything before it is kept; it may be before
        that is confirmed by the output of those in flight.
        """
        ...

    def sample(self, forward: Any, masks: np.ndarray | None = None) -> None:
        """Sample a batch that has ``masked`` rows: once, before the next launch and before its :meth:`done`. Other batches
        sample by themselves; this is not called for them. Returns at once.

        ``masks``: int32[k, ceil(vocabulary / 32)], those of ``batch.masked`` in order; bit ``t % 32`` of word ``t // 32`` is
        set where token t may be sampled. Every row needs one that its other parameters leave possible. None allows all.
        """
        ...

    def done(self, forward: Any) -> Wait:
        """Until the result of ``forward``, one of its own, is on the host and the CPU phases noted so far have passed."""
        ...

    def copied(self, forward: Any) -> Wait:
        """Until the KV copies of ``forward`` have been made (at once if it has none) and the CPU phases noted so far have
        passed. From then on pages that were stored or sent may be given to somebody else."""
        ...

    def cpu(self) -> Wait:
        """Until the CPU phases noted so far have passed."""
        ...


class Inbox(Protocol):
    """Messages to a scheduler."""

    def drain(self) -> list[object]:
        """Everything that has arrived since the last call, in order; never waits."""
        ...

    def arrival(self) -> Wait:
        """Until there is something to drain."""
        ...


class Wire(Protocol):
    """What connects an instance that prefills or decodes alone with its counterparts.

    Nothing on it is waited for: word of what has become of an order comes into the inbox.
    """

    def post(self, orders: Any) -> None:
        """Begin with letters and copies to other instances (``workbench.scheduler.disaggregated.letters``), in their order,
        as of when the CPU phases noted so far have passed. Returns at once."""
        ...

    def wake_at(self, moment_s: float) -> None:
        """Put a message into the inbox at a moment of the scheduler's clock, in place of any such moment before; infinite:
        do not."""
        ...


class Outbox(Protocol):
    """Receiver of a loop's reports. Implementations must not keep references into the batch's arrays."""

    def scheduled(self, batch: Any) -> None:
        """A ``ScheduleBatch`` has been launched."""
        ...

    def send(self, result: Any) -> None:
        """A ``StepResult``, once the CPU work that made it is over."""
        ...
