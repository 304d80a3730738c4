"""Results of benchmark tools as their writers lay them out, small enough to check by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

T0_S = 1_790_000_000.0
"""When the runs began, for tools that tell the date."""


def vllm() -> dict[str, Any]:
    """Of ``vllm bench serve --save-result --save-detailed`` (0.33): four answers, of which the third was refused."""
    return {
        "date": "20261130-120000",
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": "meta-llama/Llama-3.1-8B",
        "tokenizer_id": "meta-llama/Llama-3.1-8B",
        "num_prompts": 4,
        "request_rate": 2.0,
        "burstiness": 1.0,
        "max_concurrency": None,
        "duration": 3.0,
        "completed": 3,
        "failed": 1,
        "total_input_tokens": 60,
        "total_output_tokens": 8,
        "mean_ttft_ms": 200.0,
        "input_lens": [10, 20, 15, 30],
        "output_lens": [4, 1, 0, 3],
        "ttfts": [0.25, 0.125, 0.0, 0.25],
        "itls": [[0.125, 0.125, 0.25], [], [], [0.5]],
        "latencies": [0.75, 0.125, 0.0, 0.75],
        "start_times": [5000.0, 5000.5, 5000.75, 5001.5],
        "queue_times": [0.0, 0.0, 0.0, 0.0],
        "generated_texts": ["a b c d", "e", "", "f g h"],
        "errors": ["", "", "Service Unavailable", ""],
    }


def sglang() -> dict[str, Any]:
    """A line of SGLang's ``bench_serving --output-details``: closed loop of two, and no word of when anything was sent."""
    return {
        "tag": None,
        "backend": "sglang",
        "dataset_name": "random",
        "request_rate": float("inf"),
        "max_concurrency": 2,
        "random_input_len": 64,
        "random_output_len": 4,
        "server_info": {
            "model_path": "Qwen/Qwen3-32B",
            "version": "0.5.23",
            "tp_size": 2,
            "page_size": 1,
            "chunked_prefill_size": 8192,
            "max_running_requests": None,
            "mem_fraction_static": 0.85,
            "dtype": "bfloat16",
            "disable_radix_cache": True,
        },
        "duration": 2.0,
        "completed": 4,
        "total_input_tokens": 40,
        "total_output_tokens": 9,
        "input_lens": [10, 10, 10, 10],
        "output_lens": [3, 2, 2, 2],
        "ttfts": [0.5, 0.25, 0.25, 0.25],
        "itls": [[0.25, 0.25], [0.25], [0.25], [0.5]],
        "generated_texts": ["a", "b", "c", "d"],
        "errors": ["", "", "", ""],
    }


def guidellm() -> dict[str, Any]:
    """A report of guidellm 0.8: two finished, one that failed, one cut off, and one never sent."""

    def request(number: int, start: float | None, first: float | None, last: float | None, end: float | None) -> dict:
        moments = {
            "request_start": start,
            "first_token_iteration": first,
            "last_token_iteration": last,
            "request_end": end,
        }
        timings = {name: None if value is None else T0_S + value for name, value in moments.items()}
        info = {
            "request_id": f"q{number}",
            "conversation_id": f"c{number}",
            "turn_index": 0,
            "timings": timings,
            "error": None,
        }
        return {
            "type_": "generative_request_stats",
            "request_id": f"q{number}",
            "info": info,
            "prompt_tokens": 100 + number,
            "output_tokens": 5,
            "cached_tokens": 16,
        }

    lost = request(3, 0.5, None, None, 0.75)
    lost["info"]["error"] = "503: no room"
    lost["prompt_tokens"] = lost["output_tokens"] = lost["cached_tokens"] = None
    waiting = request(5, None, None, None, None)
    benchmark = {
        "type_": "generative_benchmark",
        "config": {
            "strategy": {"type_": "concurrent", "streams": 2, "max_concurrency": 2},
            "backend": {"kind": "openai_http", "model": "llama-3.1-8b"},
        },
        "metrics": {"request_totals": {"successful": 2, "errored": 1, "incomplete": 2, "total": 5}},
        "requests": {
            "successful": [request(2, 0.25, 0.5, 1.0, 1.125), request(1, 0.0, 0.125, 0.625, 0.75)],
            "errored": [lost],
            "incomplete": [request(4, 0.75, 0.875, 1.0, None), waiting],
            "total": None,
        },
    }
    return {"metadata": {"version": 2, "guidellm_version": "0.8.1"}, "config": {}, "benchmarks": [benchmark]}


def guidellm_before_0_4() -> dict[str, Any]:
    """The same of guidellm 0.2: times in the request itself, -1 where there is none."""

    def request(number: int, start: float, first: float | None, last: float | None, end: float) -> dict[str, Any]:
        return {
            "request_id": f"q{number}",
            "request_type": "text_completions",
            "scheduler_info": {"requested": True, "completed": True},
            "prompt_tokens": 100 + number,
            "output_tokens": 5,
            "start_time": T0_S + start,
            "end_time": T0_S + end,
            "first_token_time": -1.0 if first is None else T0_S + first,
            "last_token_time": -1.0 if last is None else T0_S + last,
        }

    lost = request(3, 0.5, None, None, 0.75) | {"error": "503: no room", "first_token_time": None}
    benchmark = {
        "args": {"strategy": {"type_": "constant", "rate": 4.0}},
        "worker": {"backend_model": "llama-3.1-8b"},
        "request_totals": {"successful": 20, "errored": 1, "incomplete": 0, "total": 21},
        "requests": {
            "successful": [request(1, 0.0, 0.125, 0.625, 0.75), request(2, 0.25, None, None, 1.125)],
            "errored": [lost],
            "incomplete": [],
        },
    }
    return {"args": {"sampling": 2}, "benchmarks": [benchmark]}


def aiperf() -> list[dict[str, Any]]:
    """Lines of aiperf's profile_export.jsonl: one that warms up, two finished, one cancelled, one refused."""
    begin_ns = int(T0_S) * 1_000_000_000

    def record(number: int, sent_ms: int, end_ms: int, **metrics: tuple[Any, str]) -> dict[str, Any]:
        return {
            "metadata": {
                "session_num": number,
                "x_request_id": f"x{number}",
                "x_correlation_id": f"s{number}",
                "turn_index": 0,
                "request_start_ns": begin_ns + sent_ms * 1_000_000 + 1,
                "request_end_ns": begin_ns + end_ms * 1_000_000,
                "worker_id": "worker_1",
                "benchmark_phase": "profiling",
                "was_cancelled": False,
            },
            "metrics": {name: {"value": value, "unit": unit} for name, (value, unit) in metrics.items()},
            "error": None,
        }

    def answer(number: int, sent_ms: int, ttft_ms: float, latency_ms: float) -> dict[str, Any]:
        return record(
            number,
            sent_ms,
            sent_ms + 1000,
            time_to_first_token=(ttft_ms, "ms"),
            request_latency=(latency_ms, "ms"),
            inter_chunk_latency=([(latency_ms - ttft_ms) / 2] * 2, "ms"),
            input_sequence_length=(64, "tokens"),
            output_sequence_length=(3, "tokens"),
            usage_prompt_cache_read_tokens=(32, "tokens"),
        )

    warm = answer(0, -5000, 100.0, 200.0)
    warm["metadata"]["benchmark_phase"] = "warmup"
    cancelled = record(3, 500, 750)
    cancelled["metadata"]["was_cancelled"] = True
    refused = record(4, 750, 875) | {"error": {"code": 503, "type": "Service Unavailable", "message": "no room"}}
    return [warm, answer(1, 0, 125.0, 375.0), cancelled, answer(2, 250, 250.0, 500.0), refused]


def aiperf_summary() -> dict[str, Any]:
    """What aiperf writes of the run as a whole."""
    return {
        "schema_version": "1.4",
        "aiperf_version": "0.13.0",
        "request_latency": {"unit": "ms", "avg": 437.5},
        "input_config": {
            "models": {"items": [{"name": "llama-3.1-8b"}]},
            "phases": [{"kind": "profiling", "type": "concurrency", "requests": 4, "concurrency": 2}],
        },
    }


def written(path: Path, *objects: Any) -> Path:
    """A file that holds the objects, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))
    return path


def written_aiperf(folder: Path) -> Path:
    """The folder that aiperf leaves."""
    written(folder / "profile_export.jsonl", *aiperf())
    written(folder / "profile_export_aiperf.json", aiperf_summary())
    return folder
