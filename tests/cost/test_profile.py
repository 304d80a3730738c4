"""The profile cost model: what it looks up, what it does between and beyond the measured points, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backends.simulated.catalogue.gpu_specs import load_gpu
from backends.simulated.catalogue.model_specs import load_model
from backends.simulated.cost.cost_request import CostError
from backends.simulated.cost.models.operator_tables import Curve, Grid, ProfileError, grid_from_points
from backends.simulated.cost.models.profile import ProfileCost
from backends.simulated.cost.models.uneven import uneven_grid
from backends.simulated.cost.tables.llmservingsim import skew_enabled
from backends.simulated.cost.tables.own_profile import write_profile
from backends.simulated.cost.tables.profiles import describe, read_profile
from tests.cost.profiles import (
    DATA,
    GPU,
    LAYERS,
    LLAMA,
    MODEL,
    attention_rows,
    attention_s,
    batch,
    head_s,
    layer_s,
    linear_profile,
    needs_data,
)
from workbench.cluster.resolve import resolve
from workbench.settings.loading import settings_from

ROOT = Path(__file__).resolve().parents[2]


def cost_of(folder: Path, **options: object) -> ProfileCost:
    model, gpu = load_model(MODEL), load_gpu(GPU)
    return ProfileCost(read_profile(folder, 1, model, gpu), model, gpu, **options)  # type: ignore[arg-type]


def test_between_measured_points_a_linear_profile_is_reproduced(tmp_path):
    cost = cost_of(linear_profile(tmp_path / "p"))
    decode = batch([700] * 100)
    assert cost.forward(decode) == pytest.approx(LAYERS * (layer_s(100) + attention_s(0, 0, 100, 700)) + head_s(100))
    mixed = batch([900, *[700] * 30], (300,))
    # One prompt: 300 new tokens after 600.
    expected = LAYERS * (layer_s(330) + attention_s(300, 600, 30, 700)) + head_s(31)
    assert cost.forward(mixed) == pytest.approx(expected)


def test_parts_add_up_to_the_step(tmp_path):
    cost = cost_of(linear_profile(tmp_path / "p"), step_s=50e-6)
    for step in (batch([900] * 40), batch([512], (512,)), batch([900, 800, 700], (100, 50)), batch([20_000], (9000,))):
        assert sum(cost.explain(step).values()) == pytest.approx(cost.forward(step))


def test_a_step_that_replays_a_graph_is_padded_to_it(tmp_path):
    folder = linear_profile(tmp_path / "p")
    padded, own = cost_of(folder, capture_sizes=[1, 8, 64, 128]), cost_of(folder)
    assert padded.linear_s(64) - own.linear_s(40) == pytest.approx(
        padded.forward(batch([500] * 40)) - own.forward(batch([500] * 40))
    )
    prompt = batch([100], (100,))
    assert padded.forward(prompt) == own.forward(prompt)
    both = cost_of(folder, mixed_capture_sizes=[64, 128])
    assert both.forward(prompt) - own.forward(prompt) == pytest.approx(LAYERS * (layer_s(128) - layer_s(100)))


def test_several_short_prompts_attend_to_fewer_tokens_than_one_long_one(tmp_path):
    cost = cost_of(linear_profile(tmp_path / "p"))
    one, four = batch([2000], (2000,)), batch([500] * 4, (500,) * 4)
    # The same products, a slightly larger head, less attention.
    assert cost.attention_s(four) < cost.attention_s(one)
    assert cost.attention_s(four) >= attention_s(16, 0, 0, 0)


def test_more_prompts_than_were_measured_at_once_cost_so_many_times_as_much(tmp_path):
    cost = cost_of(linear_profile(tmp_path / "p"))
    measured, twice, eight = (cost.attention_s(batch([512] * n, (512,) * n)) for n in (4, 8, 32))
    assert twice == pytest.approx(2 * measured) and eight == pytest.approx(8 * measured)
    beside = cost.attention_s(batch([512] * 8 + [700] * 30, (512,) * 8))
    assert beside == pytest.approx(twice + cost.attention_s(batch([700] * 30)))
    assert any("prompt tokens a step: 4,096 is beyond the measured 2,048" in note for note in cost.notes)


def test_beyond_the_measured_range_times_grow_like_the_roofline_and_one_note_says_so(tmp_path):
    cost = cost_of(linear_profile(tmp_path / "p"))
    edge, beyond = cost.forward(batch([4096] * 256)), cost.forward(batch([8192] * 256))
    assert 1.3 * edge < beyond < 2.1 * edge
    cost.forward(batch([9000] * 256))
    assert len(cost.notes) == 1 and "8,192" in cost.notes[0] and "roofline" in cost.notes[0]
    twice = cost.linear_s(4096) / cost.linear_s(2048)
    assert 1.8 < twice < 2.1
    assert len(cost.notes) == 2


def test_more_work_never_takes_less_time_beyond_the_range(tmp_path):
    cost = cost_of(linear_profile(tmp_path / "p"))
    times = [cost.forward(batch([length] * 64)) for length in (2000, 4000, 5000, 10_000, 40_000)]
    assert times == sorted(times)
    times = [cost.forward(batch([length], (length,))) for length in (1000, 2000, 3000, 6000)]
    assert times == sorted(times)


def test_matrix_products_take_whole_tiles_where_the_steps_are_visible():
    stairs = Curve([16, 32, 48, 512], [1.0, 2.0, 3.0, 9.0], staircase=True)
    assert stairs.at(17) == stairs.at(32) == 2.0
    assert 3.0 < stairs.at(100) < 9.0, "sparse points are interpolated"
    assert Curve([16, 32], [1.0, 2.0]).at(24) == 1.5


def test_a_grid_interpolates_products_exactly_and_clamps_at_its_ends():
    axes = ((1.0, 4.0, 16.0), (0.0, 10.0), (2.0, 8.0))
    values = np.array([[[2 + a * b + 3 * c for c in axes[2]] for b in axes[1]] for a in axes[0]])
    grid = Grid(axes, values)
    assert grid.at(7, 3, 5) == pytest.approx(2 + 7 * 3 + 15)
    assert grid.at(100, 3, 1) == pytest.approx(2 + 16 * 3 + 6)
    assert grid.near(5, 9).at(3) == pytest.approx(2 + 4 * 10 + 9)


def test_holes_in_a_grid_are_filled_from_their_neighbours():
    points = np.array([(x, y) for x in (1, 2, 4, 8) for y in (10, 20, 40) if (x, y) not in ((2, 20), (4, 40), (8, 40))])
    grid = grid_from_points(points.astype(float), np.array([x * y for x, y in points], float), (0, 1))
    assert grid.at(2, 20) == pytest.approx(40)
    assert grid.at(8, 20) == pytest.approx(160)
    assert grid.at(8, 40) >= grid.at(4, 40) >= grid.at(2, 40), "an end follows the trend"


def test_unequal_lengths_cost_what_was_measured_and_equal_ones_nothing():
    def equal_s(prefill: float, cached: float, decodes: float, mean: float) -> float:
        return 1e-6 * decodes * mean

    rows = {name: [] for name in ("prefill", "cached", "decodes", "longest", "mean", "seconds")}
    for decodes in (16.0, 64.0):
        for mean, longest in ((500.0, 1000.0), (2000.0, 4000.0)):
            for name, value in zip(rows, (0.0, 0.0, decodes, longest, mean, 1.2e-6 * decodes * mean), strict=True):
                rows[name].append(value)
    alone, beside = uneven_grid({name: np.array(values) for name, values in rows.items()}, equal_s)
    assert beside is None and alone is not None
    assert alone.at(16, 0.5, 1000) == pytest.approx(0.2)
    assert alone.at(32, 0.25, 1000) == pytest.approx(0.1)
    assert alone.at(32, 0.0, 1000) == 0


# -- what it refuses ---------------------------------------------------------------------------------------------------


def refused(folder: Path, model: str = MODEL, gpu: str = GPU, tp: int = 1, dtype: str = "bf16") -> str:
    with pytest.raises((ProfileError, CostError)) as error:
        read_profile(folder, tp, load_model(model), load_gpu(gpu), dtype)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text
    return text


def test_a_profile_of_another_model_gpu_dtype_or_size_is_refused_in_one_line(tmp_path):
    folder = linear_profile(tmp_path / "p")
    assert "measured with Qwen/Qwen3-0.6B, not Qwen/Qwen3-8B" in refused(folder, model="Qwen/Qwen3-8B")
    assert "measured on h100, not h200" in refused(folder, gpu="h200")
    assert "it holds tp1" in refused(folder, tp=2)
    assert "bf16 weights, not fp8" in refused(folder, dtype="fp8")


def test_missing_tables_and_bad_numbers_are_named_with_file_line_and_column(tmp_path):
    folder = linear_profile(tmp_path / "p")
    (folder / "tp1" / "head.csv").rename(folder / "tp1" / "away.csv")
    assert "no table 'head'" in refused(folder)
    (folder / "tp1" / "away.csv").rename(folder / "tp1" / "head.csv")
    layer = folder / "tp1" / "layer.csv"
    good = layer.read_text()
    layer.write_text(good.replace("mlp,64,", "mlp,sixty-four,"))
    assert "layer.csv: line 3: tokens: 'sixty-four' is not a number" in refused(folder)
    layer.write_text(good.replace("seconds", "time"))
    assert "layer.csv: line 1: no column 'seconds'" in refused(folder)
    layer.write_text(good + "mlp,9\n")
    assert "layer.csv: line 7: 2 fields where the header has 3" in refused(folder)
    (folder / "profile.json").write_text("{}")
    assert "profile.json: format" in refused(folder)
    assert "not a profile" in refused(tmp_path)


def test_a_model_with_experts_needs_their_table(tmp_path):
    folder = linear_profile(tmp_path / "p", model="Qwen/Qwen3-30B-A3B")
    assert "no table 'experts'" in refused(folder, model="Qwen/Qwen3-30B-A3B")


def test_tensor_parallelism_divides_the_experts_as_expert_parallelism_does(tmp_path):
    name, tokens = "Qwen/Qwen3-30B-A3B", (1, 64, 1024)
    model, gpu = load_model(name), load_gpu(GPU)
    folder = tmp_path / "p"
    rows = [(n, used, 1e-6 * n + 1e-6 * used) for n in tokens for used in (1, model.experts)]
    for tp in (1, 2):
        write_profile(
            folder,
            tp,
            {"model": name, "gpu": GPU, "dtype": "bf16"},
            {
                "layer": [("mlp", n, layer_s(n)) for n in tokens],
                "head": [("lm_head", n, head_s(n)) for n in (1, 256)],
                "attention": attention_rows(),
                "experts": rows,
            },
        )

    def experts_s(tp: int, ep: int) -> float:
        return ProfileCost(read_profile(folder, tp, model, gpu), model, gpu, tp=tp, ep=ep).experts_s(512)

    assert experts_s(2, 1) == experts_s(2, 2) == experts_s(1, 2) == pytest.approx(experts_s(1, 1) / 2)
    measured = read_profile(folder, 2, model, gpu)
    measured.experts_over = 2
    assert ProfileCost(measured, model, gpu, tp=2).experts_s(512) == experts_s(1, 1), "they were measured divided"


def test_a_table_that_no_profile_has_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no table 'gemm'"):
        write_profile(tmp_path, 1, {"model": MODEL, "gpu": GPU, "dtype": "bf16"}, {"gemm": []})


def test_weights_are_what_a_profile_was_measured_with_and_the_run_says_so(tmp_path):
    cost = f"profile:{linear_profile(tmp_path / 'p', dtype='fp8')}"

    def weights(**flags: object) -> tuple[str, str]:
        found = resolve(settings_from(None, {"cost": cost, **flags}), "overlap").weights
        return found.dtype, found.said_by

    assert weights() == weights(dtype="auto") == ("fp8", f"--cost {cost}")
    assert weights(dtype="fp8") == ("fp8", "--dtype")
    with pytest.raises(ValueError, match="fp8"):
        weights(dtype="bf16")


# -- on the command line -----------------------------------------------------------------------------------------------


def workbench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from workbench.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_simulating_with_a_profile_takes_model_and_gpu_from_it(tmp_path):
    folder = linear_profile(tmp_path / "p", host={"process_s": 1e-6})
    sample = ROOT / "traces" / "samples" / "sample.jsonl"
    done = workbench("simulate", sample, "--requests", 20, "--cost", f"profile:{folder}", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    import json

    meta = json.loads((tmp_path / "o/overlap/meta.json").read_text())
    assert meta["model"] == MODEL and meta["hardware"]["gpu"] == GPU
    assert meta["host_model"]["process_s"] == 1e-6
    wrong = workbench("simulate", sample, "--cost", f"profile:{folder}", "--gpu", "l4", "--out", tmp_path / "w")
    assert wrong.returncode == 2 and wrong.stderr == f"error: {folder}: measured on h100, not l4\n"
    unknown = workbench("simulate", sample, "--cost", "guess", "--out", tmp_path / "w")
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1


def test_profile_show_says_what_is_covered(tmp_path):
    found = describe(linear_profile(tmp_path / "p"))
    rows = {row["operator"]: row for row in found["sizes"][0]["tables"]}
    assert rows["mlp"]["range"] == "1 to 2,048" and rows["mlp"]["points"] == 5
    shown = workbench("profile", "show", tmp_path / "p")
    assert shown.returncode == 0 and "attention with prompts" in shown.stdout
    assert workbench("profile", "show", tmp_path / "nowhere").returncode == 2


# -- the public tables -------------------------------------------------------------------------------------------------


@needs_data
def test_a_measured_step_is_the_sum_of_its_operators():
    import gzip

    model, gpu = load_model("meta-llama/Llama-3.1-8B"), load_gpu("rtx-pro-6000")
    cost = ProfileCost(read_profile(LLAMA, 1, model, gpu), model, gpu)

    def us(table: str, row: str) -> float:
        with gzip.open(LLAMA / "tp1" / f"{table}.csv.gz", "rt") as file:
            return next(float(line.rsplit(",", 1)[1]) for line in file if line.startswith(row + ","))

    names = ("qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
    layer = sum(us("dense", f"{name},128") for name in names) + 2 * us("dense", "layernorm,128")
    once = us("dense", "embedding,128") + us("dense", "final_layernorm,128")
    head = us("per_sequence", "lm_head,128") + us("per_sequence", "sampler,128")
    expected = 32 * (layer + us("attention", "0,0,128,1024")) + once + head
    assert cost.forward(batch([1024] * 128)) - cost.beside_s(batch([1024] * 128)) == pytest.approx(expected * 1e-6)


@needs_data
def test_between_the_kernels_of_a_step_lies_less_where_a_graph_replays_them():
    model, gpu = load_model("meta-llama/Llama-3.1-8B"), load_gpu("rtx-pro-6000")
    tables, step = read_profile(LLAMA, 1, model, gpu), batch([1024] * 128)
    launched = ProfileCost(tables, model, gpu, step_s=1e-4).beside_s(step)
    replayed = ProfileCost(tables, model, gpu, step_s=1e-4, capture_sizes=[128]).beside_s(step)
    # Seven operators, one of them twice, and attention's two kernels: ten a layer.
    assert launched == pytest.approx(1e-4 + 32 * 10 * gpu.kernel_overhead_s)
    assert replayed == pytest.approx(1e-4 + 32 * 10 * gpu.graph_gap_s)


@needs_data
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B-Instruct-2507"])
def test_every_public_profile_folder_is_read_at_both_sizes(model):
    folder = LLAMA.parents[2] / model / "bf16"
    spec, gpu = load_model(model), load_gpu("rtx-pro-6000")
    steps = [
        ProfileCost(read_profile(folder, tp, spec, gpu), spec, gpu, tp=tp).forward(batch([1000] * 64)) for tp in (1, 2)
    ]
    assert 0 < steps[1] < steps[0] or spec.experts, "two GPUs are quicker than one"


@needs_data
@pytest.mark.slow
def test_aiconfigurator_tables_give_plausible_steps_for_any_model_they_cover():
    base = DATA / "profiles" / "aiconfigurator"
    llama, experts = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B"
    for card, name, tp in (
        ("a100", llama, 1),
        ("a100", experts, 2),
        ("h200", llama, 1),
        ("h100", llama, 1),
        ("h100", llama, 2),
        ("h100", experts, 1),
    ):
        model, gpu = load_model(name), load_gpu(card)
        cost = ProfileCost(read_profile(base, tp, model, gpu), model, gpu, tp=tp)
        one = cost.forward(batch([1000]))
        weights_s = model.active_parameters * 2 / tp / gpu.memory_bandwidth
        assert weights_s < one < 4 * weights_s
        assert cost.forward(batch([4000], (4000,))) > one
    assert "measured on h200_sxm" in refused(base / "h200_sxm_sglang-0.5.14", "Qwen/Qwen3-8B", "h100")
    assert "sliding windows" in refused(base, "openai/gpt-oss-20b", "h100")


@needs_data
def test_a_table_of_unequal_lengths_that_a_profile_turns_off_is_not_read_and_a_note_says_so(tmp_path):
    uneven = batch([4096, *[200] * 99])
    costs = {}
    for enabled in ("true", "false"):
        folder = tmp_path / enabled
        folder.mkdir()
        (folder / "tp1").symlink_to(LLAMA / "tp1")
        meta = (LLAMA / "meta.yaml").read_text()
        assert "skew_profile:\n  enabled: true" in meta
        (folder / "meta.yaml").write_text(
            meta.replace("skew_profile:\n  enabled: true", f"skew_profile:\n  enabled: {enabled}")
        )
        model, gpu = load_model("meta-llama/Llama-3.1-8B"), load_gpu("rtx-pro-6000")
        costs[enabled] = ProfileCost(read_profile(folder, 1, model, gpu), model, gpu)
    assert costs["false"].forward(uneven) < 0.99 * costs["true"].forward(uneven)
    equal = batch([(4096 + 200 * 99) // 100] * 100)
    assert costs["false"].forward(uneven) == pytest.approx(costs["false"].forward(equal), rel=2e-3)
    assert any("skew_profile off" in note for note in costs["false"].notes)
    assert not any("skew" in note for note in costs["true"].notes)
    (folder / "meta.yaml").write_text("model: a\nhardware: b\nskew_profile: {enabled: maybe}\n")
    with pytest.raises(ProfileError, match=r"meta\.yaml: skew_profile\.enabled: not true or false"):
        skew_enabled(folder)
