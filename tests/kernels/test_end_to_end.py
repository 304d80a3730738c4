"""The scheduler, a loop and a small model on the Triton kernels: the tokens are those of the plain torch operators."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from backends.torch.cuda_graphs import DecodeGraphs
from tests.torch.live import backend_of, greedy, messages, serve
from tests.torch.tiny import make, prompts
from workbench.scheduler.request import SamplingParams


@pytest.mark.parametrize(
    "architecture, changes", [("Qwen3ForCausalLM", {"head_dim": 16}), ("MixtralForCausalLM", {"num_local_experts": 4})]
)
@pytest.mark.slow
def test_kernels_write_what_the_reference_writes(architecture: str, changes: dict, tmp_path: Path) -> None:
    make(architecture, tmp_path, num_hidden_layers=2, **changes)
    params = [greedy(4), SamplingParams(4, ignore_eos=True, temperature=0.8, top_p=0.9, top_k=50, seed=3), greedy(4)]
    outputs = []
    for ops in ("reference", "triton"):
        backend = backend_of(str(tmp_path), ops=ops, page_size=4)
        groups = [[message] for message in messages(prompts((21, 5, 9)), params)]
        run = serve(backend, groups, "overlap", max_running=8, page_size=4, chunk=16)
        backend.close()
        outputs.append(run.outputs)
    assert outputs[0] == outputs[1]
    assert all(len(tokens) == 4 for tokens in outputs[0].values())


class EagerGraphs(DecodeGraphs):
    """Decode steps padded as for a captured one, computed anew in every replay."""

    def _capture(self, size: int, pool: Any, stream: Any) -> Any:
        return SimpleNamespace(replay=lambda: self._run(size))


@pytest.mark.parametrize(
    "architecture, changes, page_size",
    [
        ("Qwen3ForCausalLM", {"head_dim": 16}, 8),
        ("MistralForCausalLM", {"sliding_window": 6}, 1),
    ],
)
@pytest.mark.slow
def test_what_a_slot_held_before_it_was_written_reaches_no_token_nor_does_what_pads_a_batch(
    architecture: str, changes: dict, page_size: int, tmp_path: Path, monkeypatch: Any
) -> None:
    make(architecture, tmp_path, num_hidden_layers=1, **changes)
    outputs = []
    for ops in ("reference", "triton"):
        backend = backend_of(str(tmp_path), ops=ops, page_size=page_size, dtype="float32")
        runner = backend.workers.runner  # type: ignore[attr-defined]
        if ops == "triton":
            graphs = runner._decode_step, runner.rows, runner.config.vocab, torch.float32, runner.device, [1, 4]
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
                for name in ("Stream", "synchronize", "graph_pool_handle", "empty_cache"):
                    patch.setattr(torch.cuda, name, lambda *device: None)
                runner.graphs = EagerGraphs(*graphs)
            for pool in (*runner.kv.keys, *runner.kv.values):
                pool.fill_(float("nan"))
        # The second time pages are those of requests that have ended.
        groups = [[message] for message in messages(prompts((11, 5, 3)), greedy(3))]
        for _ in range(1 if ops == "reference" else 2):
            run = serve(backend, groups, "overlap", max_running=8, page_size=page_size, chunk=8)
            outputs.append(run.outputs)
        backend.close()
    assert outputs[1] == outputs[0] == outputs[2]
    assert all(len(tokens) == 3 for tokens in outputs[0].values())
