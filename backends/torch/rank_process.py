"""The processes of ranks: how those of this machine are started, and the life of one."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from backends.torch.kv_ranks import KVRanks, serve_kv
from backends.torch.node_link import RankHello, connected, interface_of
from backends.torch.parallel import Parallel
from backends.torch.rank import Rank
from backends.torch.sampler import DeviceLogprobs
from backends.torch.signs import Signs
from backends.torch.workers import RunnerOptions, WorkerDied, dtype_names, kv_capacity, load_runner, on_host


@dataclass(frozen=True, slots=True)
class Errand:
    """A task of a rank beside batches."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Masks:
    """Follows a batch with masked rows."""

    masks: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an errand."""

    value: Any
    refused: ValueError | None = None


@dataclass(frozen=True, slots=True)
class _Meeting:
    """Where ranks find one another: a file of this machine, or a store of node 0."""

    address: str
    """Of this machine, on which alone its ranks listen for each other."""
    file: str | None = None
    store_port: int | None = None


class RankProcesses:
    """The ranks of a model that are processes of this machine: all, or those of one node."""

    def __init__(
        self, options: RunnerOptions, kv: KVRanks, address: str = "127.0.0.1", store_port: int | None = None
    ) -> None:
        """Their KV is read and written through ``kv``. Ranks listen for each other on ``address``, and find each other by
        the store at ``store_port`` of node 0, or where all of them are here by a file."""
        here = options.ranks_here
        context = torch.multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="workbench-")
        meeting = _Meeting(address, None if store_port else str(Path(self._folder.name) / "rendezvous"), store_port)
        self.signs = Signs(context, len(here))
        self.pipes: list[Connection] = []
        """To each rank; none on a node beside node 0, whose ranks node 0 speaks to itself."""
        self.processes: list[Any] = []
        self._seen: set[int] = set()
        """Of those processes, which have been seen to end."""
        self._first = here[0]
        resource_tracker.ensure_running()  # which would let Ctrl-C through again, were it to start with the first child
        for rank in here:
            ours: Connection | None = None
            theirs: Connection | None = None
            if options.node == 0:
                ours, theirs = context.Pipe()
            kv_pipe = kv.pipe(context)
            process = context.Process(
                target=_rank_main, args=(rank, options, meeting, theirs, kv_pipe, self.signs), daemon=True
            )
            # A child hit by Ctrl-C before it ignores it would complain.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            kv_pipe.close()
            if ours is not None and theirs is not None:
                theirs.close()
                self.pipes.append(ours)
            self.processes.append(process)

    @property
    def sentinels(self) -> list[Any]:
        """Of the ranks that have not been seen to end, for ``multiprocessing.connection.wait``."""
        return [process.sentinel for number, process in enumerate(self.processes) if number not in self._seen]

    def ended(self, sentinel: Any) -> tuple[int, int]:
        """(rank, exit code) of the process with a sentinel that is ready."""
        number = next(i for i, process in enumerate(self.processes) if process.sentinel == sentinel)
        self.processes[number].join()
        self._seen.add(number)
        return self._first + number, self.processes[number].exitcode

    def close(self, patience_s: float) -> None:
        """End the ranks; those that have not ended by themselves after ``patience_s`` are killed."""
        until_s = time.monotonic() + patience_s
        for process in self.processes:
            process.join(timeout=max(until_s - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _rank_main(
    rank: int, options: RunnerOptions, meeting: _Meeting, pipe: Connection | None, kv: Connection, signs: Signs
) -> None:
    """The life of one rank's process. Ctrl-C is its parent's business, which has a step to finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _follow_parent()
    signs.give(rank - options.ranks_here[0], options.device == "cpu")
    if pipe is None:
        assert options.place is not None
        pipe = connected(options.place)
        pipe.send(RankHello(rank))
    try:
        _serve_rank(rank, options, meeting, pipe, kv)
    except (EOFError, BrokenPipeError, ConnectionResetError):
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


def _follow_parent() -> None:
    """End with the process that has started this one, whatever is being computed."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def _join_group(rank: int, options: RunnerOptions, meeting: _Meeting, backend: str) -> None:
    """Meet the other ranks. They listen for each other on one interface of this machine alone, where it can be told."""
    if (interface := interface_of(meeting.address)) is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    world = options.tp * options.pp
    store: dist.Store
    if meeting.file is not None:
        store = dist.FileStore(meeting.file, world)
    else:
        assert options.place is not None and meeting.store_port is not None
        host = meeting.address if options.node == 0 else options.place.host
        store = dist.TCPStore(host, meeting.store_port, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def _serve_rank(rank: int, options: RunnerOptions, meeting: _Meeting, pipe: Connection, kv: Connection) -> None:
    here = options.ranks_here
    device = torch.device("cuda", rank - here[0]) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join_group(rank, options, meeting, "nccl" if device.type == "cuda" else "gloo")
    # Ranks on one machine share its cores: threads that spin for each other on a core too few make a step many times longer.
    torch.set_num_threads(max(1, torch.get_num_threads() // len(here)))
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
        if isinstance(work, Errand):
            try:
                pipe.send(Answer(work.function(own, *work.args)))
            except ValueError as error:
                pipe.send(Answer(None, error))
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
