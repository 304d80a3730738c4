"""Time the phases of SGLang's own scheduler on a CPU, a decode step at so many running requests.

    MODEL=VENV/model PYTHONPATH=.:VENV/engine VENV/bin/python benchmarks/recordings/time_sglang.py [RUNNING ...]

VENV is an environment that record.py made for a version of SGLang. What is real is in record_sglang.py; beside that, results
are pickled as they are on their way to the detokenizer. The forward pass is no part of it: it costs nothing here, and what
the real worker does for it (staging tensors, attention's metadata, replaying the graph) is not in these numbers.

Prints, for each phase, the median CPU time of this thread over the steps of the middle half of a run, in microseconds, and
the straight line through them: so much a step and so much a running request.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
sys.argv = sys.argv[:1] + [word for word in sys.argv[1:] if word.isdigit()]

import numpy as np  # noqa: E402
import record_sglang  # noqa: E402
import sglang  # noqa: E402
import sglang_steps  # noqa: E402
import torch  # noqa: E402

from workbench.parity.scenarios import CASES, Case, Request  # noqa: E402

CASE = "timed"
STEPS = 400
PROMPT = 64
PHASES = {
    "receive": ("ingest_requests", "recv_requests"),
    "schedule": ("get_next_batch_to_run",),
    "launch": ("run_batch",),
    "process": ("process_batch_result",),
}
"""Methods of the loops by phase, as versions call them."""


class Clock:
    """CPU time of this thread by phase; what is within a phase and called ``outside`` is taken off."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._off = 0.0

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began, self._off = time.thread_time(), 0.0
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[phase].append(time.thread_time() - began - self._off)

        return run

    def outside(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._off += time.thread_time() - began

        return run


class PickledNowhere:
    """The socket to the detokenizer, of which the other end does nothing."""

    def send_output(self, output: Any, *_: Any) -> None:
        pickle.dumps(output, pickle.HIGHEST_PROTOCOL)

    send_pyobj = send_output


def requests(running: int) -> list[Request]:
    """As many requests as run, which come at once and write for the whole run."""
    return [Request(f"r{n:03}", 0, [2 + n % 400] * PROMPT, STEPS) for n in range(running)]


def measure(running: int) -> dict[str, float]:
    """Median seconds of each phase of a decode step."""
    torch.set_num_threads(1)
    blocks = running * (PROMPT + STEPS + 20) // 16 + 100
    CASES[CASE] = Case(blocks, 8192, running)
    sglang_steps.scenario = lambda case, seed: requests(running)
    engine, clock = record_sglang.engine, Clock()
    recorder = engine.Recorder(os.environ["MODEL"], CASE, 1, "overlap", 0, None, False)
    tokens = torch.ones(running, dtype=torch.int64)
    recorder.tp_worker.forward = clock.outside(lambda batch, slots: tokens[: len(batch.reqs)].clone())
    channels = getattr(recorder, "ipc_channels", recorder)
    channels.send_to_detokenizer = PickledNowhere()
    for holder in ("output_streamer", "stream_output", "batch_result_processor"):
        streamer = getattr(recorder, holder, None)
        if streamer is not None and hasattr(streamer, "send_to_detokenizer"):
            streamer.send_to_detokenizer = channels.send_to_detokenizer
    found = [(phase, name) for phase, names in PHASES.items() for name in names if hasattr(recorder, name)]
    for phase, name in found:
        setattr(recorder, name, clock.timed(phase, getattr(recorder, name)))
    made = recorder._tokenized

    def streamed(request: Request) -> Any:
        message = made(request)
        message.stream = True
        return message

    recorder._tokenized = streamed
    recorder.run()
    middle = slice(STEPS // 4, 3 * STEPS // 4)
    return {phase: statistics.median(spent[middle]) for phase, spent in clock.spent.items() if spent}


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [16, 64, 256]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # a process holds one scheduler
        rows = pool.map(measure, counts, chunksize=1)
    print(f"sglang {sglang.__version__}, us of one core a decode step")
    for phase in rows[0]:
        times = [row[phase] * 1e6 for row in rows]
        line = np.polyfit(counts, times, 1) if len(counts) > 1 else (0.0, times[0])
        each = ", ".join(f"{time_us:.0f} at {count}" for time_us, count in zip(times, counts, strict=True))
        print(f"{phase:9} {each}: {line[1]:.0f} a step and {line[0]:.2f} a running request")


if __name__ == "__main__":
    main()
