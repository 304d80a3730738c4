"""One simulated run: a trace under one loop, to a run record."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import simpy

from backends.simulated.backend import SimulatedBackend, SimulatedInbox
from backends.simulated.clock import Clock
from backends.simulated.cost.roofline import RooflineCost
from backends.simulated.host import HostModel
from backends.simulated.sampler import END_OF_SEQUENCE, ScriptedSampler
from reports.record import RunRecord
from traces import Trace, TraceRequest
from workbench.loops import LOOPS
from workbench.run.clients import Clients
from workbench.run.recorder import Recorder, RecordingOutbox
from workbench.run.router import Router
from workbench.run.settings import Instance, RunSettings, resolve
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import SamplingParams
from workbench.scheduler.scheduler import Scheduler

Progress = Callable[[float, int, int], None]
"""Called a few times a second with simulated seconds, requests ended, and iterations."""
PROGRESS_EVERY_S = 0.1


class SimulatedWorld:
    """The instances of a run, their clients and the recorder, in one SimPy environment."""

    def __init__(self, settings: RunSettings, instance: Instance, trace: Trace,
                 decisions: IO[str] | None = None) -> None:  # fmt: skip
        self.env = Clock()
        self.settings = settings
        self.instance = instance
        self._open: dict[str, TraceRequest] = {}
        self._instance_of: dict[str, tuple[int, int]] = {}
        self._router = Router(settings.router, settings.dp)
        self.recorder = Recorder(self.env.now_s)
        self._inboxes = [SimulatedInbox(self.env) for _ in range(settings.dp)]
        for number, inbox in enumerate(self._inboxes):
            self._start_instance(number, inbox, decisions)
        self._clients = Clients(self.env, trace, self._deliver, settings.concurrency)

    def run(self, progress: Progress | None = None) -> bool:
        """Simulate to the end of the trace. Returns False when interrupted from the keyboard."""
        step, clock = self.env.step, time.monotonic
        due = clock()
        # The collector has nothing to find in a run (no cycles are made) and would walk every request again and again.
        gc.disable()
        try:
            while True:
                for _ in range(200):
                    step()
                if progress is not None and clock() >= due:
                    progress(self.env.now, self.recorder.done, len(self.recorder.iterations))
                    due = clock() + PROGRESS_EVERY_S
                if self._clients.fault is not None:
                    raise self._clients.fault
        except simpy.core.EmptySchedule:
            if self._clients.fault is not None:
                raise self._clients.fault from None
            return True
        except KeyboardInterrupt:
            return False
        finally:
            gc.enable()

    def _start_instance(self, number: int, inbox: SimulatedInbox, decisions: IO[str] | None) -> None:
        settings, built = self.settings, self.instance
        config = built.scheduler
        cost = RooflineCost(
            built.model, built.gpu, dtype=settings.dtype, kv_dtype=settings.kv_dtype, tp=built.tp, pp=built.pp,
            ep=settings.ep, capture_sizes=built.capture_sizes,
        )  # fmt: skip
        host = HostModel(
            graph_max_batch=built.capture_sizes[-1] if built.capture_sizes else 0,
            layers=-(-built.model.layers // built.pp),
        )
        rows = config.max_running_per_slot * config.slots
        sampler = ScriptedSampler(self._script, rows)
        backend = SimulatedBackend(self.env, cost, host, sampler, self.recorder.iterations.append, number, built.pp)
        scheduler = Scheduler(config, eos_token_ids=(END_OF_SEQUENCE,), clock=backend.now_s)
        outbox = RecordingOutbox(self.recorder, rows, self._ended, decisions, number)
        options: dict[str, Any] = {}
        if built.loop == "overlap":
            options["overlap_prefills"] = settings.overlap_prefills
        self.env.run_loop(LOOPS[built.loop](scheduler, backend, inbox, outbox, **options))

    def _deliver(self, request: TraceRequest, arrival_s: float) -> None:
        settings = self.settings
        prompt = request.prompt_tokens(self.instance.model.vocab, settings.seed)
        number = self._router.choose(prompt, request.adapter or "")
        self._instance_of[request.request_id] = number, len(prompt)
        self._open[request.request_id] = request
        self.recorder.arrived(request, number, arrival_s, len(prompt))
        bound = request.max_tokens or settings.max_tokens
        if settings.ignore_eos:
            bound = min(bound, request.output_length) if request.max_tokens else request.output_length
        slo = request.slo_ttft_s if request.slo_ttft_s is not None else settings.slo_ttft
        params = SamplingParams(bound, settings.ignore_eos)
        namespace = request.adapter or ""
        message = Generate(request.request_id, prompt, params, arrival_s, request.priority, namespace, slo)
        self._inboxes[number].put(message)

    def _script(self, request_id: str) -> tuple[int, np.ndarray]:
        """What a request writes: the trace's output, ended by the model where the trace ends it."""
        request = self._open[request_id]
        tokens = request.output_tokens(self.instance.model.vocab, self.settings.seed)
        if not self.settings.ignore_eos:
            tokens = tokens.copy()
            tokens[-1] = END_OF_SEQUENCE
        return request.input_length, tokens

    def _ended(self, request_id: str) -> None:
        del self._open[request_id]
        number, prompt_tokens = self._instance_of.pop(request_id)
        if self.settings.dp > 1:
            self._router.ended(number, prompt_tokens)
        self._clients.ended(request_id)


def simulate_loop(settings: RunSettings, loop: str, trace: Trace, *, trace_sha256: str, command: str,
                  progress: Progress | None = None, decisions: Path | None = None) -> RunRecord:  # fmt: skip
    """Run a trace under one loop and return its record; ``meta['interrupted']`` tells whether it was stopped early.

    Raises ConfigError, CatalogueError, ModelDoesNotFit or TraceError.
    """
    instance = resolve(settings, loop)
    if decisions is None:
        world = SimulatedWorld(settings, instance, trace)
        finished = world.run(progress)
    else:
        with decisions.open("w", encoding="utf-8") as file:
            world = SimulatedWorld(settings, instance, trace, file)
            finished = world.run(progress)
    recorder = world.recorder
    if finished and recorder.by_id:
        raise AssertionError(f"{len(recorder.by_id)} requests never ended: {list(recorder.by_id)[:3]}")
    meta = {
        "name": loop,
        "command": command,
        "trace": {"name": trace.info.name, "format": trace.info.format, "sha256": trace_sha256,
                  "notes": list(trace.info.notes)},
        "model": instance.model.name,
        "hardware": {"gpu": instance.gpu.name, "gpus": instance.tp * instance.pp * settings.dp, "simulated": True},
        "settings": {
            **dataclasses.asdict(settings), "loop": loop, "tp": instance.tp, "pp": instance.pp,
            "kv_tokens": instance.scheduler.kv_tokens, "max_context": instance.scheduler.max_context,
        },
        "kv_budget": instance.kv_budget,
        "host_model": {f.name: getattr(HostModel(), f.name) for f in dataclasses.fields(HostModel) if f.init},
        "versions": {"workbench": importlib.metadata.version("llm-workbench"), "python": platform.python_version(),
                     "numpy": np.__version__, "simpy": simpy.__version__},
        "interrupted": not finished,
        "totals": {"requests": len(recorder.rows), "ended": recorder.done, "iterations": len(recorder.iterations),
                   "simulated_s": round(world.env.now, 9)},
    }  # fmt: skip
    return RunRecord(meta, recorder.request_columns(), recorder.iterations.columns(), recorder.inter_token_gaps(),
                     recorder.event_columns())  # fmt: skip
