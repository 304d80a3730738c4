"""The link between the ranks of this machine, from measured all-reduces, and the machine's file that says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backends.simulated.cost.models.least_squares import relative_least_squares
from ground.errors import InputError
from ground.link import Link, written_rate, written_time
from ground.whole_file import write_whole


@dataclass(frozen=True)
class LinkFit:
    """A link, and how well it describes what was measured."""

    link: Link
    mean_error: float
    """Mean absolute relative error."""
    measured: tuple[tuple[int, float], ...]
    """(bytes, seconds) of all-reduces."""


def fit_link(ranks: int, times: Sequence[tuple[int, float]]) -> LinkFit:
    """The latency and bandwidth of all-reduces of ``times`` (bytes, seconds): one latency and the ring's volume, as the cost
    models have it. Raises InputError where no bandwidth can be told."""
    volume = np.array([2 * (ranks - 1) / ranks * size for size, _ in times])
    seconds = np.array([each for _, each in times])
    rows = np.stack([np.ones(len(times)), volume], axis=1)
    latency_s, byte_s = relative_least_squares(rows, seconds)
    if not byte_s > 0:
        raise InputError("larger messages took no longer: no bandwidth can be told")
    error = float(np.abs(rows @ np.array([latency_s, byte_s]) / seconds - 1).mean())
    return LinkFit(Link(float(1 / byte_s), float(latency_s)), error, tuple(times))


def write_machine(path: Path, fit: LinkFit, ranks: int, device: str) -> None:
    """Write the file for ``--machine``. Raises InputError."""
    lines = [
        f"# Measured over {ranks} {'GPUs with NCCL' if device == 'cuda' else 'processes on a CPU with gloo'}: "
        f"all-reduces of {fit.measured[0][0]:,} to {fit.measured[-1][0]:,} bytes, off by {fit.mean_error:.1%} on average.",
        *([f"gpus-per-node = {ranks}"] if device == "cuda" else []),
        f'link = "{written_rate(fit.link.bandwidth)}"',
        f'link-latency = "{written_time(fit.link.latency_s)}"',
    ]
    write_whole(path, "\n".join(lines) + "\n")
