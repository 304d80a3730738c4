"""Everything about a GPU in one command: what is right, how fast it is, and records to predict.

    python benchmarks/gpu.py --out runs/gpu                              # all sections, 540 s at most
    python benchmarks/gpu.py --out runs/gpu --only kernels,loops         # some
    python benchmarks/gpu.py --out runs/gpu --device cpu --quick         # the code itself, on a CPU

Needs torch, triton, transformers, numpy, pandas and safetensors, and no network. Checks before it times: kernels against
the reference on the same device, and the greedy tokens of a small random model against those of the reference operators on
the CPU, with and without CUDA graphs. A check that fails is named, and the exit status is 1; what can be timed is timed all
the same, for a GPU is lent and not owned. Each result is in a JSON file under ``--out`` as soon as it is there; what did
not fit into the time is named there too, under ``skipped``. Without a GPU the exit status is 2.

Sections: ``kernels`` against the copy bandwidth and the matrix rate of this device; ``loops``: what the CPU does in a
decode step, how long the GPU idles between two, and what CUDA graphs cost; ``end_to_end``: the field's offline benchmark
against transformers; ``calibration``: the points that ``workbench calibrate --from`` fits; ``fidelity``: Poisson arrivals at
shares of saturation, as run records (docs/run-record.md) with the trace beside them, so that the same can be simulated
elsewhere; ``fp8``: the offline benchmark with weights in FP8, and how near their logits come to the plain ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_run import Run

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("kernels", "loops", "end_to_end", "calibration", "fidelity", "fp8")
REPETITIONS = 3
SHARES = (0.5, 0.8, 0.95)
"""Of the saturation rate: where predictions are compared."""


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and every repetition."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


# -- sections ----------------------------------------------------------------------------------------------------------


def kernels(run: Run) -> None:
    """Each kernel against what its bytes or operations allow."""
    from backends.torch.ops import triton
    from benchmarks.kernels import GROUPS, Bench

    bench = Bench(run.device, triton, small=run.device == "cpu" or run.quick, repetitions=REPETITIONS)
    found: dict[str, Any] = {"limits": bench.limits()}
    copy, matrix = bench.copy, bench.matrix
    run.row(f"copy {copy / 1e12:.3f} TB/s, products {matrix / 1e12:.1f} TFLOP/s")
    for name, group in GROUPS.items():
        if not run.fits(f"kernels: {name}", 20):
            continue
        rows = found[name] = []
        for timed in group(bench):
            rows.append(timed.row())
            run.row(timed.line())
            run.write("kernels", found)
    run.write("kernels", found)


def _model(run: Run, shape: str) -> Path:
    from benchmarks.offline import write_shape

    return write_shape("tiny" if run.quick else shape, None, run.out / "models" / shape)


def _forget(run: Run) -> None:
    """Give the GPU's memory back before the next model."""
    gc.collect()
    if run.device == "cuda":
        import torch

        torch.cuda.empty_cache()


class Log:
    """Rows of iterations.csv, of the run that is going on."""

    def __init__(self) -> None:
        from reports.record.run_record import IterationLog

        self.table = IterationLog()

    def __call__(self, row: Any) -> None:
        self.table.append(row)

    def fresh(self) -> None:
        """Start a new run."""
        from reports.record.run_record import IterationLog

        self.table = IterationLog()


def decode_steps(columns: dict[str, Any]) -> dict[str, float]:
    """Of the decode steps at the largest batch that directly follow one another: CPU phases, step time, idle share."""
    import numpy as np

    mode, requests = columns["mode"], columns["requests"]
    full = (mode == 1) & (requests == requests[mode == 1].max())
    pairs = (full[1:] & full[:-1]).nonzero()[0]
    start, end = columns["start_s"], columns["end_s"]
    idle = np.maximum(start[pairs + 1] - end[pairs], 0)
    step = start[pairs + 1] - start[pairs]
    names = {"receive": "receive_s", "schedule": "schedule_s", "launch": "launch_host_s", "process": "process_s"}
    phases = {f"{name}_s": float(np.median(columns[column][full])) for name, column in names.items()}
    return {
        "running": int(requests[full].max()),
        "steps": len(pairs),
        "step_s": float(np.median(step)),
        "gpu_s": float(np.median((end - start)[full])),
        "idle_share": float(idle.sum() / step.sum()),
        "cpu_s": sum(phases.values()),
        **phases,
    }


def loops(run: Run) -> None:
    """CPU time of a decode step by phase, the GPU's idle share, and what CUDA graphs cost, at 256 running requests."""
    if not run.fits("loops", 60):
        return
    from backends.torch.backend import make_backend
    from benchmarks.offline import make_options, run_once

    count, prompt, new = (4, 5, 8) if run.quick else (256, 128, 200)
    prompts, outputs = [[7 + i % 100] * prompt for i in range(count)], [new] * count
    log = Log()
    backend = make_backend(make_options(_model(run, "qwen3-0.6b"), run.device, prompts, outputs), log)
    found: dict[str, Any] = {"normal": [], "overlap": [], "without_graphs": []}
    runner = backend.workers.runner  # type: ignore[attr-defined]
    if runner.graphs is not None:
        sizes = runner.graphs.sizes
        found["graphs"] = [(runner.graphs.seconds, runner.graphs.bytes)]
        while len(found["graphs"]) < REPETITIONS:
            runner.graphs = None  # two sets at a time would not measure one
            _forget(run)
            runner.capture(list(sizes))
            found["graphs"].append((runner.graphs.seconds, runner.graphs.bytes))
        seconds = [s for s, _ in found["graphs"]]
        run.row(
            f"CUDA graphs of {len(runner.graphs.sizes)} sizes: {statistics.median(seconds):.1f} s to capture, "
            f"{runner.graphs.bytes / 2**20:,.0f} MiB"
        )
    else:
        run.skip("cost of CUDA graphs", "there is no GPU")
    for loop in ("normal", "overlap"):  # compiles what full batches need
        run_once(backend, loop, prompts, [2] * count)

    def measure(loop: str, into: str) -> None:
        log.fresh()
        seconds, tokens = run_once(backend, loop, prompts, outputs)
        found[into].append(decode_steps(log.table.columns()) | {"tokens_per_s": tokens / seconds})
        run.write("loops", found)

    for repetition in range(REPETITIONS):
        for loop in ("normal", "overlap"):
            if run.fits(f"loops: {loop}, repetition {repetition + 1}", 8):
                measure(loop, loop)
    graphs_made, runner.graphs = runner.graphs, None
    for repetition in range(REPETITIONS if graphs_made is not None else 0):
        if run.fits(f"loops: overlap without graphs, repetition {repetition + 1}", 20):
            measure("overlap", "without_graphs")
    runner.graphs = graphs_made
    for name in ("normal", "overlap", "without_graphs"):
        if found[name]:

            def median(key: str, rows: list[dict[str, float]] = found[name]) -> float:
                return statistics.median(row[key] for row in rows)

            phases = ", ".join(
                f"{p} {median(f'{p}_s') * 1e6:.0f}" for p in ("receive", "schedule", "launch", "process")
            )
            run.row(
                f"{name}: a decode step of {found[name][0]['running']} takes {median('step_s') * 1e3:.2f} ms, the GPU "
                f"idles {median('idle_share'):.1%}; CPU {median('cpu_s') * 1e6:.0f} us ({phases})"
            )
    run.write("loops", found)
    backend.close()


def end_to_end(run: Run) -> None:
    """The field's offline benchmark, normal and overlap, and transformers' continuous batching on the same model."""
    from backends.torch.backend import make_backend
    from benchmarks.offline import make_options, requests, run_once

    prompts, outputs = requests(3, 0.01) if run.quick else requests(256, 1.0)
    found: dict[str, Any] = {"requests": len(prompts), "tokens_in": sum(map(len, prompts)), "tokens_out": sum(outputs)}
    for shape, load_s, pass_s in (("qwen3-0.6b", 40, 10), ("qwen3-14b", 60, 30)):
        if not run.fits(f"end to end: {shape}", load_s + 2 * pass_s):
            continue
        mine: dict[str, Any] = {"normal": [], "overlap": []}
        found[shape] = mine
        folder = _model(run, shape)
        began = time.monotonic()
        backend = make_backend(make_options(folder, run.device, prompts, outputs), lambda row: None)
        mine["ready_s"], mine["kv_tokens"] = time.monotonic() - began, backend.kv_tokens
        for loop in ("normal", "overlap"):  # every shape of prefill, and some of the decodes, once
            run_once(backend, loop, prompts, [min(length, 4) for length in outputs])
        for repetition in range(REPETITIONS):
            for loop in ("overlap", "normal"):
                if not run.fits(f"end to end: {shape}, {loop}, repetition {repetition + 1}", pass_s):
                    continue
                began = time.monotonic()
                seconds, tokens = run_once(backend, loop, prompts, outputs)
                pass_s = max(time.monotonic() - began, 1.0)
                mine[loop].append(tokens / seconds)
                run.write("end_to_end", found)
        backend.close()
        del backend
        _forget(run)
        for loop in ("normal", "overlap"):
            if mine[loop]:
                run.row(
                    f"{shape} {loop}: {statistics.median(mine[loop]):,.0f} output tokens/s "
                    f"({min(mine[loop]):,.0f} to {max(mine[loop]):,.0f}, {len(mine[loop])} times)"
                )
        mine["transformers"] = _peer(run, shape, folder, mine)
        run.write("end_to_end", found)


def _peer(run: Run, shape: str, folder: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """transformers in a process of its own, which can be ended when the time is up."""
    if not run.fits(f"end to end: {shape}, transformers", 60):
        return None
    result = run.out / f"peer-{shape}.json"
    result.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--out",
        str(run.out),
        "--peer",
        str(folder),
        str(result),
        "--device",
        run.device,
        *(["--quick"] if run.quick else []),
    ]
    log = run.out / f"peer-{shape}.log"
    with log.open("w") as file:
        try:
            subprocess.run(
                command, stdout=file, stderr=file, timeout=None if run.quick else max(run.left(), 1), check=False
            )
        except subprocess.TimeoutExpired:
            run.skip(f"end to end: {shape}, transformers (further repetitions)", "the time was up")
    if not result.exists():
        run.skip(f"end to end: {shape}, transformers", f"no result; see {log.name}")
        return None
    found = json.loads(result.read_text())
    speed = statistics.median(found["tokens_per_s"])
    ours = f"; overlap is {statistics.median(mine['overlap']) / speed:.2f} times that" if mine["overlap"] else ""
    run.row(f"{shape} transformers, {found['how']}: {speed:,.0f} output tokens/s{ours}")
    return found


def peer(folder: Path, result: Path, device: str, quick: bool) -> None:
    """What the process of :func:`_peer` does: writes after every repetition."""
    from benchmarks.offline import requests, transformers_repeatedly

    prompts, outputs = requests(3, 0.01) if quick else requests(256, 1.0)
    speeds: list[float] = []
    for seconds, tokens, how in transformers_repeatedly(folder, device, prompts, outputs, REPETITIONS):
        speeds.append(tokens / seconds)
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps({"tokens_per_s": speeds, "how": how}))
        partial.replace(result)


def calibration(run: Run) -> None:
    """What a prediction needs to know of this device and the smaller model."""
    if run.fits("calibration", 60):
        from benchmarks.gpu_calibrate import calibrate

        calibrate(run, _model(run, "qwen3-0.6b"), device_name(run.device), Log())


def fidelity(run: Run) -> None:
    """Replay Poisson traces at shares of saturation, each loop; leave the records and the traces."""
    if not run.fits("fidelity", 100):
        return
    from backends.torch.backend import make_backend
    from benchmarks.offline import make_options, requests
    from benchmarks.open_loop import Arrival, poisson, replay, summary, write_run, write_trace

    count, scale, window_s = (5, 0.01, 0.05) if run.quick else (600, 0.5, 15.0)
    prompts, outputs = requests(count, scale)
    log = Log()
    backend = make_backend(make_options(_model(run, "qwen3-0.6b"), run.device, prompts, outputs), log)
    burst = [Arrival(f"r{i}", 0.0, prompt, new) for i, (prompt, new) in enumerate(zip(prompts, outputs, strict=True))]
    replay(backend, "overlap", burst[: max(count // 8, 2)], max_running=256)  # compiles and warms up
    folder = run.out / "fidelity"
    folder.mkdir(exist_ok=True)
    rates = []
    for _ in range(REPETITIONS):
        if rates and not run.fits("fidelity: saturation, repetition", 20):
            break
        log.fresh()
        ended = replay(backend, "overlap", burst, max_running=256).finish_times()
        # The middle half: neither the first prompts nor the last stragglers.
        low, high = len(ended) // 4, max(3 * len(ended) // 4, len(ended) // 4 + 1)
        rates.append((high - low) / (ended[high] - ended[low] or 1e-9))
    saturation = statistics.median(rates)
    found: dict[str, Any] = {"saturation_requests_per_s": spread(rates), "runs": []}
    run.row(f"saturation: {saturation:.1f} requests/s ({min(rates):.1f} to {max(rates):.1f})")
    write_trace(burst, folder / "trace-burst.jsonl")
    traces = {}
    for share in SHARES:
        arrivals = traces[share] = poisson(
            prompts, outputs, share * saturation, window_s, most=5 if run.quick else None
        )
        write_trace(arrivals, folder / f"trace-{share * 100:.0f}.jsonl")
    for repetition in range(REPETITIONS):
        for share, arrivals in traces.items():
            for loop in ("normal", "overlap"):
                name = f"{share * 100:.0f}-{loop}-{repetition + 1}"
                if not run.fits(f"fidelity: {name}", 1.6 * window_s):
                    continue
                log.fresh()
                done = replay(backend, loop, arrivals, max_running=256)
                write_run(
                    folder / name,
                    done,
                    log.table,
                    backend,
                    run_name=loop,
                    trace=f"trace-{share * 100:.0f}",
                    model="Qwen/Qwen3-0.6B",
                    hardware=device_name(run.device),
                )
                found["runs"].append({"share": share, "loop": loop, "repetition": repetition + 1, **summary(done)})
                run.write("fidelity", found)
    for share in SHARES:
        for loop in ("normal", "overlap"):
            rows = [r for r in found["runs"] if r["share"] == share and r["loop"] == loop]
            if rows:
                run.row(
                    f"{share:.0%} {loop}: "
                    + ", ".join(
                        f"{key} {statistics.median(r[key] for r in rows):.4g}"
                        for key in ("tokens_per_s", "ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "e2e_mean_s")
                    )
                )
    run.write("fidelity", found)
    backend.close()


# -- the command -------------------------------------------------------------------------------------------------------


def weights_in_fp8(run: Run) -> None:
    """Quality and speed with weights in FP8. Last: what it costs must not cost the others their time."""
    from benchmarks.fp8 import fp8

    fp8(run, _model, _forget, REPETITIONS)


def device_name(device: str) -> str:
    """What a result says it was measured on."""
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else f"cpu {platform.machine()}"


def environment(device: str) -> dict[str, Any]:
    """Device, versions and command of every figure."""
    import numpy
    import torch
    import transformers
    import triton

    facts: dict[str, Any] = {
        "device": device_name(device),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "cpus": os.cpu_count(),
    }
    if device == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return facts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and measure everything that needs a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script, measures nothing")
    parser.add_argument("--peer", nargs=2, type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    chosen = [name for name in given.only.split(",") if name]
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is not one of {', '.join(SECTIONS)}")
    if given.device == "cpu":
        if not given.quick:
            parser.error("--device cpu: only with --quick; a CPU tests the script and measures nothing")
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    sys.path.insert(0, str(ROOT))
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU; --device cpu --quick runs the script without one", file=sys.stderr)
        return 2
    if given.peer is not None:
        peer(*given.peer, given.device, given.quick)
        return 0
    from benchmarks.gpu_run import Run

    run = Run(given.out, given.device, given.quick, given.budget_s)
    run.write("environment", environment(given.device))
    from benchmarks.gpu_checks import check_kernels, check_tokens

    steps: dict[str, Callable[[Run], None]] = {"check kernels": check_kernels, "check tokens": check_tokens}
    sections = dict(zip(SECTIONS, (kernels, loops, end_to_end, calibration, fidelity, weights_in_fp8), strict=True))
    steps |= {name: section for name, section in sections.items() if name in chosen}
    timing: dict[str, float] = {}
    for name, step in steps.items():
        began = time.monotonic()
        run.say(f"-- {name} ({max(run.left(), 0):.0f} s left)")
        try:
            step(run)
        except Exception as error:
            # One section's fault must not cost the others their time on the device.
            traceback.print_exc()
            run.check(name, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        _forget(run)
        timing[name] = time.monotonic() - began
        run.write("timing", timing)
    for name in SECTIONS:
        if name not in chosen:
            run.skipped.append({"what": name, "why": "not in --only"})
    run.write("skipped", run.skipped)
    run.write("failed", run.failed)
    print(f"\n== {device_name(given.device)}, {sum(timing.values()):.0f} s, results in {given.out}")
    for line in run.table:
        print(line)
    for entry in run.skipped:
        print(f"skipped: {entry['what']}: {entry['why']}")
    for failure in run.failed:
        print(f"FAILED: {failure}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
