"""Several ranks, one process each."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from backends.torch.kv_ranks import KVRanks, serve_kv
from backends.torch.parallel import Parallel
from backends.torch.rank import Rank
from backends.torch.sampler import DeviceLogprobs
from backends.torch.signs import Signs
from backends.torch.workers import Result, RunnerOptions, WorkerDied, dtype_names, kv_capacity, load_runner, on_host
from workbench.scheduler.batch import ModelWorkerBatch, StepOutput


class ManyWorkers:
    """One process a rank. Each gets every batch; hidden states go from stage to stage, the last stage answers."""

    def __init__(self, options: RunnerOptions) -> None:
        self._options = options
        world = options.tp * options.pp
        context = torch.multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="workbench-")
        rendezvous = Path(self._folder.name) / "rendezvous"
        self._signs = Signs(context, world)
        self.worked_s, self.heard_s = self._signs.worked_s, self._signs.heard_s
        self._pipes: list[Connection] = []
        self._kv = KVRanks()
        self.read_kv, self.write_kv = self._kv.read, self._kv.write
        self._processes: list[Any] = []
        resource_tracker.ensure_running()  # which would let Ctrl-C through again, were it to start with the first child
        for rank in range(world):
            ours, theirs = context.Pipe()
            kv = self._kv.pipe(context)
            process = context.Process(
                target=_rank_main, args=(rank, options, str(rendezvous), theirs, kv, self._signs), daemon=True
            )
            # A child hit by Ctrl-C before it ignores it would complain.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            theirs.close()
            kv.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            facts = [self._receive(rank) for rank in range(world)]
            # Every rank holds part of every token: the one with least room decides.
            self.kv_tokens = min(fact["kv_tokens"] for fact in facts)
            self.max_context, self.vocab = facts[0]["max_context"], facts[0]["vocab"]
            self.eos_token_ids, (self.dtype, self.kv_dtype) = tuple(facts[0]["eos_token_ids"]), facts[0]["dtypes"]
            for pipe in self._pipes:
                pipe.send(self.kv_tokens // options.page_size)
            for rank in range(world):
                self._receive(rank)
        except BaseException:
            self.close(patience_s=0.0)  # a rank that loads is not listening
            raise
        self._failed: str | None = None
        """Why the ranks have ended, when a batch has failed: one that raised no longer stands where the others do."""
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
        self._send(_Masks(masks))

    def _result(self, wanted: _Pending) -> Result:
        while wanted.result is None:
            self._check_alive()
            pending = self._submitted.popleft()
            answers = self._answers()
            tokens, logprobs, _, prompt_logprobs = answers[-self._options.tp]  # the first rank of the last stage
            stages = [answers[stage * self._options.tp][2] for stage in range(self._options.pp)]
            pending.result = Result(StepOutput(tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs), stages)
            keep = np.ones(len(tokens), bool)
            if pending.batch.unsampled is not None:
                keep[pending.batch.unsampled] = False
            self._last_token[pending.batch.rows[keep]] = tokens[keep]
        return wanted.result

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        self._settle()
        self._send(_Errand(errand, args))
        answers = self._answers()
        for answer in answers:
            if answer.refused is not None:
                raise answer.refused
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
        a peer, and those say no more than that, or wait for it for good."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            silent = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for pipe in wait(list(silent)):
                rank = silent[pipe]  # type: ignore[index]
                try:
                    answers[rank] = self._receive(rank)
                except Exception as error:
                    self._failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    raise
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
            raise answer
        return answer

    def _epitaph(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(timeout=5)
        return f"rank {rank} of the model ended with exit code {process.exitcode}"

    def close(self, patience_s: float = 5.0) -> None:
        """End the ranks; those that have not ended by themselves after ``patience_s`` are killed."""
        self._kv.close()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it may be gone already
                pipe.send(None)
            pipe.close()
        until_s = time.monotonic() + patience_s
        for process in self._processes:
            process.join(timeout=max(until_s - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


@dataclass(slots=True, eq=False)
class _Pending:
    batch: ModelWorkerBatch
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class _Errand:
    """A task of a rank beside batches."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Masks:
    """Follows a batch with masked rows."""

    masks: np.ndarray | None


@dataclass(frozen=True, slots=True)
class _Answer:
    value: Any
    refused: ValueError | None = None


def _rank_main(
    rank: int, options: RunnerOptions, rendezvous: str, pipe: Connection, kv: Connection, signs: Signs
) -> None:
    """The life of one rank's process. Ctrl-C is its parent's business, which has a step to finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signs.give(rank, options.device == "cpu")
    try:
        _serve_rank(rank, options, rendezvous, pipe, kv)
    except (EOFError, BrokenPipeError):
        pass  # the scheduler's process is gone
    except Exception as error:
        try:
            pipe.send(error)
        except Exception:
            pipe.send(WorkerDied(f"rank {rank}: {type(error).__name__}: {str(error).splitlines()[0]}"))
    finally:
        pipe.close()
        if dist.is_initialized():
            os._exit(0)  # leaving the group waits for ranks that may be gone


def _serve_rank(rank: int, options: RunnerOptions, rendezvous: str, pipe: Connection, kv: Connection) -> None:
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=options.tp * options.pp,
    )
    # Ranks on one machine share its cores: threads that spin for each other on a core too few make a step many times longer.
    torch.set_num_threads(max(1, torch.get_num_threads() // (options.tp * options.pp)))
    groups = [dist.new_group(list(range(s * options.tp, (s + 1) * options.tp))) for s in range(options.pp)]
    stage, tp_rank = divmod(rank, options.tp)
    parallel = Parallel(options.tp, tp_rank, options.pp, stage, groups[stage])
    runner = load_runner(options, parallel, device)
    own = Rank(runner, rank, fp8=options.fp8, max_context=options.max_context)
    pipe.send(
        {
            "kv_tokens": kv_capacity(runner, options),
            "max_context": runner.max_context,
            "vocab": runner.config.vocab,
            "eos_token_ids": runner.config.eos_token_ids,
            "dtypes": dtype_names(runner),
        }
    )
    runner.allocate(pipe.recv())
    runner.capture(list(options.capture_sizes))
    assert runner.kv_pages is not None
    serve_kv(kv, runner.kv_pages)
    pipe.send("ready")
    sending: deque[tuple[Any, Tensor]] = deque()
    while (work := pipe.recv()) is not None:
        if isinstance(work, _Errand):
            try:
                pipe.send(_Answer(work.function(own, *work.args)))
            except ValueError as error:
                pipe.send(_Answer(None, error))
            continue
        batch, known = work
        hidden = None
        if not parallel.first_stage:
            tokens = batch.prefill_tokens + batch.decode_tokens
            hidden = torch.empty((tokens, runner.config.hidden), dtype=runner.config.dtype, device=device)
            dist.recv(hidden, src=rank - options.tp)
        start = time.monotonic()
        out = own.run(batch, hidden, known)
        if batch.masked is not None:
            masks = pipe.recv()
            if masks is None:
                break  # nobody waits for its samples any more
            if parallel.last_stage:
                out = own.sample(masks.masks)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.monotonic()
        if out.hidden is not None:
            # The tensor is kept until it has been sent.
            sending.append((dist.isend(out.hidden.contiguous(), dst=rank + options.tp), out.hidden))
            while sending and sending[0][0].is_completed():
                sending.popleft()
            pipe.send((None, None, (start, end), None))
        elif tp_rank == 0:
            assert out.tokens is not None
            logprobs = (
                None
                if out.logprobs is None
                else DeviceLogprobs(out.logprobs.sampled.cpu(), out.logprobs.top.cpu(), out.logprobs.top_ids.cpu())
            )
            pipe.send((out.tokens.cpu().numpy(), on_host(logprobs), (start, end), out.prompt_logprobs))
        else:
            pipe.send((None, None, (start, end), None))
        own.ran()
    own.close()
