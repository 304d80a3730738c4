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
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

STREAMS, TOKENS = 100, 800
BURSTS = 3
"""Under each load: their medians count."""
MARK = b"data: {"
SATURATED, PACED = "0", "0.6"
"""Time scales: of an H100's steps."""
MODEL = "llama-3.1-8b"


@dataclass(frozen=True)
class Measured:
    """One run of one checkout."""

    tokens_a_s: float
    p99_gap_s: float
    cpu_s: float
    """Of all processes of the server, over the streams."""


class Reader(asyncio.Protocol):
    """One stream, and when its events came."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._before = b""
        """The end of what came, in which a mark may have begun."""
        self.at_s: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        transport.write(head + b"Content-Length: %d\r\n\r\n" % len(self._body) + self._body)

    def data_received(self, data: bytes) -> None:
        data = self._before + data
        self.at_s += [time.perf_counter()] * data.count(MARK)
        self._before = data[1 - len(MARK) :]

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(error)


async def read_all(port: int, streams: int, tokens: int) -> tuple[float, list[float]]:
    """Return how long that many streams took, and all times between two tokens of one."""
    loop = asyncio.get_running_loop()
    asked = [{"prompt": [5 + i] * 40, "max_tokens": tokens, "ignore_eos": True, "stream": True} for i in range(streams)]
    began_s = time.perf_counter()
    readers = [
        (await loop.create_connection(lambda one=one: Reader(json.dumps(one).encode()), "127.0.0.1", port))[1]
        for one in asked
    ]
    await asyncio.gather(*(reader.ended for reader in readers))
    took_s = time.perf_counter() - began_s
    for reader in readers:
        assert len(reader.at_s) == tokens, f"{len(reader.at_s)} tokens came"
    return took_s, np.concatenate([np.diff(reader.at_s) for reader in readers]).tolist()


def cpu_s(pid: int) -> float:
    """CPU time so far of a process and its children."""
    path = Path(f"/proc/{pid}")
    ticks = sum(map(int, (path / "stat").read_text().rpartition(")")[2].split()[11:13]))
    children = (path / "task" / str(pid) / "children").read_text().split()
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_s(int(child)) for child in children)


def streamed(tree: Path, time_scale: str) -> Measured:
    """Serve from a checkout and stream."""
    command = [sys.executable, "-c", "from workbench.cli.main import main; main()", "serve", MODEL]
    command += ["--backend", "simulated", "--time-scale", time_scale, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"on http://\S+?:(\d+)", server.stdout.readline())
        assert found is not None, "the server did not start"
        port = int(found[1])
        asyncio.run(read_all(port, 20, 20))
        found = [burst(server.pid, port) for _ in range(BURSTS)]
    finally:
        server.terminate()
        server.wait()
    return Measured(*(statistics.median(values) for values in zip(*map(astuple, found), strict=True)))


def burst(pid: int, port: int) -> Measured:
    """Stream once."""
    before_s = cpu_s(pid)
    took_s, gaps_s = asyncio.run(read_all(port, STREAMS, TOKENS))
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
