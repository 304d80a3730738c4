"""What a simulation costs: the hour of the Azure conversation trace, and the first sign of progress.

    python benchmarks/simulator.py [TRACE]

Prints wall time, peak memory and iterations/s of one process under the overlap loop (page size 1, radix cache on), and the
time from the start of the command to its first progress line. Nothing is asserted: the numbers depend on the machine.
"""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[2] / "shared/data/traces/azure2023_conv.csv.gz"


def command(trace: Path, out: Path) -> list[str]:
    entry = "from workbench.cli.main import main; main()"
    return [sys.executable, "-c", entry, "simulate", str(trace), "--loop", "overlap", "--out", str(out)]


def first_progress_s(trace: Path, out: Path) -> float:
    """Seconds until the progress bar shows simulated time, on a terminal."""
    main, side = pty.openpty()
    began = time.monotonic()
    process = subprocess.Popen(command(trace, out), stderr=side, stdout=subprocess.DEVNULL)
    seen = b""
    while b"simulated" not in seen:
        seen += os.read(main, 4096)
    elapsed = time.monotonic() - began
    process.kill()
    process.wait()
    return elapsed


def main() -> None:
    trace = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not trace.is_file():
        sys.exit(f"error: {trace}: no such file; name a trace")
    with tempfile.TemporaryDirectory() as folder:
        print(f"first progress after {first_progress_s(trace, Path(folder) / 'a'):.2f} s")
        began = time.monotonic()
        done = subprocess.run([*command(trace, Path(folder) / "b"), "--json"], capture_output=True, text=True)
        wall_s = time.monotonic() - began
        if done.returncode:
            sys.exit(done.stderr)
        metrics = json.loads(done.stdout)["runs"]["overlap"]["metrics"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"{trace.name}: {metrics['requests_finished']:,} requests, {metrics['iterations']:,} iterations in {wall_s:.1f} s "
        f"({metrics['iterations'] / wall_s:,.0f} iterations/s, records and report included), peak {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
