"""What an engine was started with, in settings of ours."""

from __future__ import annotations

from typing import Any

VLLM_PRESET = "vllm-0.19"
"""The preset that stands for vLLM, whatever the version: LLMServingSim's runs are of this one."""
ENGINE_SETTINGS = {
    "tensor_parallel_size": "tp",
    "pipeline_parallel_size": "pp",
    "data_parallel_size": "dp",
    "max_num_seqs": "max_running",
    "max_num_batched_tokens": "max_batch_tokens",
    "max_model_len": "max_context",
    "gpu_memory_utilization": "mem_fraction",
    "block_size": "page_size",
    "num_gpu_blocks_override": None,
    "enable_prefix_caching": None,
}
"""Arguments of the engine and the settings of ours that mean the same; None: handled by itself."""


def settings_of(kwargs: dict[str, Any], vllm_version: str | None = None) -> dict[str, Any]:
    """Settings of ours that mean what an engine was started with."""
    settings: dict[str, Any] = {"ignore_eos": True}
    if vllm_version:
        settings["engine"] = VLLM_PRESET
    for theirs, ours in ENGINE_SETTINGS.items():
        if ours is not None and kwargs.get(theirs) is not None:
            settings[ours] = kwargs[theirs]
    if kwargs.get("enable_prefix_caching") is False:
        settings["cache"] = "none"
    if kwargs.get("num_gpu_blocks_override") is not None:
        settings["kv_tokens"] = kwargs["num_gpu_blocks_override"] * settings.get("page_size", 16)
    if kwargs.get("enable_expert_parallel"):
        settings["ep"] = settings.get("tp", 1) * settings.get("dp", 1)
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(kwargs.get("dtype")))
    if dtype is not None:
        settings["dtype"] = dtype
    if str(kwargs.get("kv_cache_dtype", "auto")).startswith("fp8"):
        settings["kv_dtype"] = "fp8"
    return settings
