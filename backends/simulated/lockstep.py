"""Data-parallel instances whose experts are spread over all of them: every step is taken together.

Each rank has its own scheduler, loop, requests and KV. But a layer's experts lie on all ranks, so the j-th forward of
one rank exchanges tokens with the j-th forward of every other: a step begins when the last rank is ready and ends for
all at once. A rank with nothing to run takes part nevertheless, with an empty step (one token, nothing sampled), or the
others could not reach its experts.

A rank counts as having nothing to run while its loop waits for a message. So a step's end is known only once every
other rank has launched its own part or has gone to wait, which may be later than the launch; ``done`` therefore gives
an event that the group resolves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import simpy

from backends.simulated.backend import SimulatedBackend, SimulatedInbox
from backends.simulated.clock import Clock
from backends.simulated.copies import CopyEngine
from backends.simulated.gpus import ModelledForward, ModelledGPUs
from backends.simulated.host import HostModel
from backends.simulated.sampler import ScriptedSampler
from workbench.phase_log import LogIteration
from workbench.scheduler.batch import ModelWorkerBatch


class GroupCost(Protocol):
    """Times of a step taken together."""

    def group_forward(self, batches: Sequence[ModelWorkerBatch | None]) -> float:
        """Seconds of GPU time; None stands for a rank with nothing to run."""
        ...


class _Forward(ModelledForward):
    __slots__ = ("deadline_s", "gpus", "issued_s", "masked_s", "ready_s", "waiter")

    def __init__(
        self,
        batch: ModelWorkerBatch,
        sampler: ScriptedSampler,
        ready_s: float,
        issued_s: float,
        gpus: ModelledGPUs,
    ) -> None:
        super().__init__(batch, sampler, issued_s, [], [])
        self.ready_s, self.issued_s, self.deadline_s = ready_s, issued_s, 0.0
        self.gpus = gpus
        self.masked_s: float | None = None
        """When its masks came."""
        self.waiter: simpy.Event | None = None

    def taken(self, begin_s: float, end_s: float) -> float:
        """Its step was taken. Returns when its GPUs are done with it, as far as is known: masks may still have to come."""
        self.starts_s.append(begin_s)
        self.ends_s.append(end_s)
        if self.batch.masked is None:
            self.gpus.finish(self, end_s)
        else:
            self.computed_s = max(end_s - self.gpus.sampling_s(self.batch), begin_s)
            if self.masked_s is not None:
                self.gpus.sample(self, self.masked_s)
        return self.ends_s[-1]


class LockStepGroup:
    """Pairs the ranks' forwards, first with first, second with second, and times them together."""

    def __init__(self, clock: Clock, cost: GroupCost, ranks: int) -> None:
        self._clock = clock
        self._cost = cost
        self._queues: list[deque[_Forward]] = [deque() for _ in range(ranks)]
        self._resting = [False] * ranks
        self._free_s = 0.0
        self.steps = 0
        self.empty_parts = 0
        """Parts of steps that a rank took without a request."""

    def submit(self, rank: int, forward: _Forward) -> None:
        """A rank has launched its next part."""
        self._queues[rank].append(forward)
        self._advance()

    def sample(self, forward: _Forward, masked_s: float) -> None:
        """The masks of a batch are there. The next step begins once every rank has sampled."""
        forward.masked_s = masked_s
        if forward.ends_s:
            forward.gpus.sample(forward, masked_s)
            self._free_s = max(self._free_s, forward.end_s)

    def rest(self, rank: int) -> None:
        """A rank waits for a message: until one comes, steps go on without a part of its own."""
        self._resting[rank] = True
        self._advance()

    def wake(self, rank: int) -> None:
        """A message has come."""
        self._resting[rank] = False

    def _advance(self) -> None:
        while True:
            heads = [queue[0] if queue else None for queue in self._queues]
            if not any(heads):
                return
            if any(head is None and not rests for head, rests in zip(heads, self._resting, strict=True)):
                return
            begin = max(self._free_s, self._clock.now, *(head.ready_s for head in heads if head is not None))
            end = begin + self._cost.group_forward([None if head is None else head.batch for head in heads])
            # Kernels issued one by one: the last cannot end before it was issued.
            end = max(end, *(head.issued_s for head in heads if head is not None))
            self._free_s = end
            self.steps += 1
            self.empty_parts += sum(head is None for head in heads)
            for queue, head in zip(self._queues, heads, strict=True):
                if head is not None:
                    queue.popleft()
                    self._free_s = max(self._free_s, head.taken(begin, end))
                    if head.waiter is not None:
                        self._resolve(head)

    def _resolve(self, forward: _Forward) -> None:
        waiter = forward.waiter
        assert waiter is not None
        due = self._clock.at(max(forward.end_s, forward.deadline_s, self._clock.now))
        due.callbacks.append(lambda _: _end(waiter))


def _end(waiter: simpy.Event) -> None:
    waiter.succeed()


class LockStepBackend(SimulatedBackend):
    """One rank of a group. Everything but the time of a step is as for an instance of its own."""

    lock_step = True

    def __init__(
        self,
        clock: Clock,
        group: LockStepGroup,
        cost: object,
        host: HostModel,
        sampler: ScriptedSampler,
        log_iteration: LogIteration,
        rank: int,
        instance: int | None = None,
        copies: CopyEngine | None = None,
    ) -> None:
        instance = rank if instance is None else instance
        super().__init__(clock, cost, host, sampler, log_iteration, instance, copies=copies)  # type: ignore[arg-type]
        self._group = group
        self._rank = rank

    def launch(self, batch: ModelWorkerBatch) -> ModelledForward:
        if batch.new_requests:
            self.sampler.load(batch)
        prepare_s, issue_s, graph = self.host_model.launch(batch)
        prepared = self._clock.now + self._debt_s + prepare_s
        issued = prepared + issue_s
        self._launch_host_s = prepare_s + issue_s
        ready = issued if graph else prepared
        if batch.kv_copies:
            ready = self.gpus.copies_of(batch).before(batch.kv_copies, ready)
        forward = _Forward(batch, self.sampler, ready, issued, self.gpus)
        self.phases.launched(forward, self._launch_host_s)
        self._group.submit(self._rank, forward)
        return forward

    def sample(self, forward: ModelledForward, masks: np.ndarray | None = None) -> None:
        assert isinstance(forward, _Forward) and forward.batch.masked is not None
        self._debt_s += self.host_model.mask_s * len(forward.batch.masked)
        self._group.sample(forward, self.now_s())

    def done(self, forward: ModelledForward) -> simpy.Event | float:  # type: ignore[override]
        assert isinstance(forward, _Forward)
        if forward.ends_s:
            return super().done(forward)
        debt, self._debt_s = self._debt_s, 0.0
        forward.deadline_s = self._clock.now + debt
        forward.waiter = self._clock.event()
        return forward.waiter


class LockStepInbox(SimulatedInbox):
    """An inbox that tells the group when its rank has nothing to do."""

    def __init__(
        self, clock: Clock, group: LockStepGroup, rank: int, on_drain: Callable[[list[object]], None] | None = None
    ) -> None:
        super().__init__(clock, on_drain)
        self._group = group
        self._rank = rank

    def put(self, message: object) -> None:
        self._group.wake(self._rank)
        super().put(message)

    def arrival(self) -> simpy.Event | float:
        event = super().arrival()
        if not self._messages:
            self._group.rest(self._rank)
        return event
