"""Predictions against measurements: no error may grow by more than a tenth over its recorded value."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from backends.simulated.catalogue.model_specs import load_model
from benchmarks import scoreboard
from benchmarks.board import predict as board_predict
from benchmarks.board import truth
from benchmarks.board.errors import errors_of, grouped, kind_of, layout_of, table
from benchmarks.board.launched import first_chunk_tokens, steps_unseen
from benchmarks.board.pages import between_markers
from benchmarks.board.predict import COSTS, Predicted, nearest_preset, predict, settings_of
from benchmarks.board.results import Results
from benchmarks.board.silicon import (
    APART,
    CONFIGURATION,
    INSTANCES_UNKNOWN,
    PUBLISHED_AGAIN,
    Row,
    Side,
    disagreement,
    find_rows,
    read_rows,
    recounted,
)

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads(scoreboard.RECORDED.read_text())


@pytest.fixture(scope="module")
def scores() -> list[truth.Score]:
    found, skipped = truth.run()
    if not found:
        pytest.skip("; ".join(skipped))
    return found


def test_no_error_of_a_measured_run_has_grown_by_more_than_a_tenth(scores):
    found = {"runs": scoreboard.errors_of_runs(scores), "rows": {}}
    assert scoreboard.grown(found, RECORDED) == []


def test_every_recorded_case_that_has_data_is_scored(scores):
    here = {case.name for case in truth.cases()}
    assert here & set(RECORDED["runs"]) <= {score.case for score in scores}


def test_requests_of_the_measured_run_are_predicted_one_by_one(scores):
    """The aims of the project on this run."""
    found = next(score for score in scores if score.case == "RTXPRO6000_Llama-3.1-8B").errors
    assert found["ttft_each"] < 0.10 and found["tpot_each"] < 0.02 and found["e2e_each"] < 0.02
    assert all(abs(found[name]) < 0.02 for name in ("ttft_mean", "tpot_mean", "e2e_mean"))


def test_a_run_that_cannot_be_scored_is_named_and_the_others_are_scored(tmp_path):
    for name, text in (("NOGPU_Nothing", "{}"), ("H100_Broken", "not JSON"), ("H100_Short", "")):
        folder = tmp_path / "truth" / name
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text('{"model": "meta-llama/Llama-3.1-8B", "vllm_version": "0.19.0"}')
        (folder / "requests.jsonl").write_text(text + "\n")
    found, skipped = truth.run(tmp_path)
    assert found == []
    assert [line.split(":")[0] for line in skipped] == ["H100_Broken", "H100_Short", "NOGPU_Nothing"]
    assert "requests.jsonl: line 1: queued_ts: missing" in skipped[2]


def test_a_recorded_run_that_is_there_and_cannot_be_scored_is_worse(tmp_path):
    folder = tmp_path / "truth" / "RTXPRO6000_Llama-3.1-8B"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    (folder / "requests.jsonl").write_text("not JSON\n")
    runs, _ = truth.run(tmp_path)
    assert scoreboard.lost(runs, RECORDED, tmp_path) == ["RTXPRO6000_Llama-3.1-8B: could be scored before"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", scoreboard.MODES)
@pytest.mark.parametrize("cost", COSTS)
def test_no_error_of_a_slice_of_the_published_rows_has_grown_by_more_than_a_tenth(cost, mode):
    path = find_rows()
    assert path is not None, "the development environment has aiconfigurator-core"
    every, at_most = scoreboard.SLICES[mode]
    predicted, _ = scoreboard.score_rows(path, every, 1, cost, mode=mode, at_most=at_most)
    name = scoreboard.slice_of(every, cost, mode, at_most)
    assert name in RECORDED["rows"] and predicted
    assert scoreboard.grown({"runs": {}, "rows": {name: scoreboard.errors_of_rows(predicted, mode)}}, RECORDED) == []


def row(**changes: object) -> Row:
    values: dict[str, object] = {
        "id": "one",
        "engine": "vllm",
        "version": "0.19.0",
        "model": "meta-llama/Llama-3.1-8B",
        "system": "h100_sxm",
        "mode": "agg",
        "precision": "",
        "input_tokens": 64,
        "output_tokens": 8,
        "concurrency": 4,
        "tp": 1,
        "dp": 1,
        "ep": 1,
        "shortest": 1.0,
        "ttft_s": 0.1,
        "tpot_s": 0.01,
        "configuration": "vllm|0.19.0",
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def written(path: Path, *rows: dict[str, str]) -> Path:
    columns = ["id", "silicon_data_source", "isl", "osl", "batch_size", "gemm_quant_mode", "precision"]
    columns += [*CONFIGURATION, *APART, "silicon_ttft_ms", "silicon_tpot_ms"]
    defaults = {
        "id": "a",
        "silicon_data_source": "source_file=x.csv; model=Llama-3.1-8B",
        "isl": "1024",
        "osl": "128",
        "batch_size": "16",
        "gemm_quant_mode": "fp8",
        "backend": "vllm",
        "backend_version": "0.12.0",
        "model_path": "meta-llama/Llama-3.1-8B",
        "system": "h100_sxm",
        "mode": "agg",
        "tp_size": "2",
        "pp_size": "1",
        "attention_dp_size": "",
        "moe_tp_size": "2",
        "moe_ep_size": "1",
        "silicon_ttft_ms": "100",
        "silicon_tpot_ms": "8",
    }
    lines = [",".join(columns)]
    lines += [",".join({**defaults, **one}.get(column, "") for column in columns) for one in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_that_no_run_stands_for_are_counted_by_reason(tmp_path):
    path = written(
        tmp_path / "s.csv",
        {},
        {"mode": "disagg"},
        {"silicon_data_source": "source_file=x.csv; model=Llama-3.1-70B"},
        {"silicon_ttft_ms": ""},
        {"silicon_data_source": "model=Llama-3.1-8B; silicon_concurrency=64"},
        {"silicon_data_source": "model=Llama-3.1-8B; silicon_concurrency=16", "attention_dp_size": "4"},
    )
    rows, left_out = read_rows(path)
    assert [(one.tp, one.dp, one.concurrency, one.ttft_s) for one in rows] == [(2, 1, 16, 0.1)]
    assert left_out == Counter(
        {
            "disaggregated: in tables of their own": 1,
            "model and source disagree": 1,
            "no TTFT": 1,
            "requests at a time and source disagree": 2,
        }
    )


APART_ROW = {
    "id": "dsr1_gb200_sglang",
    "silicon_data_source": "db-dump/2026-04-27; config_id=1; silicon_concurrency=96",
    "backend": "sglang",
    "backend_version": "0.5.8",
    "model_path": "deepseek-ai/DeepSeek-V3",
    "system": "gb200",
    "mode": "disagg",
    "gemm_quant_mode": "nvfp4",
    "batch_size": "",
    **dict.fromkeys(("tp_size", "pp_size", "moe_tp_size", "moe_ep_size"), ""),
    "prefill_num_workers": "3",
    "prefill_tp_size": "4",
    "prefill_pp_size": "1",
    "prefill_attention_dp_size": "1",
    "prefill_moe_tp_size": "4",
    "prefill_moe_ep_size": "1",
    "decode_num_workers": "2",
    "decode_batch_size": "6",
    "decode_tp_size": "1",
    "decode_pp_size": "1",
    "decode_attention_dp_size": "8",
    "decode_moe_tp_size": "1",
    "decode_moe_ep_size": "8",
}
"""Three prefill instances of 4 GPUs each, and two that decode, of 8 ranks with 6 requests each."""


def test_a_disaggregated_row_is_pools_of_the_instances_that_it_says_at_the_requests_that_its_source_says(tmp_path):
    rows, left_out = read_rows(written(tmp_path / "s.csv", APART_ROW), "disagg")
    assert left_out == Counter() and [one.concurrency for one in rows] == [2 * 8 * 6]
    assert (rows[0].prefill, rows[0].decode) == (Side(3, 4, 1, 1, 1), Side(2, 1, 1, 8, 8))
    settings = settings_of(rows[0])
    # Eight ranks step together: each decode instance is a pool of eight.
    eight = {"role": "decode", "count": 8, "tp": 1, "ep": 8}
    assert settings["pool"] == [{"role": "prefill", "count": 3, "tp": 4}, eight, eight]
    assert (settings["kv_link"], settings["kv_dtype"], settings["concurrency"]) == ("585GB/s", "fp8", 96)
    assert not {"tp", "dp", "ep", "front_end"} & settings.keys()
    assert (
        settings_of(row(mode="disagg", prefill=Side(1, 1, 1, 1, 1), decode=Side(1, 1, 1, 1, 1)))["kv_link"] == "50GB/s"
    )
    assert "decode_tp_size" in CONFIGURATION and rows[0].configuration.endswith("|4|1|1|4|1|1|1|8|1|8")
    assert layout_of(Predicted(rows[0], 1, 1)) == "prefill 3 x tp 4, decode 2 x tp 1 dp 8 ep 8"


def test_disaggregated_rows_that_no_pools_stand_for_are_counted_by_reason(tmp_path):
    unsaid = {**APART_ROW, "prefill_num_workers": "", "decode_num_workers": "", "decode_batch_size": ""}
    path = written(
        tmp_path / "s.csv",
        {},
        APART_ROW,
        unsaid,
        {**unsaid, "silicon_ttft_ms": "101"},
        {**unsaid, "silicon_data_source": "silicon_concurrency=95"},
        {**APART_ROW, "silicon_data_source": "silicon_concurrency=94"},
        {**APART_ROW, "silicon_ttft_ms": ""},
        {**APART_ROW, "decode_moe_ep_size": "1"},
        {**APART_ROW, "decode_attention_dp_size": "1", "decode_pp_size": "2", "decode_batch_size": "48"},
    )
    rows, left_out = read_rows(path, "disagg")
    counted = {PUBLISHED_AGAIN: 1, INSTANCES_UNKNOWN: 2, "requests at a time and source disagree": 1, "no TTFT": 1}
    assert left_out == Counter(counted) and len(rows) == 3
    for one, said in zip(rows[1:], ("without expert parallelism", "pp"), strict=True):
        with pytest.raises(ValueError, match=said):
            predict(one)


def test_all_disaggregated_rows_are_predicted_or_left_out_and_as_many_as_the_page_says():
    path = find_rows()
    assert path is not None
    rows, left_out = read_rows(path, "disagg")
    assert len(rows) + left_out.total() == 1602
    text = " ".join((ROOT / "docs/fidelity.md").read_text().split())
    assert f"{len(rows)} say how many" in text and f"others {left_out[PUBLISHED_AGAIN]} are the same" in text
    assert f"and {left_out[INSTANCES_UNKNOWN]} cannot be set up" in text


def test_a_disaggregated_row_pays_for_the_way_of_its_kv_and_decodes_without_prompts():
    one = {"model": "Qwen/Qwen3-32B", "input_tokens": 4000, "output_tokens": 64, "concurrency": 8, "engine": "sglang"}
    apart = row(mode="disagg", prefill=Side(2, 1, 1, 1, 1), decode=Side(1, 1, 1, 1, 1), precision="fp8", **one)
    found, slow = predict(apart), predict(apart, kv_link="1GB/s")
    assert found.tpot_s < predict(row(precision="fp8", **one)).tpot_s
    # 4,000 tokens of 64 layers, 8 heads of 128 for K and V, 2 bytes: 1.05 GB, and others' share the link.
    assert slow.ttft_s > found.ttft_s + 1.0


@pytest.mark.parametrize("precision", ["fp8", "fp8_block"])
def test_a_checkpoint_in_fp8_by_block_is_simulated_as_it_is_saved(precision):
    settings = settings_of(row(model="Qwen/Qwen3-235B-A22B-FP8", precision=precision))
    weights = load_model(settings["model"]).precision(settings["dtype"])
    assert settings["dtype"] == "auto" and weights.quantised.bytes == pytest.approx(1 + 4 / 128**2)


def test_rows_whose_gpus_are_those_of_several_pools_are_left_out_and_those_counted_twice_are_as_many_as_the_page_says():
    with pytest.raises(ValueError, match="GPUs of all pools of a disaggregated run"):
        settings_of(row(system="gb200", tp=32))
    assert settings_of(row(tp=8))["tp"] == 8 and settings_of(row(tp=8, dp=2, ep=16))["ep"] == 16
    path = find_rows()
    assert path is not None
    with path.open(newline="", encoding="utf-8") as file:
        twice = sum(recounted(values) for values in csv.DictReader(file) if values["mode"] == "agg")
    assert f"{twice} rows count their GPUs twice" in (ROOT / "docs/fidelity.md").read_text()


def test_a_file_in_another_form_is_refused_with_its_line(tmp_path):
    path = written(tmp_path / "s.csv", {"batch_size": "many"})
    with pytest.raises(ValueError, match=r"s\.csv: line 2: "):
        read_rows(path)
    ran = CliRunner().invoke(_app(), ["--rows", str(path)])
    assert ran.exit_code == 2 and "line 2" in ran.stderr
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"line 1: .*: no such column"):
        read_rows(tmp_path / "t.csv")


def _app():
    import typer

    app = typer.Typer()
    app.command()(scoreboard.main)
    return app


def test_a_configuration_belongs_wholly_to_fitting_or_to_scoring(tmp_path):
    path = written(
        tmp_path / "s.csv", *({"tp_size": str(tp), "isl": isl} for tp in range(1, 20) for isl in ("64", "128"))
    )
    rows, _ = read_rows(path)
    fitting, scoring = ([one for one in rows if one.scores is scores] for scores in (False, True))
    assert fitting and scoring
    assert not {one.configuration for one in fitting} & {one.configuration for one in scoring}
    # By sha256sum, the digest of "four" ends in 0, and that of "one" in d.
    assert [row(configuration=text).scores for text in ("four", "one")] == [False, True]


@pytest.mark.parametrize(
    ("name", "columns", "found"),
    [
        ("b200_sxm_sglang_fp8_agg_1024x1024_c8_tp8_ep8_1", ("64", "1", "8", "8"), (8, 1, 8)),
        ("b200_sxm_trtllm_agg_1024x1024_c8_tp4_0_ep4_0_1", ("1", "16", "4", "4"), (1, 4, 4)),
        ("b200_sxm_vllm_agg_1024x1024_c8_cfg7", ("4", "4", "1", "16"), (1, 4, 4)),
        ("h200_sxm_trtllm_agg_c8_tp2_ep2_1", ("4", "1", "2", "2"), (2, 1, 2)),
        # As the columns say: no square, or one that a box holds and no name contradicts.
        ("b200_sxm_sglang_agg_c8_tp8_ep8_1", ("8", "1", "1", "8"), (8, 1, 8)),
        ("b200_sxm_sglang_agg_c8_cfg7", ("4", "1", "2", "2"), (4, 1, 2)),
        ("b200_sxm_sglang_agg_c8_tp4_ep2_1", ("4", "1", "2", "2"), (4, 1, 2)),
    ],
)
def test_gpus_that_a_row_counts_twice_are_counted_once(tmp_path, name, columns, found):
    sizes = dict(zip(("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"), columns, strict=True))
    rows, _ = read_rows(written(tmp_path / "s.csv", {"id": name, **sizes}))
    assert (rows[0].tp, rows[0].dp, rows[0].ep) == found
    assert columns[0] in rows[0].configuration.split("|"), "which half it belongs to is by what the columns say"


def test_a_model_of_another_size_than_its_source_says_is_a_disagreement():
    assert disagreement("meta-llama/Llama-3.1-8B", "model=Llama-3.1-70B; x=1") is not None
    assert disagreement("openai/gpt-oss-120b", "model=GPT-OSS-120B; x=1") is None
    assert disagreement("Qwen/Qwen3-32B", "source_file=/data/h100/vllm/0.12.0/Qwen_Qwen3-32B.csv; c=1") is None
    assert disagreement("Qwen/Qwen3-32B", "nothing that names a model") is None


def test_a_preset_is_the_newest_that_is_not_newer_than_the_version():
    assert nearest_preset("vllm", "0.20.1") == "vllm-0.19.0"
    assert nearest_preset("vllm", "0.1.0") == "vllm-0.12.0"
    assert nearest_preset("vllm", "nightly-5b8c30d") == "vllm-0.33.0"
    assert nearest_preset("trtllm", "1.0.0") is None


def test_rows_are_simulated_behind_the_front_end_of_their_engine_where_there_is_one():
    assert [settings_of(row(engine=engine)).get("front_end") for engine in ("vllm", "sglang", "trtllm")] == [
        "vllm",
        "sglang",
        None,
    ]


def test_what_launch_scripts_say_is_taken_for_rows_of_their_benchmark_alone():
    dense = {"model": "meta-llama/Llama-3.1-70B", "precision": "fp8"}
    assert settings_of(row(shortest=0.8, **dense))["kv_dtype"] == "fp8"
    assert "kv_dtype" not in settings_of(row(**dense)) and "kv_dtype" not in settings_of(row(shortest=0.8))
    sglang = {"engine": "sglang", "shortest": 0.8, "model": "deepseek-ai/DeepSeek-R1", "system": "b200_sxm"}
    other = {"model": "Qwen/Qwen3.5-397B-A17B", "system": "h200_sxm"}
    cases = (
        {},
        {"precision": "nvfp4", "concurrency": 16},
        {"system": "h200_sxm"},
        other,
        {"shortest": 1.0},
        {"engine": "vllm"},
    )
    rows = [row(**{**sglang, **more}) for more in cases]
    assert [first_chunk_tokens(each) for each in rows] == [30, 10, 10, 50, 0, 0]
    assert [steps_unseen(each) for each in rows] == [4.5, 14.5, 0, 0, 0, 0]


def test_a_burst_that_clients_counted_weighs_as_one_round_of_ten_and_else_nothing(monkeypatch):
    published = row(shortest=0.8, input_tokens=1000, output_tokens=100, concurrency=32)
    counted = predict(published)
    monkeypatch.setattr(board_predict, "is_inferencemax", lambda row: False)
    left_out = predict(published)
    # 32 prompts at once take as long as each of them waits on average for half the others.
    assert 1.1 * left_out.ttft_s < counted.ttft_s < 3 * left_out.ttft_s
    assert counted.tpot_s == pytest.approx(left_out.tpot_s, rel=0.1)


def test_a_first_chunk_that_comes_later_is_later_by_so_many_tokens_and_the_end_is_when_it_was(monkeypatch):
    published = row(engine="sglang", version="0.5.9", output_tokens=64, shortest=0.99, input_tokens=100)
    soon = predict(published)
    monkeypatch.setattr(board_predict, "first_chunk_tokens", lambda row: 10)
    late = predict(published)
    monkeypatch.setattr(board_predict, "steps_unseen", lambda row: 5)
    unseen = predict(published)
    assert late.ttft_s - soon.ttft_s == pytest.approx(10 * soon.tpot_s)
    assert late.ttft_s + 63 * late.tpot_s == pytest.approx(soon.ttft_s + 63 * soon.tpot_s, rel=5e-3)
    assert unseen.ttft_s - late.ttft_s == pytest.approx(5 * soon.tpot_s) and unseen.tpot_s == late.tpot_s


def test_what_a_row_cannot_be_is_said():
    assert settings_of(row(dp=2, ep=4, tp=2))["ep"] == 4
    for changes, said in (
        ({"system": "tpu"}, "GPU tpu"),
        ({"precision": "int3"}, "precision int3"),
        ({"dp": 2}, "data par"),
    ):
        with pytest.raises(ValueError, match=said):
            settings_of(row(**changes))


def test_errors_are_signed_and_ttft_counts_at_few_requests_only():
    found = errors_of(
        [Predicted(row(), 0.11, 0.009), Predicted(row(), 0.09, 0.012), Predicted(row(concurrency=64), 9.0, 0.010)]
    )
    assert (found.rows, found.ttft_rows) == (3, 2)
    assert (found.tpot_median, found.tpot_mean, found.tpot_bias) == pytest.approx((0.1, 0.1, 0.03333), abs=1e-4)
    assert (found.ttft_mean, found.ttft_bias) == pytest.approx((0.1, 0.0), abs=1e-9)
    assert set(grouped([Predicted(row(), 1, 1)], lambda one: kind_of(one.row.model))) == {"dense"}


def test_the_kind_of_a_model_is_what_its_layers_are():
    kinds = {
        "nvidia/Llama-3.1-8B-Instruct-FP8": "dense",
        "Qwen/Qwen3-235B-A22B-FP8": "experts",
        "Qwen/Qwen3.5-397B-A17B": "linear attention, experts",
        "moonshotai/Kimi-K2.5": "latent attention, experts",
        "zhipuai/GLM-5": "latent attention, experts",
        "openai/gpt-oss-120b": "experts, windows",
    }
    assert {model: kind_of(model) for model in kinds} == kinds


def test_an_error_that_grew_by_more_than_a_tenth_is_worse_and_noise_is_not():
    recorded = {
        "runs": {"a": {"e2e_mean": 0.05}, "b": {"e2e_mean": 0.0001}},
        "rows": {"every 1": {"g": {"tpot_mean": 0.1}}},
    }
    same = {"runs": {"a": {"e2e_mean": -0.0549}, "b": {"e2e_mean": 0.002}}, "rows": {"every 1": {"g": {"rows": 9.0}}}}
    assert scoreboard.grown(same, recorded) == []
    worse = {"runs": {"a": {"e2e_mean": 0.056}}, "rows": {"every 1": {"g": {"tpot_mean": -0.12}}}}
    assert scoreboard.grown(worse, recorded) == [
        "a: e2e_mean +5.60%, recorded +5.00%",
        "g: tpot_mean -12.00%, recorded +10.00%",
    ]


def test_rows_that_are_no_longer_predicted_are_worse_and_further_ones_are_not():
    recorded = {"runs": {}, "rows": {"every 1": {"g": {"rows": 9, "tpot_mean": 0.1}, "h": {"rows": 2}}}}
    more = {"g": {"rows": 10, "tpot_mean": 0.1}, "h": {"rows": 2}, "i": {"rows": 1}}
    assert scoreboard.grown({"runs": {}, "rows": {"every 1": more}}, recorded) == []
    fewer = {"g": {"rows": 8, "tpot_mean": 0.01}}
    assert scoreboard.grown({"runs": {}, "rows": {"every 1": fewer}}, recorded) == [
        "g: 8 rows predicted, recorded 9",
        "h: 0 rows predicted, recorded 2",
    ]


def test_predictions_that_are_kept_are_not_made_again_and_a_line_cut_short_is(tmp_path):
    rows = [row(id=name) for name in ("a", "b", "c")]
    first = Results(tmp_path, "roofline")
    first.add(rows[0], Predicted(rows[0], 0.1, 0.02, ("experts",)))
    first.add(rows[1], "vllm: precision int3")
    with (tmp_path / "roofline.jsonl").open("a") as file:
        file.write('{"id": "c", "ttft_s": 0.')
    again = Results(tmp_path, "roofline")
    assert again.missing(rows) == [rows[2]] and Results(tmp_path, "measured").missing(rows) == rows
    assert again.of(rows[:2]) == [Predicted(rows[0], 0.1, 0.02, ("experts",)), "vllm: precision int3"]
    again.add(rows[2], Predicted(rows[2], 0.1, 0.01))
    assert Results(tmp_path, "roofline").missing(rows) == []


def test_both_costs_stand_side_by_side_and_a_group_says_how_many_rows_had_tables():
    one, two = row(id="one"), row(id="two", system="tpu")
    half = {
        "roofline": [Predicted(one, 0.1, 0.012), Predicted(two, 0.1, 0.016)],
        "measured": [Predicted(one, 0.1, 0.011)],
    }
    lines = table(half, "engine")
    assert lines[2] == (
        "| vllm | 2 | 40.0% | 40.0% | +40.0% | 1 | 20.0% | 10.0% | 10.0% | +10.0% "
        "| 2 | 0.0% | +0.0% | 1 | 0.0% | 0.0% | +0.0% |"
    )
    by_gpu = table(half, "engine and GPU")
    assert by_gpu[3].startswith("| vllm, tpu | 1 | 60.0% | 60.0% | +60.0% | 0 |  |  |  |  | 1 |")


@pytest.mark.parametrize(("every", "on_the_page"), [(1, "1 of 1 rows predicted."), (2, "old")])
def test_a_slice_of_the_rows_is_kept_beside_all_and_does_not_take_their_place_on_the_page(
    tmp_path, monkeypatch, every, on_the_page
):
    page, kept = tmp_path / "page.md", tmp_path / "kept.json"
    parts = ("rows", "runs")
    page.write_text(
        "".join(f"<!-- scoreboard {part}: begin -->\nold\n<!-- scoreboard {part}: end -->\n" for part in parts)
    )
    kept.write_text('{"runs": {}, "rows": {"every 3": {"g": {"rows": 9}}}}')
    monkeypatch.setattr(scoreboard, "PAGE", page)
    monkeypatch.setattr(scoreboard, "RECORDED", kept)
    monkeypatch.setattr(scoreboard, "ACCURACY", kept.with_name("accuracy.json"))
    monkeypatch.setattr(truth, "run", lambda: ([], []))
    rows = written(tmp_path / "s.csv", {"isl": "64", "osl": "8", "batch_size": "2"})
    ran = CliRunner().invoke(_app(), ["--rows", str(rows), "--every", str(every), "--jobs", "1", "--write"])
    assert ran.exit_code == 0, ran.output
    assert page.read_text().splitlines()[1] == on_the_page
    assert page.read_text().splitlines()[-2] == "old", "no run could be scored"
    assert set(json.loads(kept.read_text())["rows"]) == {"every 3", f"every {every}", f"every {every}, measured"}


def test_tables_go_between_their_markers_and_nothing_else_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- scoreboard rows: begin -->\nold\n<!-- scoreboard rows: end -->\ntail\n")
    assert between_markers(page, {"rows": "new"}) == page.read_text().replace("old", "new")
    with pytest.raises(ValueError, match="no such place"):
        between_markers(page, {"runs": "new"})
