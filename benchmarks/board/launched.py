"""How the runs behind most published rows were made: InferenceMAX's clients and launch scripts (SemiAnalysisAI/InferenceX).

Its rows are those whose lengths are drawn (``Row.shortest``). Its clients send ten requests for each place, all places at
once at the beginning, and report means over all of them (utils/bench_serving/benchmark_serving.py, ``--num-prompts`` of the
scripts). What scripts say was read in the state of the rows' months: benchmarks/70b_fp8_h100_slurm.sh, dsr1_fp8_b200.sh,
dsr1_fp8_h200.sh, and of single_node/ dsr1_fp4_b200.sh, qwen3.5_fp8_b200.sh, qwen3.5_fp8_h200.sh and
glm5_fp8_b200.sh.

Its disaggregated rows are of recipes (ishandhanani/srt-slurm, recipes/gb200-fp8, gb200-fp4, b200-fp8 and b200-fp4). SGLang
has KV in FP8 in all of them that were read, and a ``stream-interval`` of 10 to 50 that its clients do not see: 214 ms to the
first token where 30 tokens take 294.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.board.silicon import Row

ROUNDS = 10
"""Requests of a run, in multiples of the concurrency."""


@dataclass(frozen=True)
class Script:
    """What a launch script gives SGLang for a model (a part of its name) on a GPU, in one precision or in any."""

    model: str
    system: str
    precision: str
    stream_interval: int
    """``--stream-interval``: what clients take for the first token comes so many tokens later. On the fitting half TTFT is 9
    to 12 TPOT above that of the first token where it is 10 and nothing else delays it."""
    polls: tuple[int, int] = (1, 1)
    """``--scheduler-recv-interval`` for fewer than 16 requests at a time, and for more: steps from one look at what has come
    to the next."""


SCRIPTS = (
    Script("DeepSeek", "b200_sxm", "nvfp4", 10, (10, 30)),
    Script("DeepSeek", "b200_sxm", "", 30, (10, 30)),
    Script("DeepSeek", "h200_sxm", "", 10),
    Script("Qwen3.5", "b200_sxm", "", 30, (10, 30)),
    Script("Qwen3.5", "b300_sxm", "", 30, (10, 30)),  # no script of those months was at hand: the B200's
    Script("Qwen3.5", "h200_sxm", "", 50),
    Script("GLM-5", "b200_sxm", "", 30),
)
"""The first that fits holds."""
RECIPES = ("b200_sxm", "gb200", "gb300")
"""GPUs of the disaggregated rows of SGLang that recipes were read for; those of the GB300 are taken to be the GB200's."""


def is_inferencemax(row: Row) -> bool:
    """Tell whether a row is of InferenceMAX."""
    return row.shortest < 1


def told(row: Row) -> dict[str, Any]:
    """Settings that a row's launch script gave and that its columns do not hold."""
    if not is_inferencemax(row):
        return {}
    if row.mode == "disagg":
        return {"kv_dtype": "fp8"} if row.engine == "sglang" and row.system in RECIPES else {}
    dense = row.engine == "vllm" and "Llama-3.1-70B" in row.model
    sglang = row.engine == "sglang" and (row.system in ("b200_sxm", "b300_sxm") or "Qwen3.5" in row.model)
    return {"kv_dtype": "fp8"} if dense or sglang else {}


def first_chunk_tokens(row: Row) -> int:
    """How many tokens after the first one clients see the first chunk that they count."""
    script = _script(row)
    return script.stream_interval if script is not None else 0


def steps_unseen(row: Row) -> float:
    """Steps that a request waits on average before its scheduler looks at what has come."""
    script = _script(row)
    return (script.polls[row.concurrency >= 16] - 1) / 2 if script is not None else 0.0


def _script(row: Row) -> Script | None:
    if row.engine != "sglang" or row.mode == "disagg" or not is_inferencemax(row):
        return None
    of = (each for each in SCRIPTS if each.model in row.model and each.system == row.system)
    return next((each for each in of if each.precision in ("", row.precision)), None)
