"""Compare what two checkouts of the project stream: tokens a second, p99 of the time between tokens, CPU time.

    python benchmarks/streams.py ../base . --pairs 10

Each checkout serves a modelled GPU, and 100 plain completions of 800 tokens are streamed at once and read as they come:
with steps that take no time, so that the server's own CPU is the limit, for tokens and CPU time; then with steps that it can
just keep up with, for the time between tokens. Base and new alternate, and so does which of them is first: what counts is
the median of the ratios of pairs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.token_streams import MODEL, started, stream

STREAMS, TOKENS = 100, 800
BURSTS = 3
"""Under each load: their medians count."""
SATURATED, PACED = "0", "0.6"
"""Time scales: of an H100's steps."""


@dataclass(frozen=True)
class Measured:
    """One run of one checkout."""

    tokens_a_s: float
    p99_gap_s: float
    cpu_s: float
    """Of all processes of the server, over the streams."""


async def read_all(url: str, streams: int, tokens: int) -> tuple[float, np.ndarray]:
    """Return how long that many streams took, and all times between two tokens of one."""
    asked = [{"prompt": [5 + i] * 40, "max_tokens": tokens, "ignore_eos": True} for i in range(streams)]
    began_s = time.perf_counter()
    found = await asyncio.gather(*(stream(url, each) for each in asked))
    took_s = time.perf_counter() - began_s
    return took_s, np.concatenate([np.diff(each.at_s) for each in found])


def cpu_s(pid: int) -> float:
    """CPU time so far of a process and its children."""
    path = Path(f"/proc/{pid}")
    ticks = sum(map(int, (path / "stat").read_text().rpartition(")")[2].split()[11:13]))
    children = (path / "task" / str(pid) / "children").read_text().split()
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_s(int(child)) for child in children)


def streamed(tree: Path, time_scale: str) -> Measured:
    """Serve from a checkout and stream."""
    server, url = started(
        "serve", MODEL, "--backend", "simulated", "--time-scale", time_scale, "--port", "0", tree=tree
    )
    try:
        asyncio.run(read_all(url, 20, 20))
        found = [burst(server.pid, url) for _ in range(BURSTS)]
    finally:
        server.terminate()
        server.wait()
    return Measured(*(statistics.median(values) for values in zip(*map(astuple, found), strict=True)))


def burst(pid: int, url: str) -> Measured:
    """Stream once."""
    before_s = cpu_s(pid)
    took_s, gaps_s = asyncio.run(read_all(url, STREAMS, TOKENS))
    return Measured(STREAMS * TOKENS / took_s, float(np.percentile(gaps_s, 99)), cpu_s(pid) - before_s)


def measure(tree: Path) -> Measured:
    """Measure a checkout under both loads."""
    return replace(streamed(tree, SATURATED), p99_gap_s=streamed(tree, PACED).p99_gap_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    args = parser.parse_args()
    base, new = args.base.resolve(), args.new.resolve()
    pairs: list[tuple[Measured, Measured]] = []
    for i in range(args.pairs):
        order = (base, new) if i % 2 == 0 else (new, base)
        found = {tree: measure(tree) for tree in order}
        pairs.append((found[base], found[new]))
        for which, tree in (("base", base), ("new", new)):
            one = found[tree]
            said = f"{one.tokens_a_s:,.0f} tokens/s in {one.cpu_s:.2f} s of CPU, p99 gap {one.p99_gap_s * 1e3:.2f} ms"
            print(f"{i + 1} {which}: {said}", flush=True)
    for name in ("tokens_a_s", "p99_gap_s", "cpu_s"):
        ratios = [getattr(after, name) / getattr(before, name) for before, after in pairs]
        print(f"{name}: new / base {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
