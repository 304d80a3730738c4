"""A scenario played step by step to a real scheduler and a real loop: messages come by step, and decisions are kept.

The mailboxes go with any backend, so the same scenario can be played on a modelled GPU or on a CPU. Where only decisions are
asked for, :class:`StepBackend` stands in for both: it has neither model nor clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from workbench.backend import Phase, Wait
from workbench.parity.scenarios import RETRACTED, Request, token
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput
from workbench.scheduler.messages import Abort, Generate
from workbench.scheduler.request import SamplingParams
from workbench.scheduler.schedule_batch import ScheduleBatch

_REQUEST, _ABORT = 0, 1
"""Kinds of messages, in the order in which those of a step arrive."""
Decision = dict[str, Any]
"""A step's batch: the tokens that each request computes by its id, and under ``RETRACTED`` a list of ids, if any."""


class StepInbox:
    """Inbox of one scenario. A step is a look into it: a loop drains it once before it chooses a batch."""

    def __init__(
        self, requests: Sequence[Request], *, ignore_eos: bool, now: Callable[[], Wait] = lambda: None
    ) -> None:
        """``now`` makes a wait of the backend's that is over at once."""
        coming: list[tuple[int, int, object]] = []
        for request in requests:
            coming.append((request.step, _REQUEST, _message(request, ignore_eos)))
            if request.abort_step is not None:
                coming.append((request.abort_step, _ABORT, Abort(request.id)))
        self._coming = sorted(coming, key=lambda one: one[:2])
        self._now = now
        self._next = 0
        self.step = 0
        """The next one."""
        self.over = False
        """Nothing more comes, and what has come is done."""
        self._ending: list[object] = []

    def end(self, request_id: str) -> None:
        """Have a request ended with the next step."""
        self._ending.append(Abort(request_id))

    def drain(self) -> list[object]:
        first = self._next
        ending, self._ending = self._ending, []
        while self._next < len(self._coming) and self._coming[self._next][0] <= self.step:
            self._next += 1
        self.step += 1
        return [*ending, *(message for *_, message in self._coming[first : self._next])]

    def arrival(self) -> Wait:
        """Asked by a loop that has nothing to do: the steps until the next request are passed over."""
        requests = (step for step, kind, _ in self._coming[self._next :] if kind == _REQUEST)
        first = next(requests, None)
        if first is None:
            self.over = True  # aborts may be left, of requests that have ended
        else:
            self.step = max(self.step, first)
        return self._now()


class DecisionOutbox:
    """Outbox that keeps what was decided, a batch an entry."""

    def __init__(
        self,
        launched: Callable[[Decision], None] = lambda decision: None,
        ends_early: Callable[[str], None] | None = None,
    ) -> None:
        """``launched`` is told of every decision. ``ends_early``: play a recorder that hands a request a token with a chunk
        that ends one token before its prompt does. It is a token ahead from then on, so that the engine ends it by length
        while its last step is in flight; this is told of it as that step is launched."""
        self.decisions: list[Decision] = []
        self._launched = launched
        self._ends_early = ends_early
        self._ahead: set[str] = set()
        """Requests that are a token ahead."""

    def scheduled(self, batch: ScheduleBatch) -> None:
        decision: Decision = dict(
            sorted((req.rid, int(n)) for req, n in zip(batch.reqs, batch.worker.query_lens, strict=True))
        )
        if batch.retracted:
            decision[RETRACTED] = sorted(req.rid for req in batch.retracted)
        if self._ends_early is not None:
            self._ahead.update(row.req.rid for row in batch.prefill if row.end == len(row.req.tokens) - 1)
            for index in batch.length_stops:
                if batch.reqs[index].rid in self._ahead:
                    self._ends_early(batch.reqs[index].rid)
        self.decisions.append(decision)
        self._launched(decision)

    def send(self, result: object) -> None:
        pass


class ScenarioTokens:
    """The tokens of a scenario's requests, batch by batch: what :func:`token` says."""

    def __init__(self) -> None:
        self._requests: dict[int, tuple[str, int]] = {}
        """Id and prompt length of the request in each row."""

    def of(self, batch: ModelWorkerBatch) -> np.ndarray:
        """int64[n], one a row. Every batch is to be shown, in order: it says whose the rows are."""
        for new in batch.new_requests:
            self._requests[new.row] = new.request_id, new.input_len
        tokens = []
        for row, length in zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True):
            request_id, input_len = self._requests[row]
            tokens.append(token(request_id, max(length - input_len, 0)))  # of a chunk's sample nobody asks
        return np.array(tokens)


class StepBackend:
    """Backend that has done a batch as soon as it is launched."""

    def __init__(self) -> None:
        self._tokens = ScenarioTokens()

    def host(self, phase: Phase, batch: ModelWorkerBatch | None, count: int = 0) -> None:
        pass

    def launch(self, batch: ModelWorkerBatch) -> StepForward:
        return StepForward(batch, self._tokens.of(batch))

    def sample(self, forward: StepForward, masks: np.ndarray | None = None) -> None:
        raise NotImplementedError("no request of a scenario is constrained")

    def done(self, forward: StepForward) -> Wait:
        return None

    def copied(self, forward: StepForward) -> Wait:
        return None

    def cpu(self) -> Wait:
        return None


class StepForward:
    """A batch that is done."""

    def __init__(self, batch: ModelWorkerBatch, tokens: np.ndarray) -> None:
        self.batch = batch
        self._tokens = tokens

    def output(self) -> StepOutput:
        return StepOutput(self._tokens)


def _message(request: Request, ignore_eos: bool) -> Generate:
    params = SamplingParams(request.output, ignore_eos=ignore_eos, temperature=0.0)
    prompt = np.array(request.prompt, np.int32)
    return Generate(request.id, prompt, params, float(request.step), request.priority)
