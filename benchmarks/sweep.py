"""How much of a machine a 64-point sweep over a 2,000-request trace uses.

    python benchmarks/sweep.py

Prints wall time, the CPU time of the sweep and its runs, their ratio to the cores there are, and how busy the whole machine
was meanwhile: only where nothing else runs is the ratio that of the sweep.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAIN = [sys.executable, "-c", "from workbench.cli.main import main; main()"]


def machine_s() -> tuple[float, float]:
    """(busy, idle) seconds of all cores since the machine started."""
    ticks = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), idle / os.sysconf("SC_CLK_TCK")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        subprocess.run(
            [
                *MAIN,
                "trace",
                "generate",
                str(trace),
                "--requests",
                "2000",
                "--rate",
                "10",
                "--input",
                "lognormal:mean=800,sigma=1,max=4000",
                "--output",
                "lognormal:mean=100,sigma=0.8,max=500",
            ],
            check=True,
            capture_output=True,
        )
        vary = ["tp=1,2", "loop=normal,overlap", "chunk=512,2048,8192,0", "rate=8,12,16,20"]
        words = ["sweep", str(trace), *(word for text in vary for word in ("--vary", text)), "--out", f"{folder}/o"]
        began_s, (busy_s, idle_s) = time.monotonic(), machine_s()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*MAIN, *words], check=True, stdout=subprocess.DEVNULL)
        wall_s, after, (busy_end_s, idle_end_s) = (
            time.monotonic() - began_s,
            resource.getrusage(resource.RUSAGE_CHILDREN),
            machine_s(),
        )
    user_s, system_s = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    machine = (busy_end_s - busy_s) / (busy_end_s - busy_s + idle_end_s - idle_s)
    print(f"wall {wall_s:.1f} s, user {user_s:.1f} s, system {system_s:.1f} s on {cores} cores")
    print(
        f"user / (wall x cores) {user_s / wall_s / cores:.1%}; with system time {(user_s + system_s) / wall_s / cores:.1%}"
    )
    print(
        f"the machine was {machine:.1%} busy, {(busy_end_s - busy_s - user_s - system_s) / wall_s / cores:.1%} with others"
    )


if __name__ == "__main__":
    main()
