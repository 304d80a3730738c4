"""What a run is made of, from the command line or a TOML file, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.checkpoint.precision import BY_FLAG, DTYPE_BYTES
from backends.simulated.value_file import read_toml as read_toml  # for workbench.search, which sees no backend
from workbench.cluster.router import ROUTERS
from workbench.instance import LoopSpec
from workbench.scheduler.config import ConfigError, SchedulerConfig, acts_with, fits
from workbench.settings.cost_spec import identity, split
from workbench.settings.engines import load_engine

LOOP_NAMES = ("normal", "overlap", "pipeline")
MOST_INSTANCES = 10_000
"""Each has a KV pool of its own, so that a slip of the finger would fill the memory."""


@dataclass(frozen=True)
class RunSettings:
    """Every setting of a simulated run, under the names of the flags. None means: found from the others."""

    engine: str = "workbench"
    model: str = "meta-llama/Llama-3.1-8B"
    gpu: str = "h100"
    loop: str | None = None
    batching: str = "prefill-first"
    policy: str = "fcfs"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    router: str = acts_with("dp of 2 or more", "round_robin", lambda s, loop: s.dp > 1)
    page_size: int = 1
    cache: str = "radix"
    evict: str = "lru"
    chunk: int | None = 8192
    chunk_depth: int | None = None
    max_prefill_tokens: int = 16384
    max_batch_tokens: int = 2048
    max_running: int = 256
    micro_batches: int | None = acts_with("the pipeline loop", None, lambda s, loop: loop == "pipeline")
    mixed_chunk: bool = False
    mem_fraction: float = acts_with(
        "KV capacity found from memory, not kv_tokens", 0.9, lambda s, loop: s.kv_tokens is None
    )
    kv_tokens: int | None = None
    max_context: int | None = None
    dtype: str = "auto"
    kv_dtype: str = acts_with(
        "KV capacity found from memory, not kv_tokens, or costs that are not fitted",
        "bf16",
        lambda s, loop: s.kv_tokens is None or split(s.cost)[0] != "fitted",
    )
    cost: str = "roofline"
    cuda_graphs: bool = True
    ignore_eos: bool = False
    max_tokens: int | None = None
    """Of requests that have no bound of their own. None: the larger of 4,096 and what the trace says they write."""
    preempt_threshold: int | None = None
    conservativeness: float = 1.0
    max_passed_over: int | None = 64
    max_prefill_streak: int | None = None
    queue_timeout: float | None = None
    request_timeout: float | None = None
    overlap_prefills: bool = acts_with("the overlap loop", True, lambda s, loop: loop == "overlap")
    overlap: bool = acts_with("no loop that is named, and pp 1", True, lambda s, loop: s.loop is None and s.pp == 1)
    seed: int = 0
    requests: int | None = None
    rate: float | None = None
    speedup: float | None = None
    concurrency: int | None = None
    exact: bool = False
    """Take every step of the simulation, those too whose outcome is known beforehand; the record is the same."""
    slo_ttft: float | None = None
    slo_tpot: float | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep", "max_running"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is less than 1")
        if self.dp > MOST_INSTANCES:
            raise ConfigError(f"dp: {self.dp} is more than {MOST_INSTANCES} instances")
        for name in ("requests", "concurrency", "kv_tokens", "max_context", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is less than 1")
        for name in ("rate", "speedup", "slo_ttft", "slo_tpot"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}: {value} is not positive and finite")
        if not 0 < self.mem_fraction <= 1:
            raise ConfigError(f"mem_fraction: {self.mem_fraction} is not between 0 and 1")
        for name, allowed in (
            ("router", ROUTERS),
            ("dtype", ("auto", *DTYPE_BYTES)),
            ("kv_dtype", ("bf16", "fp16", "fp32", "fp8")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        split(self.cost)
        if self.concurrency is not None and (self.rate is not None or self.speedup is not None):
            raise ConfigError("concurrency: replaces arrivals, so rate and speedup have nothing to act on")
        if self.rate is not None and self.speedup is not None:
            raise ConfigError("speedup: has no effect beside rate, which replaces the trace's own")
        for loop in self.loops:
            if loop not in LOOP_NAMES:
                raise ConfigError(f"loop: {loop!r} is not one of {', '.join(LOOP_NAMES)}")
            if loop != "pipeline" and "pipeline" not in self.loops and self.pp > 1:
                raise ConfigError(f"loop: {loop!r} runs one stage, but pp is {self.pp}; use pipeline")
        if len(set(self.loops)) != len(self.loops):
            raise ConfigError(f"loop: {self.loop!r} names a loop twice")
        if self.loops == ["pipeline"] and self.pp == 1:
            raise ConfigError("loop: pipeline needs pp of 2 or more")
        if self.micro_batches is not None:
            if "pipeline" not in self.loops:
                raise ConfigError("micro_batches: only the pipeline loop has them")
            stages = self.layout("pipeline")[1]
            if self.micro_batches < stages:
                raise ConfigError(
                    f"micro_batches: {self.micro_batches} leaves some of the {stages} stages without work"
                )

    @property
    def loops(self) -> list[str]:
        """The loops to run: those named, else the one the settings imply."""
        if self.loop is not None:
            return [part.strip() for part in self.loop.split(",")]
        return ["pipeline" if self.pp > 1 else "overlap" if self.overlap else "normal"]

    def layout(self, loop: str) -> tuple[int, int]:
        """(tp, pp) that a loop runs with. All compared loops get the same GPUs: the pipeline loop cuts its ``tp * pp``
        GPUs into stages, the others use them as one tensor-parallel group. Asked for pipeline beside others without a
        ``pp``, two of the ``tp`` GPUs' ways become stages."""
        if loop == "pipeline":
            if self.pp > 1:
                return self.tp, self.pp
            return self.tp // 2, 2
        return self.tp * self.pp, 1

    def slots(self, loop: str) -> int:
        """Micro-batches that take turns under a loop."""
        stages = self.layout(loop)[1]
        return self.micro_batches or stages if loop == "pipeline" else stages


def loop_spec(settings: RunSettings, loop: str) -> LoopSpec:
    """A loop of the run, with what the settings ask of it."""
    return LoopSpec(loop, settings.overlap_prefills)


def scheduler_config(settings: RunSettings, kv_tokens: int, max_context: int, slots: int) -> SchedulerConfig:
    """The scheduler's part of the settings, for a KV pool of that many tokens. Raises ConfigError."""
    return SchedulerConfig(
        kv_tokens=kv_tokens,
        max_context=min(max_context, kv_tokens + 1),
        page_size=settings.page_size,
        max_running=settings.max_running,
        slots=slots,
        batching=settings.batching,  # type: ignore[arg-type]
        chunk=settings.chunk,
        chunk_depth=settings.chunk_depth,
        max_prefill_tokens=settings.max_prefill_tokens,
        mixed_chunk=settings.mixed_chunk,
        max_batch_tokens=settings.max_batch_tokens,
        cache=settings.cache,  # type: ignore[arg-type]
        evict=settings.evict,  # type: ignore[arg-type]
        policy=settings.policy,
        preempt_threshold=settings.preempt_threshold,
        conservativeness=settings.conservativeness,
        max_passed_over=settings.max_passed_over,
        max_prefill_streak=settings.max_prefill_streak,
        queue_timeout_s=settings.queue_timeout,
        request_timeout_s=settings.request_timeout,
        seed=settings.seed,
    )


def settings_from(
    config: Path | None, flags: dict[str, Any], like: Path | None = None, defaults: dict[str, Any] | None = None
) -> RunSettings:
    """Settings of a TOML file, with ``flags`` (those given; None otherwise) over them. Below both come the settings of the
    run record ``like``, the model and GPU that a profile is of, the engine's preset, and ``defaults``.

    Raises ConfigError for a file that cannot be read and for unknown or mistyped settings, RecordError for a bad record.
    """
    values = read_settings_file(config) if config is not None else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    if values.get("chunk") == 0:
        values["chunk"] = None
    if like is not None:
        values = {**_recorded(like), **values}
    preset = load_engine(values.get("engine", RunSettings.engine)).settings
    return RunSettings(**{**(defaults or {}), **preset, **_profiled(values), **values})


def read_settings_file(config: Path) -> dict[str, Any]:
    """What a TOML file of settings says, under the names of the fields. Raises ConfigError."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(RunSettings)}
    values = {name.replace("-", "_"): value for name, value in read_toml(config, ConfigError).items()}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{config}: {name}: no such setting{_nearest(name, list(fields))}")
        if not fits(value, fields[name]):
            raise ConfigError(f"{config}: {name}: {value!r} is not {fields[name].replace(' | None', '')}")
    return values


def _recorded(folder: Path) -> dict[str, Any]:
    """The settings of a run record."""
    from reports.record.run_record import read_meta
    from reports.record.schema import META_FILE

    return recorded_settings(read_meta(folder), str(folder / META_FILE))


def recorded_settings(meta: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings that the record with this meta.json was made with. Raises ConfigError, which names ``source``."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(RunSettings)}
    recorded = dict(meta.get("settings") or {})
    weights = meta.get("weights")
    if isinstance(weights, dict) and weights.get("said_by") != BY_FLAG:
        recorded["dtype"] = "auto"  # as the checkpoint says
    values = {name: value for name, value in recorded.items() if name in fields and value is not None}
    for name, value in values.items():
        if not fits(value, fields[name]):
            raise ConfigError(f"{source}: settings.{name}: {value!r} is not {fields[name].replace(' | None', '')}")
    if "chunk" in recorded and recorded["chunk"] is None:
        values["chunk"] = None  # prompts were computed whole
    if isinstance(meta.get("model"), str):
        values.setdefault("model", meta["model"])
    return values


def _profiled(values: dict[str, Any]) -> dict[str, str]:
    """The model and GPU that a profile is of, for what is not given."""
    if {"model", "gpu"} <= values.keys():
        return {}
    found = identity(values.get("cost", RunSettings.cost))
    return {name: value for name, value in found.items() if name in ("model", "gpu")}


def _nearest(name: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, 3)
    return f"; nearest: {', '.join(near)}" if near else ""
