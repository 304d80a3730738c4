"""Who runs a batch: this process, or one process for each rank of a tensor- and pipeline-parallel group.

Either way batches run in the order in which they were submitted, and the scheduler waits for nothing but results.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from backends.torch.device_clock import DeviceClock
from backends.torch.loader import load_model
from backends.torch.ops import load_ops
from backends.torch.parallel import SINGLE, Parallel
from backends.torch.rank import Rank
from backends.torch.runner import ModelRunner, NoRoomForKV
from backends.torch.sampler import DeviceLogprobs
from backends.torch.signs import Signs, cpu_clock
from workbench.scheduler.batch import Logprobs, ModelWorkerBatch, StepOutput


@dataclass(frozen=True)
class RunnerOptions:
    """What a rank needs to know to load its share of a model and run it."""

    model: str
    device: str = "cpu"
    """``cpu`` or ``cuda``; rank r of several takes GPU r."""
    dtype: str | None = None
    """Of weights and activations, as torch calls it; None: as saved."""
    fp8: bool = False
    """Hold the projections in FP8."""
    load_format: str = "auto"
    ops: str | None = None
    tp: int = 1
    pp: int = 1
    rows: int = 256
    """Requests that hold KV at a time."""
    max_context: int | None = None
    page_size: int = 1
    mem_fraction: float = 0.9
    kv_tokens: int | None = None
    """KV capacity; None finds it from memory."""
    step_tokens: int = 8192
    """Most prompt tokens of one batch: what working memory is measured with."""
    capture_sizes: tuple[int, ...] = ()
    """Decode batch sizes to capture as CUDA graphs."""
    seed: int = 0
    cpu_kv_bytes: int = 4 * 2**30
    """On a CPU: bytes of KV unless ``kv_tokens`` says how many tokens."""


class Result(NamedTuple):
    """What came of a batch, on the host."""

    output: StepOutput
    stages: list[tuple[float, float]]
    """(start, end) on each stage, in seconds of the monotonic clock."""


class Workers(Protocol):
    """Runs batches. ``submit`` returns a function that blocks until that batch's result is there."""

    kv_tokens: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    vocab: int
    dtype: str
    """Of the weights, as torch calls it: ``bfloat16``; ``fp8`` where the projections are."""
    kv_dtype: str
    """Of keys and values, as torch calls it: that of the weights, or of what is computed with FP8 ones."""

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]: ...

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        """Do something to every rank, a method of :class:`Rank`, after the batches submitted so far and before the next;
        returns what each has answered.

        Raises ValueError, the first rank's, when any of them does.
        """
        ...

    def worked_s(self) -> float:
        """Grows while a batch computes. On a GPU it stands: nothing tells a long step of it from one that hangs."""
        ...

    def heard_s(self) -> float:
        """``time.monotonic()`` when the rank that is silent longest was last heard of."""
        ...

    def close(self, patience_s: float = 5.0) -> None:
        """End the ranks. One that runs a profile writes it, if it takes no longer than ``patience_s``."""
        ...


class WorkerDied(RuntimeError):
    """A rank's process ended or failed; the message says which and why, in one line."""


def start_workers(options: RunnerOptions) -> Workers:
    """Load the model, find the KV capacity, and be ready to run batches.

    Raises ModelNotFound, UnsupportedModel, BadCheckpoint, NoRoomForKV, or ValueError for a device that is not there.
    """
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device: cuda was asked for and torch sees no GPU")
        if torch.cuda.device_count() < options.tp * options.pp:
            raise ValueError(
                f"tp {options.tp} x pp {options.pp} needs {options.tp * options.pp} GPUs, there are "
                f"{torch.cuda.device_count()}"
            )
    if options.tp * options.pp > 1:
        return ManyWorkers(options)
    return CudaWorker(options) if device.type == "cuda" else CpuWorker(options)


def _load(options: RunnerOptions, parallel: Parallel, device: torch.device) -> ModelRunner:
    ops = load_ops(options.ops, device)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model, config = load_model(
        options.model,
        dtype=dtype,
        device=device,
        ops=ops,
        parallel=parallel,
        load_format=options.load_format,  # type: ignore[arg-type]
        max_context=options.max_context,
        seed=options.seed,
        fp8=options.fp8,
    )
    return ModelRunner(
        model,
        config,
        ops,
        device,
        rows=options.rows,
        max_context=config.max_context,
        page_size=options.page_size,
        seed=options.seed,
    )


def _capacity(runner: ModelRunner, options: RunnerOptions) -> int:
    if options.kv_tokens is not None:
        return options.kv_tokens
    if runner.device.type == "cuda":
        return runner.measure_kv_tokens(
            options.mem_fraction, options.step_tokens, max(options.capture_sizes, default=0)
        )
    tokens = min(options.cpu_kv_bytes // runner.kv_bytes_per_token, options.rows * runner.max_context)
    if tokens < options.page_size:
        raise NoRoomForKV(f"kv_tokens: {options.cpu_kv_bytes} bytes hold no page of {options.page_size} tokens")
    return tokens


def _dtype_names(runner: ModelRunner) -> tuple[str, str]:
    """(of the weights, of keys and values)."""
    computed = str(runner.config.dtype or torch.float32).removeprefix("torch.")
    return computed if runner.config.fp8 is None else "fp8", computed


class _OneProcess:
    """A single rank in this process."""

    def __init__(self, options: RunnerOptions, device: torch.device) -> None:
        self.runner = _load(options, SINGLE, device)
        self.rank = Rank(self.runner, fp8=options.fp8, max_context=options.max_context)
        self.kv_tokens = _capacity(self.runner, options)
        self.max_context = self.runner.max_context
        self.eos_token_ids = self.runner.config.eos_token_ids
        self.vocab = self.runner.config.vocab
        self.dtype, self.kv_dtype = _dtype_names(self.runner)
        self.runner.allocate(self.kv_tokens // options.page_size)
        self.runner.capture(list(options.capture_sizes))
        self.worked_s: Callable[[], float] = lambda: 0.0

    def heard_s(self) -> float:
        return time.monotonic()


class CpuWorker(_OneProcess):
    """A thread that computes while the scheduler's thread goes on: torch lets the interpreter go meanwhile."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options, torch.device("cpu"))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.worked_s = self._thread.submit(cpu_clock).result()

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]:
        future: Future[Result] = self._thread.submit(self._run, batch)
        return future.result

    def _run(self, batch: ModelWorkerBatch) -> Result:
        start = time.monotonic()
        out = self.rank.run(batch)
        assert out.tokens is not None
        output = StepOutput(out.tokens.numpy(), logprobs=_host(out.logprobs))
        result = Result(output, [(start, time.monotonic())])
        self.rank.ran()
        return result

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        return [self._thread.submit(errand, self.rank, *args).result()]

    def close(self, patience_s: float = 5.0) -> None:
        """Waits for what is being computed, however long it takes."""
        if self.rank.profile is not None:
            self.everywhere(Rank.close)
        self._thread.shutdown(wait=True, cancel_futures=True)


class CudaWorker(_OneProcess):
    """Launches from the caller's thread, asynchronously; results come back through pinned memory and an event.

    All of it is in one stream, so every step sees what those before it have written: last tokens, pages, keys and values,
    and the buffers of the CUDA graphs. The pinned memory of a result lives until it has been read.
    """

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options, torch.device("cuda", 0))
        began = torch.cuda.Event(enable_timing=True)
        began.record()
        began.synchronize()
        self._clock = DeviceClock(began, time.monotonic())

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The start is recorded right in front of the computation: a device with nothing to do passes an event at once, and
        # the host's preparation of the step would count as its work.
        out = self.rank.run(batch, begin=start.record)
        assert out.tokens is not None
        tokens = _to_host(out.tokens)
        logprobs = (
            None
            if out.logprobs is None
            else DeviceLogprobs(
                _to_host(out.logprobs.sampled), _to_host(out.logprobs.top), _to_host(out.logprobs.top_ids)
            )
        )
        end.record()
        self.rank.ran()

        def result() -> Result:
            waited = not end.query()
            end.synchronize()
            stage = self._clock.at(start, end, time.monotonic(), waited)
            return Result(StepOutput(tokens.numpy().copy(), logprobs=_host(logprobs)), [stage])

        return result

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        torch.cuda.synchronize()  # a profile begins with the next batch, not with what is left of the one before
        return [errand(self.rank, *args)]

    def close(self, patience_s: float = 5.0) -> None:
        self.rank.close()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy into pinned memory that is done when the stream is."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _host(logprobs: DeviceLogprobs | None) -> Logprobs | None:
    if logprobs is None:
        return None
    return Logprobs(logprobs.sampled.numpy().copy(), logprobs.top.numpy().copy(), logprobs.top_ids.numpy().copy())


# -- several ranks -----------------------------------------------------------------------------------------------------


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
        self._processes: list[Any] = []
        resource_tracker.ensure_running()  # which would let Ctrl-C through again, were it to start with the first child
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, options, str(rendezvous), theirs, self._signs), daemon=True
            )
            # A child hit by Ctrl-C before it ignores it would complain.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            theirs.close()
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
        self._last_token = np.zeros(options.rows + 1, np.int64)
        self._submitted: deque[_Pending] = deque()

    def submit(self, batch: ModelWorkerBatch) -> Callable[[], Result]:
        # With several stages the first one does not see what the last one samples, so the host passes it on; the pipeline
        # loop has it by then. With one, every rank samples the same tokens itself.
        known = self._last_token[batch.rows[batch.num_prefill :]] if self._options.pp > 1 else None
        self._send((batch, known))
        pending = _Pending(batch)
        self._submitted.append(pending)
        return lambda: self._result(pending)

    def _result(self, wanted: _Pending) -> Result:
        while wanted.result is None:
            pending = self._submitted.popleft()
            answers = [self._receive(rank) for rank in range(len(self._pipes))]
            tokens, logprobs, _ = answers[-self._options.tp]  # the first rank of the last stage
            stages = [answers[stage * self._options.tp][2] for stage in range(self._options.pp)]
            pending.result = Result(StepOutput(tokens, logprobs=logprobs), stages)
            keep = np.ones(len(tokens), bool)
            if pending.batch.unsampled is not None:
                keep[pending.batch.unsampled] = False
            self._last_token[pending.batch.rows[keep]] = tokens[keep]
        return wanted.result

    def everywhere(self, errand: Callable[..., Any], *args: Any) -> list[Any]:
        while self._submitted:  # their answers come first
            self._result(self._submitted[0])
        self._send(_Errand(errand, args))
        answers = [self._receive(rank) for rank in range(len(self._pipes))]
        for answer in answers:
            if answer.refused is not None:
                raise answer.refused
        return [answer.value for answer in answers]

    def _send(self, work: Any) -> None:
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(work)
            except OSError:
                raise WorkerDied(self._epitaph(rank)) from None

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
    """What a rank is to do beside batches."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    value: Any
    refused: ValueError | None = None


def _rank_main(rank: int, options: RunnerOptions, rendezvous: str, pipe: Connection, signs: Signs) -> None:
    """The life of one rank's process. Ctrl-C is its parent's business, which has a step to finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signs.give(rank, options.device == "cpu")
    try:
        _serve_rank(rank, options, rendezvous, pipe)
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


def _serve_rank(rank: int, options: RunnerOptions, rendezvous: str, pipe: Connection) -> None:
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
    runner = _load(options, parallel, device)
    own = Rank(runner, rank, fp8=options.fp8, max_context=options.max_context)
    pipe.send(
        {
            "kv_tokens": _capacity(runner, options),
            "max_context": runner.max_context,
            "vocab": runner.config.vocab,
            "eos_token_ids": runner.config.eos_token_ids,
            "dtypes": _dtype_names(runner),
        }
    )
    runner.allocate(pipe.recv())
    runner.capture(list(options.capture_sizes))
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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.monotonic()
        if out.hidden is not None:
            # The tensor is kept until it has been sent.
            sending.append((dist.isend(out.hidden.contiguous(), dst=rank + options.tp), out.hidden))
            while sending and sending[0][0].is_completed():
                sending.popleft()
            pipe.send((None, None, (start, end)))
        elif tp_rank == 0:
            assert out.tokens is not None
            logprobs = (
                None
                if out.logprobs is None
                else DeviceLogprobs(out.logprobs.sampled.cpu(), out.logprobs.top.cpu(), out.logprobs.top_ids.cpu())
            )
            pipe.send((out.tokens.cpu().numpy(), _host(logprobs), (start, end)))
        else:
            pipe.send((None, None, (start, end)))
        own.ran()
    own.close()
