"""Times of operators inside a step: a runner whose operators are timed one by one.

On a CPU an operator lasts from its call to its return. On CUDA two events stand around it (not yet run on a GPU): the
device is kept busy until the whole step is launched, so that the events measure kernels and not how fast they were launched.
A step for which it was not busy long enough does not count, and is run again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from backends.torch.layers import MLP
from backends.torch.models.decoder import DecoderLayer
from backends.torch.runner import ModelRunner
from workbench.scheduler.batch import ModelWorkerBatch

LAUNCH_LAYER_S = 5e-4
"""About what a host takes to launch a layer with an event on both sides of every operator."""
MOST_BUSY_S = 2.0
"""How long the device is kept busy at most."""
CYCLES_A_SECOND = 2e9
"""At least as many as a GPU's clock makes."""
FUNCTIONS = {
    "attention_inputs": "rotary_emb",
    "silu_and_mul": "act_fn",
    "moe": "experts",
    "prefill_attention": "attention",
    "decode_attention": "attention",
}
"""Functions of an operator set, and what they are called in a profile."""


class Watch(Protocol):
    """Times calls by name."""

    def begin(self) -> None:
        """A step begins."""

    def call(self, name: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call and time."""

    def end(self) -> dict[str, float] | None:
        """The step has been launched: its seconds by name, and those of all of it as ``step``. None: they are not those of
        the device, and the step has to be run again."""


class HostWatch:
    """Clock of a device that computes while it is called."""

    def begin(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._began_s = time.perf_counter()

    def call(self, name: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        began_s = time.perf_counter()
        result = function(*args, **named)
        self._seconds[name] += time.perf_counter() - began_s
        return result

    def end(self) -> dict[str, float]:
        return {**self._seconds, "step": time.perf_counter() - self._began_s}


class CudaWatch:
    """Events around every call, in steps of so many ``layers``."""

    def __init__(self, layers: int) -> None:
        self._busy_s = LAUNCH_LAYER_S * (layers + 2)

    def begin(self) -> None:
        torch.cuda.synchronize()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        torch.cuda._sleep(int(self._busy_s * CYCLES_A_SECOND))
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def call(self, name: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = function(*args, **named)
        end.record()
        self._events.append((name, start, end))
        return result

    def end(self) -> dict[str, float] | None:
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        late = self._began.query()  # the device had nothing to do while something was still to be launched
        ended.synchronize()
        if late:
            if self._busy_s >= MOST_BUSY_S:
                raise RuntimeError(
                    f"operators: launching a step takes more than the {MOST_BUSY_S:g} s the GPU waits for it"
                )
            self._busy_s = min(2 * self._busy_s, MOST_BUSY_S)
            return None
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self._events:
            seconds[name] += start.elapsed_time(end) / 1e3
        return {**seconds, "step": self._began.elapsed_time(ended) / 1e3}


@contextmanager
def timed_steps(runner: ModelRunner) -> Iterator[Callable[[ModelWorkerBatch, np.ndarray], dict[str, float]]]:
    """A function that runs a batch, whose decodes continue the tokens it is given (int64[decodes]). It returns the seconds
    of each operator, summed over its calls, and of the whole as ``step``.

    Captured graphs are left aside: they run as one. The runner is as before afterwards.
    """
    watch: Watch = CudaWatch(len(runner.model.layers)) if runner.device.type == "cuda" else HostWatch()
    before: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, attribute: str, new: Any) -> None:
        before.append((owner, attribute, vars(owner).get(attribute, _ABSENT)))
        setattr(owner, attribute, new)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: watch.call(name, function, *args, **named)

    def run(batch: ModelWorkerBatch, known: np.ndarray) -> dict[str, float]:
        while True:
            watch.begin()
            runner.run(batch, known=known)
            if (seconds := watch.end()) is not None:
                return seconds

    try:
        for name, owner, attribute in _methods(runner):
            replace(owner, attribute, watched(name, getattr(owner, attribute)))
        ops = _with_functions(runner.ops, watched)
        for module in runner.model.modules():
            if getattr(module, "ops", None) is runner.ops:
                replace(module, "ops", ops)
        replace(runner, "graphs", None)
        yield run
    finally:
        for owner, attribute, value in reversed(before):
            if value is _ABSENT:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, value)


_ABSENT = object()


def _methods(runner: ModelRunner) -> Iterator[tuple[str, Any, str]]:
    """(name in a profile, object, its method) of everything timed that is no function of an operator set."""
    model = runner.model
    if model.embedding is not None:
        yield "embedding", model.embedding, "embed"
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.attention
        yield "matrix:qkv_proj", attention.qkv.weight, "forward"
        yield "matrix:o_proj", attention.out.weight, "forward"
        for norm in (layer.input_norm, layer.post_attention_norm):
            yield from _norm("layernorm", norm)
        if isinstance(layer.mlp, MLP):
            yield "matrix:gate_up_proj", layer.mlp.gate_up.weight, "forward"
            yield "matrix:down_proj", layer.mlp.down.weight, "forward"
    if model.parallel.last_stage:
        yield from _norm("final_layernorm", model.norm)
        assert model.head is not None
        yield "lm_head", model.head, "logits"
    yield "sampler", runner.sampler, "sample"


def _norm(name: str, norm: nn.Module) -> Iterator[tuple[str, Any, str]]:
    yield name, norm, "forward"
    yield name, norm, "add"


def _with_functions(ops: ModuleType, watched: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Any:
    """The operator set with :data:`FUNCTIONS` timed."""
    return SimpleNamespace(
        **{name: watched(FUNCTIONS[name], value) if name in FUNCTIONS else value for name, value in vars(ops).items()}
    )
