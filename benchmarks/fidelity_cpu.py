"""Our own runner on this machine's CPU: calibrated, simulated and replayed, all within the same minutes.

    OMP_NUM_THREADS=1 python benchmarks/fidelity_cpu.py MODEL [--rounds 3] [--replays 6]

MODEL is a folder. A round is a calibration with the replays spread evenly between its points, and the simulation of the same
load with what the calibration found, as a profile and as fitted costs: a machine whose speed changes from minute to minute
changes both alike. Prints simulated over real of throughput and mean E2E, under normal and overlap, and the gain of overlap;
nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from reports.metrics.summary import summarise
from reports.record.run_record import RunRecord
from traces import Trace, open_trace
from workbench.calibrate.measure import measure, points_folder
from workbench.calibrate.points import fit_points
from workbench.cluster.replay import replay_loop
from workbench.cluster.simulate import simulate_loop
from workbench.settings.run_settings import RunSettings

LOADS = {"all at once": 0.0, "5 a second": 0.2}
"""Seconds between arrivals. All at once, both numbers are made of step times; beyond saturation otherwise queueing would
multiply every error of them."""
LOOPS = ("normal", "overlap")
SAID = {"trace_sha256": "", "command": "fidelity_cpu"}


@dataclass
class Seen:
    """Summaries of the replays of one load under one loop."""

    throughputs: list[float] = field(default_factory=list)
    e2es_s: list[float] = field(default_factory=list)

    def add(self, record: RunRecord) -> None:
        found = summarise(record)
        self.throughputs.append(found["output_throughput"])
        self.e2es_s.append(found["e2e_mean_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replays", type=int, default=6, help="Of each load under each loop, in a round.")
    given = parser.parse_args()
    settings = RunSettings(model=given.model, dtype="auto", max_running=32, kv_tokens=16000)
    with tempfile.TemporaryDirectory() as folder:
        traces = {
            load: open_trace(_write_trace(Path(folder) / f"{load}.jsonl", apart_s)) for load, apart_s in LOADS.items()
        }
        print(
            "round costs    load         loop     throughput sim/real  mean E2E sim/real  real tokens/s (least, most)"
        )
        for number in range(1, given.rounds + 1):
            profile, fitted = Path(folder) / f"profile{number}", Path(folder) / f"costs{number}.json"
            seen: dict[tuple[str, str], Seen] = defaultdict(Seen)
            found = measure(settings, "cpu", "auto", profile, _between(settings, traces, seen, given.replays))
            stage = fit_points(points_folder(profile), fitted)["stages"][0]
            print(
                f"{number}     {stage['steps']:,} steps, each off by {found['operators']['mean_error']:.1%} (profile) and "
                f"{stage['mean_error']:.1%} (fitted)",
                flush=True,
            )
            for cost in (f"profile:{profile}", f"fitted:{fitted}"):
                modelled = replace(settings, gpu="cpu", dtype=found["dtype"], cost=cost)
                for load, trace in traces.items():
                    _compare(number, load, modelled, trace, seen)


def _between(
    settings: RunSettings, traces: dict[str, Trace], seen: dict[tuple[str, str], Seen], replays: int
) -> Callable[[int, int, str], None]:
    """Called before every point of a calibration: replays ``replays`` times in all, evenly spread."""
    done = 0

    def progress(point: int, points: int, name: str) -> None:
        nonlocal done
        if done < replays and point >= (done + 0.5) * points / replays:
            # Which loop comes first alternates: the first one may find the machine in another state.
            for load, trace in traces.items():
                for loop in LOOPS if done % 2 else reversed(LOOPS):
                    seen[load, loop].add(replay_loop(settings, loop, trace, device="cpu", load_format="auto", **SAID))
            done += 1

    return progress


def _compare(number: int, load: str, settings: RunSettings, trace: Trace, seen: dict[tuple[str, str], Seen]) -> None:
    rates = {}
    kind = settings.cost.partition(":")[0]
    for loop in LOOPS:
        real, made = seen[load, loop], summarise(simulate_loop(settings, loop, trace, **SAID))
        rates[loop] = made["output_throughput"], float(np.mean(real.throughputs))
        throughput, e2e = rates[loop][0] / rates[loop][1], made["e2e_mean_s"] / float(np.mean(real.e2es_s))
        print(
            f"{number:<5} {kind:8} {load:12} {loop:8} {throughput:<20.3f} {e2e:<18.3f} "
            f"{rates[loop][1]:.0f} ({min(real.throughputs):.0f}, {max(real.throughputs):.0f})",
            flush=True,
        )
    gains = [rates["overlap"][i] / rates["normal"][i] - 1 for i in (0, 1)]
    print(
        f"{number:<5} {kind:8} {load:12} gain of overlap: simulated {gains[0]:+.1%}, real {gains[1]:+.1%}", flush=True
    )


def _write_trace(path: Path, apart_s: float) -> Path:
    draw = random.Random(1)
    path.write_text(
        "".join(
            json.dumps(
                {
                    "request_id": f"r{i}",
                    "arrival_s": i * apart_s,
                    "input_length": draw.randint(20, 120),
                    "output_length": draw.randint(10, 40),
                }
            )
            + "\n"
            for i in range(40)
        )
    )
    return path


if __name__ == "__main__":
    main()
