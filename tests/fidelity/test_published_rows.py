"""Published rows as they are read, and the run that each is predicted by."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from backends.simulated.catalogue.model_specs import load_model
from benchmarks.board import predict as board_predict
from benchmarks.board.errors import layout_of
from benchmarks.board.launched import FIRST_CHUNK_TOKENS, distinct_prompts, first_chunk_tokens, steps_unseen
from benchmarks.board.predict import Predicted, nearest_preset, predict, settings_of
from benchmarks.board.silicon import (
    CONFIGURATION,
    INSTANCES_UNKNOWN,
    PUBLISHED_AGAIN,
    Side,
    disagreement,
    find_rows,
    read_rows,
    recounted,
)
from tests.fidelity.rows import row, written

ROOT = Path(__file__).resolve().parents[2]


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
    assert nearest_preset("vllm", "") == "vllm-0.33.0"
    assert nearest_preset("vllm", "nightly-2026.04.02") == "vllm-0.33.0"
    assert nearest_preset("trtllm", "1.0.0") is None


def test_a_row_without_a_version_is_taken_for_the_one_of_its_engine_that_was_measured_nearest(tmp_path):
    def named(version: str, source: str, engine: str = "vllm") -> dict[str, str]:
        return {"backend": engine, "backend_version": version, "silicon_data_source": f"{source}; model=Llama-3.1-8B"}

    path = written(
        tmp_path / "s.csv",
        named("0.14.0", "measured=2026-01-20"),
        named("0.19.0", "measured=2026-04-03T02:00:00Z"),
        named("0.24.0", "measured=2026-05-01", "sglang"),
        named("", "measured=2025-10-29"),
        named("nightly-20260216-a1.2", "measured=2026-03-30"),
        named("", "of no date"),
        named("1.0", "measured=2025-11-01", "trtllm"),
    )
    rows, _ = read_rows(path)
    assert [each.taken_for for each in rows] == ["0.14.0", "0.19.0", "0.24.0", "0.14.0", "0.19.0", "0.19.0", "1.0"]
    assert [settings_of(each).get("engine") for each in rows[3:6]] == ["vllm-0.14.0", "vllm-0.19.0", "vllm-0.19.0"]


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
    any_gpu, h200, other_model = (
        FIRST_CHUNK_TOKENS[of] for of in (("DeepSeek", ""), ("DeepSeek", "h200_sxm"), ("Qwen3.5", ""))
    )
    assert [first_chunk_tokens(each) for each in rows] == [any_gpu, any_gpu, h200, other_model, 0, 0]
    assert [steps_unseen(each) for each in rows] == [4.5, 14.5, 0, 0, 0, 0]
    assert [settings_of(each).get("chunk") for each in rows] == [32768, 16384, 32768, 16384, None, None]
    mxfp4 = {"shortest": 0.8, "model": "openai/gpt-oss-120b", "precision": "nvfp4"}
    late, early = row(**mxfp4, system="b200_sxm"), row(**mxfp4, version="", taken_for="0.11.2")
    assert settings_of(late)["kv_dtype"] == "fp8" and "loop" not in settings_of(late)
    assert settings_of(early)["loop"] == "overlap" and "kv_dtype" not in settings_of(early)


def test_what_a_generator_deploys_is_taken_for_its_rows_alone():
    made = {"generated": True, "version": "0.12.0", "input_tokens": 1024}
    assert settings_of(row(**made))["max_batch_tokens"] == 1024 + 1500 + 512
    assert "max_batch_tokens" not in settings_of(row(version="0.12.0"))
    assert "loop" not in settings_of(row(**made)) and distinct_prompts(row(**made)) is None
    cached = row(**made, precision="fp8")
    assert settings_of(cached)["loop"] == "overlap" and distinct_prompts(cached) == 100
    assert settings_of(row(**{**made, "engine": "sglang", "version": "0.5.6.post2"}))["mixed_chunk"] is True
    assert "mixed_chunk" not in settings_of(row(**{**made, "engine": "sglang", "version": "0.5.1.post1"}))


def test_prompts_that_clients_take_turns_with_are_found_in_the_prefix_cache(monkeypatch):
    published = row(input_tokens=2000, output_tokens=16)
    once = predict(published)
    monkeypatch.setattr(board_predict, "distinct_prompts", lambda row: 4)
    again = predict(published)
    assert again.ttft_s < 0.5 * once.ttft_s


def test_a_burst_that_clients_counted_weighs_as_one_round_of_ten_and_else_nothing(monkeypatch):
    published = row(shortest=0.8, input_tokens=1000, output_tokens=100, concurrency=32)
    counted = predict(published)
    monkeypatch.setattr(board_predict, "is_inferencemax", lambda row: False)
    left_out = predict(published)
    # 32 prompts at once take as long as each of them waits on average for half the others.
    assert 1.1 * left_out.ttft_s < counted.ttft_s < 3 * left_out.ttft_s
    # And the last round runs emptier and emptier.
    assert 0.9 * left_out.tpot_s < counted.tpot_s < left_out.tpot_s


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
