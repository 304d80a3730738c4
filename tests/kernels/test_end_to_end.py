"""The scheduler, a loop and a small model on the Triton kernels: the tokens are those of the plain torch operators."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

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
