"""How the runs behind most published rows were made: InferenceMAX's clients and launch scripts (SemiAnalysisAI/InferenceX).

Its rows are those whose lengths are drawn (``Row.shortest``). Its clients send ten requests for each place, all places at
once at the beginning, and report means over all of them (utils/bench_serving/benchmark_serving.py, ``--num-prompts`` of the
scripts). What scripts say was read in the state of the rows' months: benchmarks/70b_fp8_h100_slurm.sh, dsr1_fp8_b200.sh,
dsr1_fp8_h200.sh, single_node/qwen3.5_fp8_b200.sh, qwen3.5_fp8_h200.sh and glm5_fp8_b200.sh.
"""

from __future__ import annotations

from typing import Any

from benchmarks.board.silicon import Row

ROUNDS = 10
"""Requests of a run, in multiples of the concurrency."""
STREAM_INTERVALS = {"b200_sxm": 30, "h200_sxm": 10}
"""``--stream-interval`` of SGLang by GPU. What its clients take for the first token comes so many tokens later: on the
fitting half TTFT is 9 to 12 TPOT on the one GPU, and 14 to 56 on the other, above that of the first token."""
SLOWEST_STREAM = ("Qwen3.5", "h200_sxm", 50)
"""Part of the model's name, GPU and interval of the one script that says otherwise."""


def is_inferencemax(row: Row) -> bool:
    """Tell whether a row is of InferenceMAX."""
    return row.shortest < 1


def told(row: Row) -> dict[str, Any]:
    """Settings that a row's launch script gave and that its columns do not hold."""
    if not is_inferencemax(row):
        return {}
    dense = row.engine == "vllm" and "Llama-3.1-70B" in row.model
    sglang = row.engine == "sglang" and (row.system == "b200_sxm" or "Qwen3.5" in row.model)
    return {"kv_dtype": "fp8"} if dense or sglang else {}


def first_chunk_tokens(row: Row) -> int:
    """How many tokens after the first one clients see the first chunk that they count."""
    if row.engine != "sglang" or not is_inferencemax(row):
        return 0
    model, system, interval = SLOWEST_STREAM
    return interval if model in row.model and row.system == system else STREAM_INTERVALS.get(row.system, 0)
