"""Our own runner on this machine's CPU: simulated from a calibration, and replayed.

    OMP_NUM_THREADS=1 python benchmarks/fidelity_cpu.py MODEL COSTS [--runs 3]

COSTS is what `workbench calibrate MODEL --backend cpu --max-running 32 --kv-tokens 16000 --out COSTS` wrote. Prints
simulated over real, of throughput and mean E2E, under normal and overlap, and the gain of overlap; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from reports.metrics import summarise
from traces import Trace, open_trace
from workbench.run.replay import replay_loop
from workbench.run.settings import RunSettings
from workbench.run.simulate import simulate_loop

LOADS = {"all at once": 0.0, "5 a second": 0.2}
"""Seconds between arrivals. All at once, both numbers are made of step times; beyond saturation otherwise queueing would
multiply every error of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("costs")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    dtype = json.loads(Path(given.costs).read_text())["dtype"]
    settings = RunSettings(
        model=given.model, gpu="cpu", dtype=dtype, cost=f"fitted:{given.costs}", max_running=32, kv_tokens=16000
    )
    with tempfile.TemporaryDirectory() as folder:
        print("load         run  loop     throughput sim/real  mean E2E sim/real  real tokens/s")
        for load, apart_s in LOADS.items():
            trace = open_trace(_write_trace(Path(folder) / f"{load}.jsonl", apart_s))
            for run in range(1, given.runs + 1):
                _run(load, run, settings, trace)


def _write_trace(path: Path, apart_s: float) -> Path:
    draw = random.Random(1)
    path.write_text("".join(
        json.dumps({"request_id": f"r{i}", "arrival_s": i * apart_s, "input_length": draw.randint(20, 120),
                    "output_length": draw.randint(10, 40)}) + "\n" for i in range(40)
    ))  # fmt: skip
    return path


def _run(load: str, run: int, settings: RunSettings, trace: Trace) -> None:
    rates = {}
    for loop in ("normal", "overlap"):
        said = {"trace_sha256": "", "command": "fidelity_cpu"}
        real = summarise(replay_loop(settings, loop, trace, device="cpu", load_format="auto", **said))
        made = summarise(simulate_loop(settings, loop, trace, **said))
        rates[loop] = made["output_throughput"], real["output_throughput"]
        throughput = made["output_throughput"] / real["output_throughput"]
        e2e = made["e2e_mean_s"] / real["e2e_mean_s"]
        print(
            f"{load:12} {run:<4} {loop:8} {throughput:<20.3f} {e2e:<18.3f} {real['output_throughput']:.0f}", flush=True
        )
    gains = [rates["overlap"][i] / rates["normal"][i] - 1 for i in (0, 1)]
    print(f"{load:12} {run:<4} gain of overlap: simulated {gains[0]:+.1%}, real {gains[1]:+.1%}", flush=True)


if __name__ == "__main__":
    main()
