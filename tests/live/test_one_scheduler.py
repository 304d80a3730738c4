"""There is one scheduler: what does not depend on time is decided alike in simulation and on a real model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from traces import open_trace
from workbench.cluster.replay import replay_loop
from workbench.cluster.simulate import simulate_loop
from workbench.settings.run_settings import RunSettings


@pytest.fixture(scope="module")
def trace(tmp_path_factory: Any) -> Path:
    """Thirty requests at time zero; some share the first half of their prompt."""
    path = tmp_path_factory.mktemp("trace") / "burst.jsonl"
    draw = random.Random(1)
    with path.open("w") as file:
        for i in range(30):
            line: dict[str, Any] = {
                "request_id": f"r{i}",
                "arrival_s": 0.0,
                "output_length": draw.randint(60, 92),
                "input_length": draw.randint(5, 90),
                "priority": i % 3,
            }
            if i % 3 == 0:
                line |= {"input_length": 80, "hash_ids": [1, 2, 3, 100 + i, 200 + i], "block_size": 16}
            file.write(json.dumps(line) + "\n")
    return path


SETTINGS: dict[str, dict[str, Any]] = {
    "prefill-first": {},
    "lengths known": {"ignore_eos": True},
    "mixed": {"batching": "mixed", "max_batch_tokens": 40},
    "pages of 8, mixed chunk": {"page_size": 8, "mixed_chunk": True},
    "mixed in the order of admission": {
        "batching": "mixed",
        "max_batch_tokens": 40,
        "mixed_order": "admission",
        "cache": "blocks",
        "page_size": 8,
        "give_back": "ended",
        "share_in_batch_tokens": None,
    },
    "priorities that preempt": {"policy": "priority", "preempt_threshold": 1},
}


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.slow
def test_simulation_and_a_real_model_make_the_same_decisions(
    model: Path, trace: Path, tmp_path: Path, loop: str, name: str
) -> None:
    common = {
        "loop": loop,
        "kv_tokens": 480,
        "max_context": 200,
        "chunk": 48,
        "max_running": 16,
        "max_tokens": 92,
        "conservativeness": 0.02,
        "pp": 2 if loop == "pipeline" else 1,
        **SETTINGS[name],
    }
    if (loop, name) == ("pipeline", "lengths known"):
        common["micro_batches"] = 3  # one more than there are stages
    simulated = simulate_loop(
        RunSettings(model=str(model / "config.json"), **common),
        loop,
        open_trace(trace),
        trace_sha256="",
        command="",
        decisions=tmp_path / "simulated.jsonl",
    )
    real = replay_loop(
        RunSettings(model=str(model), dtype="fp32", **common),
        loop,
        open_trace(trace),
        device="cpu",
        load_format="auto",
        trace_sha256="",
        command="",
        decisions=tmp_path / "real.jsonl",
    )
    lines = (tmp_path / "real.jsonl").read_text()
    assert lines == (tmp_path / "simulated.jsonl").read_text()
    batches = [json.loads(line) for line in lines.splitlines()]
    assert any(batch["retracted"] for batch in batches), "nobody was retracted: the test shows less than it should"
    assert any(start > cached or end < 80 for b in batches for _, start, end, cached in b["prefill"]), "no chunks"
    assert any(cached for b in batches for *_, cached in b["prefill"]), "no prefix was found"
    for column in ("request_id", "output_tokens", "cached_tokens", "retractions", "status"):
        assert list(real.requests[column]) == list(simulated.requests[column]), column
