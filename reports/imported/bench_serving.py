"""Results of ``vllm bench serve`` and of SGLang's ``bench_serving``: one object a run, its requests in lists side by side.

vLLM writes one object in a file (or appends, one a line), SGLang a line a run. Both have ``input_lens``, ``output_lens``,
``ttfts``, ``itls`` and ``errors`` where they were asked for details. When each request was sent (``start_times``) and how
long it took (``latencies``) only later versions of vLLM say. Times are seconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from reports.imported.client_run import ClientRow, ClientRun, closed_loop, failed
from reports.imported.engine_settings import settings_of
from reports.imported.place import LARGEST, Place
from reports.record.schema import FINISHED

VLLM, SGLANG = "vllm bench serve", "sglang bench_serving"
DETAILS = {VLLM: "--save-detailed", SGLANG: "--output-details"}
"""The option with which each writes what is per request."""
LISTS = ("input_lens", "output_lens", "ttfts", "itls")
_ARGUMENTS = (
    "date",
    "backend",
    "label",
    "tag",
    "dataset_name",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "ramp_up_strategy",
    "random_input_len",
    "random_output_len",
    "random_range_ratio",
)
"""Fields of a result that say what the clients were told to do."""
_SERVER_SETTINGS = {
    "tp_size": "tp",
    "pp_size": "pp",
    "dp_size": "dp",
    "max_running_requests": "max_running",
    "chunked_prefill_size": "chunk",
    "page_size": "page_size",
    "mem_fraction_static": "mem_fraction",
    "max_total_num_tokens": "kv_tokens",
}
"""What SGLang's server says of itself, and the settings of ours that mean the same."""


def is_result(values: Mapping[str, Any]) -> bool:
    """Tell whether an object is a result of either tool, with details or without."""
    return any(name in values for name in LISTS) or {"completed", "duration", "total_input_tokens"} <= values.keys()


def describe(run: Place) -> str:
    """The load of a run, to tell it from others in the file."""
    said = {name: run.get(name) for name in ("request_rate", "max_concurrency")}
    return ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)


def read_run(run: Place) -> ClientRun:
    """Read one result. Raises RecordError, with the field, for what is missing or no number."""
    tool = VLLM if run.get("model_id") is not None or run.get("endpoint_type") is not None else SGLANG
    _check_details(run, tool)
    count = len(run.items("input_lens"))
    input_lens, output_lens, ttfts, itls = (_list(run, name, count) for name in LISTS)
    start_times, latencies, errors, cached = (
        _list(run, name, count) if run.get(name) is not None else None
        for name in ("start_times", "latencies", "errors", "cached_tokens")
    )
    ttft_s = run.numbers("ttfts", ttfts)
    gaps_s = [run.numbers(f"itls[{i}]", gaps) for i, gaps in enumerate(itls)]
    tokens_s = ttft_s + np.array([gaps.sum() for gaps in gaps_s])
    latency_s = tokens_s if latencies is None else run.numbers("latencies", latencies)
    output = [run.checked_whole(f"output_lens[{i}]", value) for i, value in enumerate(output_lens)]
    said = [str(error or "") for error in errors or [""] * count]
    notes: list[str] = []
    sent_s = run.numbers("start_times", start_times) if start_times is not None else _sent_s(run, latency_s, notes)
    rows = []
    for i in range(count):
        lost = bool(said[i]) or output[i] == 0
        came_s = sent_s[i] + ttft_s[i] if ttft_s[i] > 0 else math.nan
        if not lost and latency_s[i] < ttft_s[i]:
            raise run.error(f"latencies[{i}]", f"{latency_s[i]:g} is less than the time to its first token")
        streamed = output[i] < 2 or len(gaps_s[i]) > 0
        rows.append(
            ClientRow(
                request_id=f"r{i + 1}",
                sent_s=sent_s[i],
                first_token_s=came_s if streamed or lost else math.nan,
                # How long a request took that failed before its first token, no version says.
                finish_s=sent_s[i] + max(latency_s[i], tokens_s[i]) if not lost or ttft_s[i] > 0 else math.nan,
                input_tokens=run.checked_whole(f"input_lens[{i}]", input_lens[i]),
                output_tokens=output[i],
                status=failed(said[i], came_s) if lost else FINISHED,
                error=said[i] or "no token was seen, and no error",
                cached_tokens=run.checked_whole(f"cached_tokens[{i}]", cached[i] or 0) if cached else 0,
            )
        )
    server = run.inner_or_empty("server_info")
    return ClientRun(
        path=run.path,
        tool=tool,
        rows=rows,
        gaps_s=np.concatenate([np.empty(0), *gaps_s]),
        model=run.text("model_id") or server.text("served_model_name") or server.text("model_path"),
        settings=_settings(run),
        arguments={name: _plain(run.get(name)) for name in _ARGUMENTS if run.get(name) is not None},
        notes=notes,
    )


def _check_details(run: Place, tool: str) -> None:
    missing = [name for name in LISTS if run.get(name) is None]
    if "input_lens" not in missing and "ttfts" in missing and "output_lens" in missing:
        raise run.error(
            "output_lens", f"missing: the result of a {tool} that asked for no tokens, such as of embeddings"
        )
    if len(missing) == len(LISTS):
        raise run.error(
            "", f"holds aggregates only, no {', '.join(LISTS)}: {tool} writes what is per request with {DETAILS[tool]}"
        )
    if missing:
        raise run.error(missing[0], "missing")


def _list(run: Place, name: str, count: int) -> list[Any]:
    values = run.items(name)
    if len(values) != count:
        raise run.error(name, f"has {len(values)} values, input_lens has {count}")
    return values


def _sent_s(run: Place, latency_s: np.ndarray, notes: list[str]) -> np.ndarray:
    """When requests were sent, from what the clients were told: the file does not say.

    Raises RecordError where that does not say it either.
    """
    rate, places = run.get("request_rate"), run.get("max_concurrency")
    at_once = rate == "inf" or rate == math.inf
    if run.get("ramp_up_strategy") is not None or not (at_once or _is_number(rate)):
        told = "missing" if rate is None else "a ramp" if _is_number(rate) or at_once else repr(rate)
        raise run.error("start_times", f"missing, and request_rate ({told}) does not say when requests were sent")
    if places is not None:
        places = run.checked_whole("max_concurrency", places)
    wanted_s = np.zeros(len(latency_s)) if at_once else np.arange(len(latency_s)) / rate
    if not at_once:
        notes.append(
            f"the file does not say when requests were sent: they stand {1 / rate:g} s apart, the mean of --request-rate "
            f"{rate:g}; each request's latencies are as measured, throughput over time and the duration are not"
        )
    elif places:
        notes.append(
            f"the file does not say when requests were sent: each where the earliest of --max-concurrency {places} places "
            "was free again; each request's latencies are as measured"
        )
    else:
        notes.append("the file does not say when requests were sent: all at once, as --request-rate inf has it")
    if not places:
        return wanted_s
    busy: list[float] = []
    sent_s = []
    for due_s, took_s in zip(wanted_s.tolist(), latency_s.tolist(), strict=True):
        free_s = heapq.heappop(busy) if len(busy) == places else 0.0
        sent_s.append(max(due_s, free_s))
        heapq.heappush(busy, sent_s[-1] + took_s)
    return np.array(sent_s)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST


def _settings(run: Place) -> dict[str, Any]:
    """Settings of ours: the load, where it was a closed loop, and what SGLang's server said of itself."""
    server = run.inner_or_empty("server_info")
    kwargs = {name: server.get(name) for name in ("dtype", "kv_cache_dtype")}
    if server.get("disable_radix_cache") is True:
        kwargs["enable_prefix_caching"] = False
    settings = settings_of(kwargs)
    for theirs, ours in _SERVER_SETTINGS.items():
        value = server.get(theirs)
        if _is_number(value) and (ours == "mem_fraction" or value == int(value)):
            settings[ours] = value
    if server.get("version") is not None:
        settings["engine"] = "sglang"
    if run.get("request_rate") in ("inf", math.inf):
        settings |= closed_loop(run.get("max_concurrency"))
    return settings


def _plain(value: Any) -> Any:
    """What JSON has no number for, in words."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
