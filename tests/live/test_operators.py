"""A profile of our own runner: from timed operators to a folder that simulate takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.tables import own_profile
from reports.record.errors import RecordError
from tests.cost.profiles import batch
from workbench.calibrate.operator_profile import write_operators
from workbench.calibrate.operators import Shape, shape_file, shapes, step_of, write_shape
from workbench.calibrate.points import COLUMNS, keep_conditions, write_json

MODEL = "Qwen/Qwen3-0.6B"
LAYERS = 28
FACTOR, STEP_S = 1.25, 2e-3


def operators_of(tokens: int, sequences: int, pairs: float, context: float) -> dict[str, float]:
    """What the operators of a step take in a made-up world: each is linear in what it goes by."""
    return {
        "embedding": 1e-6 * tokens,
        "matrix:qkv_proj": LAYERS * (9e-6 + 1e-7 * tokens),
        "matrix:down_proj": LAYERS * (5e-6 + 2e-7 * tokens),
        "layernorm": LAYERS * 2e-6,
        "lm_head": 1e-4 + 1e-6 * sequences,
        "attention": LAYERS * (4e-6 + 1e-8 * pairs + 2e-9 * context),
    }


def timed(shape: Shape) -> dict[str, float]:
    new = sum(shape.extends)
    pairs = new * (shape.cached + shape.prompt / 2)  # of all prompts
    found = operators_of(shape.tokens, len(shape.lens), pairs, shape.decodes * shape.context)
    return {**found, "step": sum(found.values()) * 2}


def folder_of_points(folder: Path) -> Path:
    """Operators of a made-up world, and steps of runs that take FACTOR times as long and some more."""
    keep_conditions(folder, {"model": MODEL, "gpu": "h100", "dtype": "bf16", "tp": 1, "max_running": 8})
    designed = shapes(2048, 20_000, 8, 4096, 1)
    for shape in designed:
        write_shape(shape_file(folder, shape, 0), shape, timed(shape))
    steps: dict[str, list[float]] = {name: [] for name in (*COLUMNS, "seconds", "ended", "pairs", "decode_context")}
    for shape in [shape for shape in designed if shape.prompts == 1 and shape.tokens < 200] * 3:
        alone = sum(value for name, value in timed(shape).items() if name != "step")
        row = {
            "prefill_tokens": shape.prompt,
            "decode_tokens": shape.decodes,
            "requests": len(shape.lens),
            "context_tokens": sum(shape.lens),
            "pairs": shape.prompt * (shape.cached + shape.prompt / 2),
            "decode_context": shape.decodes * shape.context,
            "seconds": FACTOR * alone + STEP_S,
            "receive_s": 1e-5,
            "schedule_s": 2e-5,
            "launch_host_s": 3e-5,
            "process_s": 4e-5,
            "ended": 0,
        }
        for name, value in row.items():
            steps[name].append(value)
    write_json(folder / "made-up.normal.json", {"steps": steps})
    return folder


def test_what_real_steps_take_beside_their_operators_is_found_and_counted(tmp_path):
    out = tmp_path / "profile"
    said = write_operators(folder_of_points(tmp_path / "points"), out)
    found = said["operators"]
    assert found["factor"] == pytest.approx(FACTOR, rel=1e-3)
    assert found["step_s"] == pytest.approx(STEP_S, rel=1e-3)
    assert found["mean_error"] < 1e-3
    assert said["host"]["schedule_s"] + said["host"]["schedule_request_s"] > 0
    model = load_model(MODEL)
    cost = ProfileCost(own_profile.read(out, 1, model), model, load_gpu("h100"))
    for lens, new in (([64, 64], ()), ([256], (256,)), ([96, 16], (32,))):
        step = batch(lens, new)
        chunk, decodes = sum(new), len(lens) - len(new)
        pairs = sum(n * (length - n / 2) for n, length in zip(new, lens, strict=False))
        alone = operators_of(chunk + decodes, len(lens), pairs, sum(lens[len(new) :]))
        expected = FACTOR * sum(alone.values()) + STEP_S
        assert cost.forward(step) == pytest.approx(expected, rel=0.02), (lens, new)


def test_steps_of_more_prompt_tokens_than_one_prompt_has_grow_with_the_number_of_prompts(tmp_path):
    out = tmp_path / "profile"
    write_operators(folder_of_points(tmp_path / "points"), out)
    model = load_model(MODEL)
    cost = ProfileCost(own_profile.read(out, 1, model), model, load_gpu("h100"))
    attention = [cost.attention_s(batch([512] * n, (512,) * n)) for n in (4, 8, 16)]
    assert attention[1] / attention[0] == pytest.approx(2, rel=0.01)
    assert attention[2] / attention[0] == pytest.approx(4, rel=0.1)  # beyond every measured step: the roofline says
    beside_decodes = batch([512] * 8 + [100, 100], (512,) * 8)
    assert cost.attention_s(beside_decodes) > attention[1]
    assert any("prompt tokens a step: 8,192 is beyond the measured 4,096" in note for note in cost.notes)


@given(st.sampled_from([1, 4, 16]), st.integers(200, 4000), st.integers(1, 64), st.sampled_from([256, 1024]))
def test_shapes_fit_the_runner_they_are_for(page_size, kv_tokens, max_running, largest_step):
    for shape in shapes(1024, kv_tokens, max_running, largest_step, page_size):
        step = step_of(shape, page_size, 50)
        assert len(step.rows) <= max_running and step.prefill_tokens + step.decode_tokens <= largest_step
        assert step.input_ids is None or (len(step.input_ids) == step.prefill_tokens and step.input_ids.max() < 50)
        pages = np.concatenate([write.pages for write in step.page_writes])
        assert len(np.unique(pages)) == len(pages) and pages.max() < kv_tokens // page_size
        held = [len(write.pages) * page_size for write in step.page_writes]
        assert all(0 <= room - length < page_size for room, length in zip(held, step.seq_lens, strict=True))
        assert step.seq_lens.max() <= 1024


def test_points_without_operators_and_broken_ones_are_refused_and_leave_what_was_there(tmp_path):
    folder, out = folder_of_points(tmp_path / "points"), tmp_path / "profile"
    write_operators(folder, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    some = next((folder / "operators").glob("*.json"))
    content = json.loads(some.read_text())
    for broken in ('{"shape": {"prompt": 1}}', json.dumps({**content, "seconds": {"attention": "long"}}), "{"):
        some.write_text(broken)
        with pytest.raises(RecordError, match=some.name):
            write_operators(folder, out)
    for file in (folder / "operators").glob("*.json"):
        file.unlink()
    with pytest.raises(RecordError, match="no operators were timed"):
        write_operators(folder, out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["points", "profile"]
