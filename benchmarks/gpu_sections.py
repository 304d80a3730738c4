"""The sections of benchmarks/gpu.py: each a function of a :class:`Run`, called in a process of its own."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_run import Run

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ("torch", "triton", "transformers", "numpy", "pandas", "pyarrow", "safetensors", "pytest")
SHARES = (0.8, 0.5, 0.95)
"""Of the saturation rate, where predictions are compared; what there is no time for comes last."""


def kernels(run: Run) -> None:
    """Each kernel against what its bytes or operations allow."""
    from backends.torch.ops import triton
    from benchmarks.kernels import GROUPS, Bench

    bench = Bench(run.device, triton, small=run.device == "cpu" or run.quick, repetitions=run.repetitions)
    found: dict[str, Any] = {"limits": bench.limits()}
    copy, matrix = bench.copy, bench.matrix
    run.row(f"copy {copy / 1e12:.3f} TB/s, products {matrix / 1e12:.1f} TFLOP/s")
    for name, group in GROUPS.items():
        if not run.fits(name, 10):
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
        while len(found["graphs"]) < run.repetitions and run.fits("another capture of the CUDA graphs", 40):
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

    for repetition in range(run.repetitions):
        for loop in ("normal", "overlap"):
            if run.fits(f"{loop}, repetition {repetition + 1}", 8):
                measure(loop, loop)
    graphs_made, runner.graphs = runner.graphs, None
    for repetition in range(run.repetitions if graphs_made is not None else 0):
        if run.fits(f"overlap without graphs, repetition {repetition + 1}", 10):
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
    """The field's offline benchmark under both loops; the smaller shape first, so that something is there when time ends."""
    from backends.torch.backend import make_backend
    from benchmarks.offline import make_options, requests, run_once

    prompts, outputs = requests(3, 0.01) if run.quick else requests(256, 1.0)
    found: dict[str, Any] = {"requests": len(prompts), "tokens_in": sum(map(len, prompts)), "tokens_out": sum(outputs)}
    shapes = (("qwen3-0.6b", 20, 9, 2), ("qwen3-14b", 28, 32, 1))
    for shape, load_s, pass_s, repetitions in shapes:
        if not run.fits(shape, load_s + pass_s):
            continue
        # A first pass of the larger shape tells more than a second one of the smaller.
        kept_s = sum(shapes[1][1:3]) if shape == shapes[0][0] else 0
        mine: dict[str, Any] = {"normal": [], "overlap": []}
        found[shape] = mine
        folder = _model(run, shape)
        began = time.monotonic()
        backend = make_backend(make_options(folder, run.device, prompts, outputs), lambda row: None)
        mine["ready_s"], mine["kv_tokens"] = time.monotonic() - began, backend.kv_tokens
        for loop in ("normal", "overlap"):  # every shape of prefill, and some of the decodes, once
            run_once(backend, loop, prompts, [min(length, 4) for length in outputs])
        for repetition in range(repetitions):
            for loop in ("overlap", "normal"):
                if not run.fits(f"{shape}, {loop}, repetition {repetition + 1}", pass_s + kept_s * (repetition > 0)):
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
        run.write("end_to_end", found)


def peer(run: Run) -> None:
    """The same requests through transformers, once, at the smaller shape."""
    from benchmarks.offline import requests, transformers_repeatedly

    shape = "qwen3-0.6b"
    prompts, outputs = requests(3, 0.01) if run.quick else requests(256, 1.0)
    ((seconds, tokens, how),) = transformers_repeatedly(_model(run, shape), run.device, prompts, outputs, 1)
    speed = tokens / seconds
    run.write("peer", {shape: {"tokens_per_s": speed, "how": how}})
    mine = run.read("end_to_end", {}).get(shape, {}).get("overlap")
    ours = f"; overlap is {statistics.median(mine) / speed:.2f} times that" if mine else ""
    run.row(f"{shape} transformers, {how}: {speed:,.0f} output tokens/s{ours}")


def calibration(run: Run) -> None:
    """What a prediction needs to know of this device and the smaller model."""
    from benchmarks.gpu_calibrate import calibrate

    calibrate(run, _model(run, "qwen3-0.6b"), device_name(run.device), Log())


def weights_in_fp8(run: Run) -> None:
    """Quality and speed with weights in FP8."""
    from benchmarks.fp8 import fp8

    fp8(run, _model, _forget, run.repetitions)


def prediction(run: Run) -> None:
    """The profile, a simulation of the replays at 80 % of saturation and how far off it is: docs/runner.md's commands."""
    lacking = [name for name in ("simpy", "msgspec") if importlib.util.find_spec(name) is None]
    if lacking:
        run.skip("prediction", f"no {' and no '.join(lacking)} here; docs/runner.md has the commands for elsewhere")
        return
    profile, fidelity = run.out / "prediction" / "profile", run.out / "fidelity"
    shutil.rmtree(profile.parent, ignore_errors=True)
    profile.parent.mkdir()
    commands: list[list[object]] = [["calibrate", "--from", run.out / "calibration.points", "--out", profile]]
    for loop in ("normal", "overlap"):
        like, out = fidelity / f"80-{loop}-1", profile.parent / loop
        trace = fidelity / "trace-80.jsonl"
        commands.append(["simulate", trace, "--like", like, "--cost", f"profile:{profile}", "--out", out])
        commands.append(["compare", like, out / loop])
    for command in commands:
        words = [sys.executable, "-c", "from workbench.cli.main import main; main()", *map(str, command)]
        wide = {**os.environ, "COLUMNS": "160"}
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=wide)
        if done.returncode:
            run.check(f"prediction: {command[0]}", False, (done.stderr.strip().splitlines() or ["no word"])[-1])
            return
        if command[0] == "compare":
            for line in done.stdout.splitlines():
                run.row(line)


def fidelity(run: Run) -> None:
    """Replay Poisson traces at shares of saturation, each loop; leave the records and the traces."""
    from backends.torch.backend import make_backend
    from benchmarks.offline import make_options, requests
    from benchmarks.open_loop import Arrival, poisson, replay, summary, write_run, write_trace

    count, scale, window_s = (5, 0.01, 0.05) if run.quick else (400, 0.5, 8.0)
    prompts, outputs = requests(count, scale)
    log = Log()
    backend = make_backend(make_options(_model(run, "qwen3-0.6b"), run.device, prompts, outputs), log)
    burst = [Arrival(f"r{i}", 0.0, prompt, new) for i, (prompt, new) in enumerate(zip(prompts, outputs, strict=True))]
    replay(backend, "overlap", burst[: max(count // 8, 2)], max_running=256)  # compiles and warms up
    folder = run.out / "fidelity"
    folder.mkdir(exist_ok=True)
    log.fresh()
    ended = replay(backend, "overlap", burst, max_running=256).finish_times()
    # The middle half: neither the first prompts nor the last stragglers.
    low, high = len(ended) // 4, max(3 * len(ended) // 4, len(ended) // 4 + 1)
    saturation = (high - low) / (ended[high] - ended[low] or 1e-9)
    found: dict[str, Any] = {"saturation_requests_per_s": saturation, "runs": []}
    run.row(f"saturation: {saturation:.1f} requests/s")
    write_trace(burst, folder / "trace-burst.jsonl")
    traces = {}
    for share in SHARES:
        arrivals = traces[share] = poisson(
            prompts, outputs, share * saturation, window_s, most=5 if run.quick else None
        )
        write_trace(arrivals, folder / f"trace-{share * 100:.0f}.jsonl")
    for repetition in range(run.repetitions):
        for share, arrivals in traces.items():
            for loop in ("normal", "overlap"):
                name = f"{share * 100:.0f}-{loop}-{repetition + 1}"
                if not run.fits(name, 1.4 * window_s):
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


def device_name(device: str) -> str:
    """What a result says it was measured on."""
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else f"cpu {platform.machine()}"


def _version(name: str) -> str | None:
    """A package's version; None where it is not there. Some builds go by another name than their package."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(name), "__version__", "of unknown version"))


def versions(run: Run) -> None:
    """Device and versions behind every figure."""
    import torch

    facts: dict[str, Any] = {
        "device": device_name(run.device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
    }
    for name in NEEDS:
        # Not imported for this: on a machine that has just started that takes a while.
        facts[name] = _version(name)
        run.check(f"{name} is installed", facts[name] is not None)
    if run.device == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        if shutil.which("nvidia-smi"):
            asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
            told = subprocess.run(
                ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "-i", "0"],
                capture_output=True,
                text=True,
                check=False,
            )
            facts["nvidia_smi"] = dict(zip(asked.split(","), told.stdout.strip().split(", "), strict=False))
    run.write("environment", facts)
    run.row(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, Python {facts['python']}")
