"""Several ranks, one process each: on this machine, and where there are several nodes, on others."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from backends.torch.kv_ranks import KVRanks
from backends.torch.node_link import NodesFailed
from backends.torch.nodes import Nodes
from backends.torch.rank_process import Errand, Masks, RankProcesses
from backends.torch.workers import Result, RunnerOptions, WorkerDied
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput


class ManyWorkers:
    """One process a rank. Each gets every batch; hidden states go from stage to stage, the last stage answers.

    Ranks on other nodes are spoken to as those of this one are: over a connection each, which is a pipe here and TCP there.
    """

    def __init__(self, options: RunnerOptions) -> None:
        self._options = options
        self._nodes: Nodes | None = None
        self._asking = False
        """An answer of the ranks is waited for: what ends one is in it."""
        self._failed: str | None = None
        """Why the ranks have ended, when a batch has failed: one that raised no longer stands where the others do."""
        self._ranks: RankProcesses | None = None
        self._pipes: list[Connection] = []
        self._kv = KVRanks()
        self.read_kv, self.write_kv = self._kv.read, self._kv.write
        try:
            if options.place is not None:
                self._nodes = Nodes(options.place, options.tp * options.pp)
                self._ranks = RankProcesses(options, self._kv, self._nodes.address, self._nodes.store_port)
                remote = self._nodes.connections()
                self._pipes = [*self._ranks.pipes, *(remote[rank] for rank in sorted(remote))]
            else:
                self._ranks = RankProcesses(options, self._kv)
                self._pipes = self._ranks.pipes
            facts = self._answers()
            # Every rank holds part of every token: the one with least room decides.
            self.kv_tokens = min(fact["kv_tokens"] for fact in facts)
            self.max_context, self.vocab = facts[0]["max_context"], facts[0]["vocab"]
            self.eos_token_ids, (self.dtype, self.kv_dtype) = tuple(facts[0]["eos_token_ids"]), facts[0]["dtypes"]
            for pipe in self._pipes:
                pipe.send(self.kv_tokens // options.page_size)
            self._answers()
            if self._nodes is not None:
                self._nodes.serving()
        except NodesFailed as error:
            self.close(patience_s=0.0)
            raise WorkerDied(str(error)) from error
        except BaseException as error:
            self._failed = self._failed or _first_line(error)
            self.close(patience_s=0.0)  # a rank that loads is not listening
            raise
        self._last_token = np.zeros(options.rows + 1, np.int64)
        self._submitted: deque[_Pending] = deque()
        self._unsampled = False
        """Whether the batch submitted last still waits for its masks."""

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]:
        # With several stages the first one does not see what the last one samples, so the host passes it on; the pipeline
        # loop has it by then. With one, every rank samples the same tokens itself.
        known = self._last_token[batch.rows[batch.num_prefill :]] if self._options.pp > 1 else None
        if self._unsampled:
            self.sample(None)  # its loop has failed and left it waiting
        self._unsampled = batch.masked is not None
        self._send((batch, known))
        pending = _Pending(batch)
        self._submitted.append(pending)
        return lambda: self._result(pending)

    def sample(self, masks: np.ndarray | None) -> None:
        self._unsampled = False
        self._send(Masks(masks))

    def _result(self, wanted: _Pending) -> Result:
        while wanted.result is None:
            self._check_alive()
            pending = self._submitted.popleft()
            answers = self._answers()
            tokens, logprobs, _, prompt_logprobs = answers[-self._options.tp]  # the first rank of the last stage
            stages = [self._span(stage * self._options.tp, answers) for stage in range(self._options.pp)]
            pending.result = Result(StepOutput(tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs), stages)
            keep = np.ones(len(tokens), bool)
            if pending.batch.unsampled is not None:
                keep[pending.batch.unsampled] = False
            self._last_token[pending.batch.rows[keep]] = tokens[keep]
        return wanted.result

    def _span(self, rank: int, answers: list[Any]) -> tuple[float, float]:
        """When a rank began and ended its batch, on the clock of this machine."""
        span: tuple[float, float] = answers[rank][2]
        return span if self._nodes is None else self._nodes.on_our_clock(rank, span)

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        self._settle()
        self._send(Errand(errand, args))
        answers = self._answers()
        for rank, answer in enumerate(answers):
            if answer.refused is not None:
                raise self._of_node(rank, answer.refused)
        return [answer.value for answer in answers]

    def _send(self, work: Any) -> None:
        self._check_alive()
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(work)
            except OSError:
                self._settle()  # what it ended of, it has said in place of an answer
                raise WorkerDied(self._epitaph(rank)) from None

    def _settle(self) -> None:
        """Take in the answers to all batches that were submitted."""
        while self._submitted:
            self._result(self._submitted[0])

    def _answers(self) -> list[Any]:
        """The next answer of every rank, in their order. The first that raises is the cause: it leaves the others without
        a peer, and those say no more than that, or wait for it for good. Before it comes a node that was lost."""
        answers: dict[int, Any] = {}
        self._asking = True
        try:
            while len(answers) < len(self._pipes):
                silent = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
                for pipe in wait(list(silent)):
                    rank = silent[pipe]  # type: ignore[index]
                    answers[rank] = self._receive(rank)
        except Exception as error:
            if self._nodes is not None and (lost := self._nodes.cause()) is not None:
                self._failed = lost
                raise WorkerDied(lost) from error
            self._failed = _first_line(error)
            raise
        finally:
            self._asking = False
        return [answers[rank] for rank in range(len(self._pipes))]

    def _check_alive(self) -> None:
        if self._failed is not None:
            raise WorkerDied(f"the ranks of the model have ended: {self._failed}")

    def _receive(self, rank: int) -> Any:
        try:
            answer = self._pipes[rank].recv()
        except (EOFError, OSError):
            raise WorkerDied(self._epitaph(rank)) from None
        if isinstance(answer, Exception):
            raise self._of_node(rank, answer)
        return answer

    def _of_node(self, rank: int, error: Exception) -> Exception:
        """The error of a rank, with the name of the node where it is not this one."""
        name = None if self._nodes is None else self._nodes.name_of(rank)
        if name is None:
            return error
        if isinstance(error, ValueError):
            return ValueError(f"{name}: {error}")
        return WorkerDied(f"{name}: {_first_line(error)}")

    def _epitaph(self, rank: int) -> str:
        assert self._ranks is not None
        if self._nodes is not None and (lost := self._nodes.cause()) is not None:
            return lost
        if self._nodes is not None and (name := self._nodes.name_of(rank)) is not None:
            return f"{name}: rank {rank} of the model is gone"
        process = self._ranks.processes[rank]
        process.join(timeout=5)
        return f"rank {rank} of the model ended with exit code {process.exitcode}"

    def failure(self) -> str | None:
        if self._nodes is not None and self._nodes.failure is not None:
            return self._nodes.failure
        if self._asking or self._submitted or self._failed is not None or self._ranks is None:
            return None  # whoever waits for an answer is told
        gone = wait(self._ranks.sentinels, 0)
        return self._epitaph(self._ranks.ended(gone[0])[0]) if gone else None

    def end_asked(self) -> str | None:
        return None if self._nodes is None else self._nodes.end_asked

    def worked_s(self) -> float:
        assert self._ranks is not None
        there = 0.0 if self._nodes is None else self._nodes.worked_s()
        return self._ranks.signs.worked_s() + there

    def heard_s(self) -> float:
        assert self._ranks is not None
        here = self._ranks.signs.heard_s()
        return here if self._nodes is None else min(here, self._nodes.heard_s())

    def close(self, patience_s: float = 5.0) -> None:
        """End the ranks; those that have not ended by themselves after ``patience_s`` are killed."""
        self._kv.close()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it may be gone already
                pipe.send(None)
        if self._nodes is not None:
            self._nodes.close(patience_s, self._failed)
        for pipe in self._pipes:
            pipe.close()
        if self._ranks is not None:
            self._ranks.close(patience_s)


def _first_line(error: BaseException) -> str:
    """An error in one line; what is said to a user already is left as it is."""
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, ValueError | WorkerDied) else f"{type(error).__name__}: {line}"


@dataclass(slots=True, eq=False)
class _Pending:
    batch: ModelWorkerBatch
    result: Result | None = None
