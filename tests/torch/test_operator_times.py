"""Timing operators inside a step: everything that takes time has a name, and timing changes nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from backends.torch import operator_times
from backends.torch.one_process import CpuWorker
from backends.torch.operator_times import timed_steps
from backends.torch.workers import RunnerOptions
from tests.torch.tiny import VOCAB, make
from workbench.calibrate.operators import Shape, spread_ids, step_of

LAYERS = 3
EVERY_LAYER = ("matrix:qkv_proj", "matrix:o_proj", "rotary_emb")
ONCE = ("embedding", "final_layernorm", "lm_head", "sampler")
DENSE = {"matrix:gate_up_proj": LAYERS, "matrix:down_proj": LAYERS, "act_fn": LAYERS}
ALWAYS = {**dict.fromkeys(EVERY_LAYER, LAYERS), "layernorm": 2 * LAYERS, **dict.fromkeys(ONCE, 1)}


class Ticks:
    """A clock that is one second later whenever it is read: an operator takes as many seconds as it had calls."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 1
        return self.now_s


def worker(architecture: str, folder: Path, **changes: int) -> CpuWorker:
    make(architecture, folder, **changes)
    return CpuWorker(RunnerOptions(str(folder), rows=8, kv_tokens=400, page_size=4, dtype="float32"))


@pytest.mark.parametrize(
    ("architecture", "changes", "more"),
    [
        ("LlamaForCausalLM", {}, DENSE),
        ("Qwen3ForCausalLM", {"head_dim": 16}, DENSE),
        ("MixtralForCausalLM", {"num_local_experts": 4}, {"experts": LAYERS}),
    ],
)
def test_every_call_of_an_operator_is_timed_once_under_its_name(architecture, changes, more, tmp_path, monkeypatch):
    ranks = worker(architecture, tmp_path, **changes)
    monkeypatch.setattr(operator_times, "time", Ticks())
    with timed_steps(ranks.runner) as run:
        for shape in (Shape(decodes=3, context=9), Shape(6, 8), Shape(6, 0, 2, 9)):
            seconds = run(step_of(shape, 4, VOCAB), spread_ids(shape.decodes, VOCAB).astype(np.int64))
            kinds = bool(shape.prompt) + bool(shape.decodes)  # prompts and decodes attend in calls of their own
            step = seconds.pop("step")
            assert seconds == ALWAYS | more | {"attention": kinds * LAYERS}
            # Two readings a call and the last one: no call lies within another, which would count its time twice.
            assert step == 2 * sum(seconds.values()) + 1
    ranks.close()


def test_a_timed_step_samples_the_same_tokens_and_the_runner_is_as_before_afterwards(tmp_path):
    ranks = worker("LlamaForCausalLM", tmp_path)
    runner = ranks.runner
    batch = step_of(Shape(6, 0, 2, 9), 4, VOCAB)
    known = np.array([5, 6])
    attributes = [set(vars(module)) for module in (*runner.model.modules(), runner, runner.sampler)]
    before = runner.run(batch, known=known).tokens
    assert before is not None
    with pytest.raises(RuntimeError), timed_steps(runner) as run:
        run(batch, known)
        raise RuntimeError("a step that fails")
    timed = runner.last_token[torch.from_numpy(batch.rows)]
    np.testing.assert_array_equal(timed, before)
    assert [set(vars(module)) for module in (*runner.model.modules(), runner, runner.sampler)] == attributes
    assert all(getattr(module, "ops", runner.ops) is runner.ops for module in runner.model.modules())
    after = runner.run(batch, known=known).tokens
    np.testing.assert_array_equal(after, before)
    ranks.close()


class Gpu:
    """A device that is busy for as long as it is told, and a host that needs ``launch_s`` for a step's launches."""

    def __init__(self, launch_s: float) -> None:
        self.launch_s, self.busy_s, self.begins = launch_s, 0.0, 0

    def synchronize(self) -> None:
        self.begins += 1

    def _sleep(self, cycles: int) -> None:
        self.busy_s = cycles / operator_times.CYCLES_A_SECOND

    def Event(self, enable_timing: bool) -> Any:
        return SimpleNamespace(
            record=lambda: None,
            synchronize=lambda: None,
            query=lambda: self.busy_s < self.launch_s,
            elapsed_time=lambda other: 1000.0,
        )


@pytest.mark.parametrize(("launch_s", "begins"), [(0.001, 1), (0.03, 5), (1.9, 11), (2.1, None)])
def test_a_step_that_the_device_did_not_wait_long_enough_for_is_run_again(launch_s, begins, tmp_path, monkeypatch):
    ranks = worker("LlamaForCausalLM", tmp_path)
    gpu = Gpu(launch_s)
    monkeypatch.setattr(operator_times, "torch", SimpleNamespace(cuda=gpu))
    monkeypatch.setattr(operator_times, "HostWatch", lambda: operator_times.CudaWatch(layers=2))
    batch, known = step_of(Shape(decodes=2, context=9), 4, VOCAB), np.array([5, 6])
    with timed_steps(ranks.runner) as run:
        if begins is None:
            with pytest.raises(RuntimeError, match="launching a step takes more than the 2 s"):
                run(batch, known)
        else:
            assert run(batch, known)["attention"] == LAYERS
            assert gpu.begins == begins and gpu.busy_s >= launch_s
            run(batch, known)
            assert gpu.begins == begins + 1  # what was found to be enough stays
    ranks.close()
