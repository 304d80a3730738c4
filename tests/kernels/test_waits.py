"""A step on the kernels reads nothing back and assigns no numbers through an index, whatever its requests ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from backends.torch.backend import make_backend
from backends.torch.rank import Rank
from backends.torch.workers import RunnerOptions
from benchmarks.gpu_checks import ASKED, _tokens
from tests.torch.tiny import make, prompts
from tests.torch.waits import NoWaits, WouldWait


@pytest.mark.slow
def test_no_step_would_make_the_host_wait_whatever_requests_ask_for(tmp_path: Path, monkeypatch: Any) -> None:
    make("Qwen3ForCausalLM", tmp_path, num_hidden_layers=1, head_dim=16)
    run = Rank.run

    def watched(*args: Any) -> Any:
        with NoWaits():
            return run(*args)

    monkeypatch.setattr(Rank, "run", watched)
    options = {"rows": 8, "kv_tokens": 400, "max_context": 64, "page_size": 4}
    backend = make_backend(RunnerOptions(str(tmp_path), ops="triton", dtype="float32", **options), lambda row: None)
    every = prompts(tuple(5 + i for i in range(len(ASKED))))
    tokens = _tokens(backend, "overlap", every, 4, ASKED)
    backend.close()
    assert [len(written) for written in tokens.values()] == [4] * len(ASKED)


@pytest.mark.parametrize(
    "step",
    [
        lambda x, at: x.__setitem__(at, 1.0),
        lambda x, at: x[0].__setitem__(at, float("-inf")),
        lambda x, at: x[x > 0],
        lambda x, at: x.sum().item(),
        lambda x, at: bool((x > 0).any()),
        lambda x, at: x.nonzero(),
    ],
)
def test_what_waits_is_noticed(step: Any) -> None:
    with NoWaits(), pytest.raises(WouldWait):
        step(torch.ones(3, 3), torch.tensor([0, 2]))
