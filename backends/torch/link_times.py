"""Times of all-reduces between the ranks of one machine: gloo between processes on a CPU, NCCL between GPUs.

The GPUs' half is the same code with another backend of ``torch.distributed``; it has never run on one.
"""

from __future__ import annotations

import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

REPEATS, WARMUP = 15, 3
PATIENCE = timedelta(minutes=5)
"""With a rank that died."""
SIZES = tuple(2**k for k in range(12, 25, 2))
"""Bytes of a message, 4 KiB to 16 MiB."""


def all_reduce_times(ranks: int, device: str, sizes: tuple[int, ...] = SIZES) -> list[tuple[int, float]]:
    """(bytes of the message, median seconds of an all-reduce over ``ranks``), measured on the rank that is done last.

    Raises RuntimeError in one line where the ranks cannot be started.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="workbench-") as folder:
        answers = context.SimpleQueue()
        processes = [
            context.Process(target=_rank, args=(r, ranks, device, f"{folder}/rendezvous", sizes, answers), daemon=True)
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{ranks} ranks on {device} could not exchange anything; the lines above say why")
        found: list[tuple[int, float]] = answers.get()
        return found


def _rank(rank: int, ranks: int, device: str, rendezvous: str, sizes: tuple[int, ...], answers: object) -> None:
    """The life of one rank: the first one answers."""
    place = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{Path(rendezvous)}",
        rank=rank,
        world_size=ranks,
        timeout=PATIENCE,
    )
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    found = []
    for size in sizes:
        message = torch.zeros(size // 2, dtype=torch.bfloat16, device=place)
        taken = torch.tensor([_timed(message) for _ in range(WARMUP + REPEATS)][WARMUP:], device=place)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        found.append((size, float(median(taken.tolist()))))
    if rank == 0:
        answers.put(found)  # type: ignore[attr-defined]
    dist.destroy_process_group()


def _timed(message: torch.Tensor) -> float:
    """Seconds of one all-reduce, all ranks beginning together."""
    dist.barrier()
    _wait(message)
    start = time.perf_counter()
    dist.all_reduce(message)
    _wait(message)
    return time.perf_counter() - start


def _wait(message: torch.Tensor) -> None:
    if message.device.type == "cuda":
        torch.cuda.synchronize()
