"""Our front end, measured: a server of ours over a modelled GPU, known loads, and the CPU time that its processes take.

CPU time, because other work on the machine does not add to it; the latency beside it and the load that checks the fit are
by the clock on the wall, and what is printed says how busy the machine was.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import ProxyHandler, build_opener

from backends.simulated.front_end import FrontEndModel
from ground.errors import InputError
from reports.record.run_record import read_record
from traces import TraceRequest
from traces.given import trace_of
from workbench.calibrate.doubts import waiting_share
from workbench.calibrate.front_end_fit import (
    ProcessFit,
    Spent,
    fit_process,
    front_end_of,
    latency_beside,
    medians,
)
from workbench.calibrate.front_end_loads import AT_REST, Answered, Load, held_out, loads, mean, send
from workbench.cluster.pools import SimulatedPool, resolve_pools
from workbench.cluster.resolve import FrontEndOf
from workbench.cluster.simulate import simulate_loop
from workbench.settings.loading import settings_from

MODEL, GPU = "llama-3.1-8b", "l40s"
"""What the server models: a step takes 20 ms, so that neither it nor the client that measures is the bottleneck."""
ROUNDS = 5
"""Beside a first one, in which caches are filled."""
END_S = 120.0
Progress = Callable[[int, int, str], None]
"""Called with loads done, loads in all, and the one that is next."""
_CPU = re.compile(rb'^workbench:process_cpu_seconds_total\{.*process="(\w+)"\} (\S+)$', re.MULTILINE)
_STEPS = re.compile(rb"^workbench:iterations_total\{.*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Checked:
    """A load that nothing was fitted to: what its clients saw, and what is predicted, in seconds."""

    measured: dict[str, float]
    predicted: dict[str, float]
    without: dict[str, float]
    """Predicted without a front end."""


@dataclass(frozen=True)
class Found:
    """The front end, and how well it describes what was measured."""

    model: FrontEndModel
    http: ProcessFit
    detokenizer: ProcessFit
    held_out: Checked
    tokenizer: str
    busy: float
    """The median share of its time that a process waited for a core, for others used the machine."""

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON holds it."""
        return {
            "front_end": asdict(self.model),
            "processes": {"http": self.http.to_json(), "detokenizer": self.detokenizer.to_json()},
            "held_out": asdict(self.held_out),
            "tokenizer": self.tokenizer,
            "busy": self.busy,
        }


def measure_front_end(tokenizer: str | None, progress: Progress | None = None) -> Found:
    """Start a server, send every load several times, and fit. ``tokenizer`` is as ``serve --tokenizer`` takes it.

    Raises InputError for a server that does not start or does not answer.
    """
    tell = progress or (lambda done, total, name: None)
    each, check = [AT_REST, *loads()], held_out()
    total = (1 + ROUNDS) * len(each) + 1
    rounds: list[list[Spent]] = []
    at_rest: list[Answered] = []
    busy: list[float] = []
    with tempfile.TemporaryDirectory(prefix="workbench-") as folder:
        tell(0, total, "starting the server")
        with _serving(Path(folder), tokenizer) as (url, name):
            for number in range(1 + ROUNDS):
                spent = []
                for place, load in enumerate(each):
                    done = number * len(each) + place
                    tell(done, total, load.name)
                    took, answers = _under(url, load, done)
                    if load is not AT_REST:
                        spent.append(took)
                    elif number:
                        at_rest += answers
                if number:
                    rounds.append(spent)
                busy.append(waiting_share())
            tell(total - 1, total, check.name)
            checked = send(url, check, total)
        engine_s = _engine_ttft(Path(folder) / "record" / "overlap")
    middle = medians(rounds)
    http = fit_process(middle, lambda load: load.http_s)
    detokenizer = fit_process(middle, lambda load: load.detokenizer_s)
    latency_s = latency_beside([(one.ttft_s - engine_s[one.request_id], one.prompt_tokens) for one in at_rest], http)
    model = front_end_of(http, detokenizer, latency_s)
    return Found(model, http, detokenizer, compare(checked, model), name, median(busy))


def _under(url: str, load: Load, number: int) -> tuple[Spent, list[Answered]]:
    """Send one load, and see what it cost."""
    before, began_s = _counted(url), time.monotonic()
    answers = send(url, load, number) if load.asked else []
    time.sleep(load.rest_s)  # the processes' signs of life, which say what they took, come ten times a second
    after = _counted(url)
    while after["detokenizer"] == before["detokenizer"] and time.monotonic() - began_s < END_S:
        time.sleep(load.rest_s)  # on a machine so busy that none has come
        after = _counted(url)
    tokens = sum(one.prompt_tokens for one in answers)
    chunks = sum(one.tokens for one in answers)
    took = {name: after[name] - before[name] for name in before}
    wall_s = time.monotonic() - began_s
    spent = took["http"], took["detokenizer"]
    return Spent(load.name, len(answers), tokens, chunks, took["steps"], wall_s, *spent), answers


def _counted(url: str) -> dict[str, float]:
    """CPU time of the server's processes so far, and the engine's steps. Raises InputError."""
    try:
        with build_opener(ProxyHandler({})).open(f"{url}/metrics", timeout=END_S) as reply:
            page = reply.read()
    except OSError as error:
        raise InputError(f"{url}: the server no longer answers: {error}") from error
    found = {process.decode(): float(seconds) for process, seconds in _CPU.findall(page)}
    steps = _STEPS.search(page)
    if not {"http", "detokenizer"} <= found.keys() or steps is None:
        raise InputError(f"{url}: /metrics does not say what its processes took")
    return {**found, "steps": float(steps[1])}


@contextlib.contextmanager
def _serving(folder: Path, tokenizer: str | None) -> Iterator[tuple[str, str]]:
    """A server of ours with a record in ``folder``, which is written at the end: its address, and its tokenizer's name.

    Raises InputError with what it said where it does not start or does not end in order.
    """
    words = [sys.executable, "-c", "from workbench.cli.main import main; main()", "serve", MODEL]
    words += ["--backend", "simulated", "--gpu", GPU, "--port", "0"]
    words += ["--record", str(folder / "record"), "--no-record-content"]
    words += ["--tokenizer", tokenizer] if tokenizer is not None else []
    with (folder / "errors").open("w+") as errors:
        # Its own session: an interrupt from the keyboard is for the one that measures, which ends it.
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)

        def said() -> str:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if not line.startswith("note: ")]
            return lines[-1].removeprefix("error: ") if lines else f"it ended with exit code {server.returncode}"

        try:
            assert server.stdout is not None
            began = re.search(r"on (http://\S+) .*tokenizer: (.*)\)$", server.stdout.readline().rstrip("\n"))
            if began is None:
                server.wait()
                raise InputError(f"the server did not start: {said()}")
            yield began[1], began[2]
            server.send_signal(signal.SIGTERM)
            if server.wait(END_S):
                raise InputError(f"the server did not end in order: {said()}")
        finally:
            if server.poll() is None:
                server.terminate()  # twice: at once, its processes with it
                server.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(5.0)
                server.kill()
                server.wait()


def _engine_ttft(record: Path) -> dict[str, float]:
    """Seconds from when the scheduler had a request to its first token there, by id."""
    table = read_record(record).requests
    took = table["first_token_s"] - table["queued_s"]
    # Behind the name that its client gave a request stands the server's number.
    return {name.rpartition("-")[0]: each for name, each in zip(table["request_id"], took.tolist(), strict=True)}


def compare(answers: list[Answered], model: FrontEndModel) -> Checked:
    """What clients saw of a load, and what a simulation of the same requests gives with this front end, and without one."""
    settings = settings_from(None, {"model": MODEL, "gpu": GPU, "ignore_eos": True})
    pools = resolve_pools(settings, "overlap")
    ordered = sorted(answers, key=lambda one: one.sent_s)
    first_s = ordered[0].sent_s
    trace = trace_of([TraceRequest(o.request_id, o.sent_s - first_s, o.prompt_tokens, o.tokens) for o in ordered])

    def predicted(front_end: FrontEndOf | None) -> dict[str, float]:
        behind = [_behind(pool, front_end) for pool in pools]
        record = simulate_loop(settings, "overlap", trace, trace_sha256="", command="", pools=behind)
        table = record.requests
        first, last, tokens = (table[name] for name in ("first_token_s", "finish_s", "output_tokens"))
        gaps = (last - first)[tokens > 1] / (tokens - 1)[tokens > 1]
        return {"ttft_s": mean(first - table["arrival_s"]), "itl_s": mean(gaps)}

    measured = {"ttft_s": mean([o.ttft_s for o in ordered]), "itl_s": mean([o.itl_s for o in ordered])}
    return Checked(measured, predicted(FrontEndOf("measured", model)), predicted(None))


def _behind(pool: SimulatedPool, front_end: FrontEndOf | None) -> SimulatedPool:
    return replace(pool, recipe=replace(pool.recipe, front_end=front_end))
