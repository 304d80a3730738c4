"""What a GPU waits between steps whatever overlaps: fixed, per request, per GPU of the group, per layer of a kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import workbench
from backends.simulated.host import GAPS
from tests.cost.profiles import batch, linear_profile
from traces import TraceRequest
from workbench.cluster.resolve import resolve
from workbench.settings import engines
from workbench.settings.engines import load_engine
from workbench.settings.loading import settings_from


@pytest.fixture
def gaps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the host of a preset these gaps, and no others."""

    def given(engine: str, **numbers: float) -> None:
        presets = {**engines._presets()}
        host = {**presets[engine].get("host", {}), **dict.fromkeys(GAPS, 0.0), **numbers}
        presets[engine] = {**presets[engine], "host": host}
        monkeypatch.setattr(engines, "_presets", lambda: presets)

    return given


def cost(engine: str, **flags: object) -> Any:
    return resolve(settings_from(None, {"engine": engine, "kv_tokens": 10_000, **flags}), "overlap").cost


def test_a_step_is_longer_by_the_gap_of_its_requests_and_of_the_group(gaps):
    numbers = {"gap_s": 1e-3, "gap_request_s": 2e-5, "gap_rank_s": 3e-4}
    for tp in (1, 4):
        gaps("sglang-0.5.23")
        before = cost("sglang-0.5.23", tp=tp)
        gaps("sglang-0.5.23", **numbers)
        behind = cost("sglang-0.5.23", tp=tp)
        step = batch([100] * 7)
        assert behind.forward(step) - before.forward(step) == pytest.approx(1e-3 + 7 * 2e-5 + (tp - 1) * 3e-4)
        assert behind.decodes(step, 5)[0] == behind.forward(step)
        assert behind.transfer_s(step) == before.transfer_s(step)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("Qwen/Qwen3.5-397B-A17B", {"gap_recurrent_s": 45}),
        ("zai-org/GLM-5", {"gap_sparse_s": 78}),
        ("llama-3.1-8b", {}),
    ],
)
def test_a_step_is_longer_by_the_gap_of_its_layers_of_a_kind(gaps, model, layers):
    numbers = {"gap_recurrent_s": 3e-5, "gap_sparse_s": 4e-5}
    step = batch([100] * 7)
    gaps("sglang-0.5.9")
    before = cost("sglang-0.5.9", model=model, gpu="b200", tp=8).forward(step)
    gaps("sglang-0.5.9", **numbers)
    behind = cost("sglang-0.5.9", model=model, gpu="b200", tp=8).forward(step)
    assert behind - before == pytest.approx(sum(numbers[name] * count for name, count in layers.items()))


def test_a_prompt_of_a_model_with_experts_takes_longer_by_the_gap_of_its_tokens(gaps):
    prompts, decodes = batch([1000, 500, 100], (300, 200)), batch([1000, 500, 100])
    for model, layers in (("Qwen/Qwen3-30B-A3B", 48), ("llama-3.1-8b", 0)):
        gaps("vllm-0.19.0")
        before = cost("vllm-0.19.0", model=model)
        gaps("vllm-0.19.0", gap_expert_token_s=1e-7)
        behind = cost("vllm-0.19.0", model=model)
        assert behind.forward(prompts) - before.forward(prompts) == pytest.approx(500 * layers * 1e-7)
        assert behind.forward(decodes) == before.forward(decodes)


def test_layers_timed_as_they_ran_have_their_small_kernels_already(gaps, tmp_path):
    model = "Qwen/Qwen3-30B-A3B"
    folder = linear_profile(tmp_path / "p", model)
    rows = ((tokens, used, 1e-5 + 1e-8 * tokens) for tokens in (1, 2048) for used in (1, 128))
    table = "tokens,distinct_experts,seconds\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows)
    (folder / "tp1/experts.csv").write_text(table)
    prompts = batch([1000, 500], (300, 200))
    took = []
    for token_s in (0.0, 1e-7):
        gaps("vllm-0.19.0", gap_expert_token_s=token_s)
        took.append(cost("vllm-0.19.0", model=model, cost=f"profile:{folder}").forward(prompts))
    assert took[0] == took[1]


def test_costs_made_of_operator_tables_have_what_runs_beside_the_model_already(gaps, tmp_path):
    folder = linear_profile(tmp_path / "p")
    beside_s = load_engine("sglang-0.5.23").gpu_step_s
    step = batch([100] * 7)
    took = {}
    for gap_s in (0.0, beside_s, 3 * beside_s):
        gaps("sglang-0.5.23", gap_s=gap_s)
        took[gap_s] = cost("sglang-0.5.23", cost=f"profile:{folder}").forward(step)
    assert took[beside_s] == took[0.0]
    assert took[3 * beside_s] - took[0.0] == pytest.approx(2 * beside_s)


def test_a_gap_shows_in_every_gap_between_tokens_and_skipping_steps_leaves_the_same(gaps):
    def run(**flags: object) -> Any:
        requests = [TraceRequest(f"r{n}", 0.0, 64, 60 + n) for n in range(4)]
        return workbench.simulate(requests, engine="sglang-0.5.23", ignore_eos=True, max_context=2048, **flags)

    def tpot_s(record: Any) -> float:
        frame = record.requests
        return float((frame["finish_s"][0] - frame["first_token_s"][0]) / 59)

    gaps("sglang-0.5.23")
    without = tpot_s(run())
    gaps("sglang-0.5.23", gap_s=2e-3)
    plain, exact = run(), run(exact=True)
    assert tpot_s(plain) - without == pytest.approx(2e-3, rel=0.02)
    for table in ("requests", "iterations"):
        for name, column in getattr(plain, table).items():
            np.testing.assert_array_equal(column, getattr(exact, table)[name], err_msg=f"{table}: {name}")
