"""Timing operators inside a step: everything that takes time has a name, and timing changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from backends.torch.operator_times import timed_steps
from backends.torch.workers import CpuWorker, RunnerOptions
from tests.torch.tiny import VOCAB, make
from workbench.run.operators import Shape, spread_ids, step_of

DENSE = {"matrix:gate_up_proj", "matrix:down_proj", "act_fn"}
ALWAYS = {"embedding", "matrix:qkv_proj", "matrix:o_proj", "layernorm", "rotary_emb", "kv_store", "attention",
          "final_layernorm", "lm_head", "sampler", "step"}  # fmt: skip


def worker(architecture: str, folder: Path, **changes: int) -> CpuWorker:
    make(architecture, folder, **changes)
    return CpuWorker(RunnerOptions(str(folder), rows=8, kv_tokens=400, page_size=4, dtype="float32"))


@pytest.mark.parametrize(
    ("architecture", "changes", "names"),
    [
        ("LlamaForCausalLM", {}, ALWAYS | DENSE),
        ("Qwen3ForCausalLM", {"head_dim": 16}, ALWAYS | DENSE | {"qk_norm"}),
        ("MixtralForCausalLM", {"num_local_experts": 4}, ALWAYS | {"experts"}),
    ],
)
def test_every_operator_of_a_step_is_timed_under_its_name(architecture, changes, names, tmp_path):
    ranks = worker(architecture, tmp_path, **changes)
    with timed_steps(ranks.runner) as run:
        for shape in (Shape(decodes=3, context=9), Shape(6, 8), Shape(6, 0, 2, 9)):
            seconds = run(step_of(shape, 4, VOCAB), spread_ids(shape.decodes, VOCAB).astype(np.int64))
            assert set(seconds) == names
            step = seconds.pop("step")
            assert all(value > 0 for value in seconds.values())
            # The rest is what lies between: the larger part of a step is in its operators even in a model of this size.
            assert 0.3 * step < sum(seconds.values()) <= step
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
