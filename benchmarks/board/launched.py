"""How the runs behind published rows were made, by two benchmarks that publish how: InferenceMAX's clients and launch
scripts (SemiAnalysisAI/InferenceX), and what AIConfigurator's generator deploys (ai-dynamo/aiconfigurator).

InferenceMAX's rows are those whose lengths are drawn (``Row.shortest``). Its clients send ten requests for each place, all
places at once at the beginning, and report means over all of them (utils/bench_serving/benchmark_serving.py,
``--num-prompts`` of the scripts). What scripts say was read in the state of the rows' months: benchmarks/
70b_fp8_h100_slurm.sh, 70b_fp4_b200_docker.sh, gptoss_fp4_h100_slurm.sh, gptoss_fp4_b200_docker.sh, dsr1_fp8_b200.sh,
dsr1_fp8_h200.sh, and of single_node/ gptoss_fp4_b200.sh, dsr1_fp4_b200.sh, qwen3.5_fp8_b200.sh, qwen3.5_fp8_h200.sh,
qwen3.5_fp8_b300.sh, glm5_fp8_b200.sh and glm5_fp4_b200.sh.

Its disaggregated rows are of recipes (ishandhanani/srt-slurm, recipes/gb200-fp8, gb200-fp4, b200-fp8 and b200-fp4). SGLang
has KV in FP8 in all of them that were read, and a ``stream-interval`` of 10 to 50 that its clients do not see: 214 ms to the
first token where 30 tokens take 294.

AIConfigurator's own rows (``Row.generated``) have one length. Its benchmark (generator/config/backend_templates/benchmark/
bench_run.sh.j2) sends a multiple of the concurrency, all places at once at the beginning, and counts all; ten of each place
suit the fitting half. Its vLLM takes 512 requests at a time and max_batch_size + isl + 1500 tokens a step
(generator/rule_plugin/vllm.rule); its SGLang mixes chunks of prompts with decodes (sglang.rule), which rows of 0.5.1 show
not to have done yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.board.silicon import Row

ROUNDS = 10
"""Requests of a run, in multiples of the concurrency."""
GENERATED_SEQUENCES, GENERATED_ROOM = 512, 1500
"""``max_batch_size`` that AIConfigurator's generator gives vLLM, and what it adds to a prompt's length for a step."""
GENERATED_PROMPTS = 100
"""Prompts that aiperf takes turns with (its ``--num-dataset-entries``, which AIConfigurator's benchmark leaves as it is).
Only rows of dense models in FP8 under vLLM show it: 94 prompts of 2,000 tokens a second of Llama-3.1-8B on two H200s would
be three quarters of their peak, beside 9,400 decodes. These are of another image (ai-dynamo/vllm-runtime:0.8.0), and those
of the fitting half also show asynchronous scheduling: off by 8.5 % with it, and by 38.5 % without."""


@dataclass(frozen=True)
class Script:
    """What a launch script gives SGLang for a model (a part of its name) on a GPU, in one precision or in any."""

    model: str
    system: str
    precision: str
    chunk: int
    """``--chunked-prefill-size``."""
    polls: tuple[int, int] = (1, 1)
    """``--scheduler-recv-interval`` for fewer than 16 requests at a time, and for more: steps from one look at what has come
    to the next."""


SCRIPTS = (
    Script("DeepSeek", "b200_sxm", "nvfp4", 16384, (10, 30)),
    Script("DeepSeek", "b200_sxm", "", 32768, (10, 30)),
    Script("DeepSeek", "h200_sxm", "", 32768),
    Script("Qwen3.5", "b200_sxm", "", 32768, (10, 30)),
    Script("Qwen3.5", "b300_sxm", "fp8", 16384, (10, 10)),
    Script("Qwen3.5", "b300_sxm", "", 32768, (10, 30)),
    Script("Qwen3.5", "h200_sxm", "", 16384),
    Script("GLM-5", "b200_sxm", "nvfp4", 32768, (10, 10)),
    Script("GLM-5", "b200_sxm", "", 32768),
)
"""The first that fits holds."""
FIRST_CHUNK_TOKENS = {
    ("DeepSeek", "h200_sxm"): 10,
    ("DeepSeek", ""): 12,
    ("Qwen3.5", "b200_sxm"): 23,
    ("Qwen3.5", "b300_sxm"): 13,
    ("Qwen3.5", ""): 20,
    ("GLM-5", ""): 13,
}
"""Tokens after the first one at which SGLang's clients see the chunk that they count as the first, by a part of the model's
name and the GPU, or any: medians of the fitting half (benchmarks/first_chunk.py). Scripts ask for one every 10, 30 or 50
tokens (``--stream-interval``), and which of them a script asks for is not to be seen in its rows. The first that fits
holds."""
RECIPES = ("b200_sxm", "gb200", "gb300")
"""GPUs of the disaggregated rows of SGLang that recipes were read for; those of the GB300 are taken to be the GB200's."""


def is_inferencemax(row: Row) -> bool:
    """Tell whether a row is of InferenceMAX."""
    return row.shortest < 1


def told(row: Row) -> dict[str, Any]:
    """Settings that a row's launch script gave and that its columns do not hold."""
    if row.generated and row.version == "0.5.6.post2" and row.mode == "agg":
        return {"mixed_chunk": True}
    if row.generated and row.engine == "vllm" and row.mode == "agg":
        tokens = row.input_tokens + GENERATED_ROOM + GENERATED_SEQUENCES
        return {"max_batch_tokens": tokens, **({"loop": "overlap"} if distinct_prompts(row) else {})}
    if not is_inferencemax(row):
        return {}
    if row.mode == "disagg":
        return {"kv_dtype": "fp8"} if row.engine == "sglang" and row.system in RECIPES else {}
    if row.engine == "vllm":
        return _told_vllm(row)
    if row.engine != "sglang":
        return {}
    script = _script(row)
    fp8 = row.system in ("b200_sxm", "b300_sxm") or "Qwen3.5" in row.model
    return {
        **({"kv_dtype": "fp8"} if fp8 else {}),
        **({"chunk": script.chunk, "max_prefill_tokens": script.chunk} if script is not None else {}),
    }


def _told_vllm(row: Row) -> dict[str, Any]:
    """Scripts of 2025 turn asynchronous scheduling on, which later versions do by themselves."""
    dense, mxfp4 = "Llama-3.1-70B" in row.model, "gpt-oss" in row.model
    return {
        **({"loop": "overlap"} if row.version in ("", "0.11.2") else {}),
        **({"max_batch_tokens": 8192} if dense or mxfp4 else {}),
        **({"kv_dtype": "fp8"} if dense or (mxfp4 and row.system == "b200_sxm") else {}),
    }


def distinct_prompts(row: Row) -> int | None:
    """How many prompts clients took turns with; None: no prompt came twice, or nothing was kept of it."""
    dense = "Llama" in row.model or "Qwen3-32B" in row.model
    return GENERATED_PROMPTS if row.generated and row.engine == "vllm" and row.precision == "fp8" and dense else None


def first_chunk_tokens(row: Row) -> int:
    """How many tokens after the first one clients see the first chunk that they count."""
    if row.engine != "sglang" or row.mode != "agg" or not is_inferencemax(row):
        return 0
    of = (n for (model, system), n in FIRST_CHUNK_TOKENS.items() if model in row.model and system in ("", row.system))
    return next(of, 0)


def steps_unseen(row: Row) -> float:
    """Steps that a request waits on average before its scheduler looks at what has come."""
    script = _script(row)
    return (script.polls[row.concurrency >= 16] - 1) / 2 if script is not None else 0.0


def _script(row: Row) -> Script | None:
    if row.engine != "sglang" or row.mode == "disagg" or not is_inferencemax(row):
        return None
    of = (each for each in SCRIPTS if each.model in row.model and each.system == row.system)
    return next((each for each in of if each.precision in ("", row.precision)), None)
