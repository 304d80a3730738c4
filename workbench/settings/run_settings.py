"""What a run is made of, from the command line or a TOML file, checked and resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.checkpoint.precision import BY_FLAG, Precision, named
from backends.simulated.cost import CostModel
from backends.simulated.cost.build import build_cost, split
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.roofline import default_capture_sizes
from backends.simulated.hardware import GPU, load_gpu
from backends.simulated.host import HostModel
from backends.simulated.kv_memory import kv_capacity
from backends.simulated.models import DTYPE_BYTES, ModelSpec, load_model
from backends.simulated.value_file import read_toml as read_toml  # for workbench.search, which sees no backend
from workbench.cluster.router import ROUTERS
from workbench.scheduler.config import ConfigError, SchedulerConfig, acts_with, fits, largest_step
from workbench.scheduler.policy import load_policy
from workbench.settings.engines import Engine, load_engine

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


@dataclass(frozen=True)
class Instance:
    """What one instance of a run is built from."""

    model: ModelSpec
    gpu: GPU
    loop: str
    tp: int
    pp: int
    scheduler: SchedulerConfig
    capture_sizes: list[int]
    mixed_capture_sizes: list[int]
    host: HostModel
    cost: CostModel
    lock_step: bool
    """Data-parallel instances share their experts and take every step together."""
    kv_budget: dict[str, Any]
    weights: Precision


def resolve(settings: RunSettings, loop: str) -> Instance:
    """Look up model and GPU, find the KV capacity, and check that the settings go together.

    Raises ConfigError, CatalogueError, ModelDoesNotFit, CostError or ProfileError, each with one line.
    """
    model, gpu = load_model(settings.model), load_gpu(settings.gpu)
    weights = _weights(settings, model)
    tp, pp = settings.layout(loop)
    if loop == "pipeline" and tp < 1:
        raise ConfigError(
            "loop: pipeline beside other loops needs 2 GPUs for the same comparison: give --tp 2 or --pp 2"
        )
    if pp > model.layers:
        raise ConfigError(f"pp: {pp} stages for the {model.layers} layers of {model.name}")
    if (unsplit := model.unsplit(tp)) is not None:
        raise ConfigError(f"tp: {tp} does not divide the {unsplit} of {model.name}")
    if settings.ep > 1 and (not model.experts or model.experts % settings.ep):
        raise ConfigError(f"ep: {settings.ep} does not divide the {model.experts} experts of {model.name}")
    lock_step = settings.ep > tp
    if settings.ep > 1 and settings.ep not in (tp, tp * settings.dp):
        raise ConfigError(
            f"ep: {settings.ep} must equal tp ({tp}) or tp * dp ({tp * settings.dp}): experts are spread over the GPUs of "
            "an instance or of all"
        )
    if lock_step and pp > 1:
        raise ConfigError("ep: experts shared between instances need pp 1")
    max_context = settings.max_context or model.max_context
    load_policy(settings.policy)
    budget: dict[str, Any] = {}
    kv_tokens = settings.kv_tokens
    if kv_tokens is None:
        found = kv_capacity(
            model,
            gpu,
            dtype=weights,
            kv_dtype=settings.kv_dtype,
            tp=tp,
            pp=pp,
            ep=settings.ep,
            mem_fraction=settings.mem_fraction,
            max_prefill_tokens=largest_step(settings),
            max_running=settings.max_running,
        )
        budget = dataclasses.asdict(found)
        kv_tokens = found.kv_tokens
    scheduler = scheduler_config(settings, kv_tokens, max_context, settings.slots(loop))
    engine = load_engine(settings.engine)
    sizes, mixed_sizes = _captured(settings, engine, scheduler)
    phases: dict[str, Any] = {**engine.host, **_measured_host(settings)}
    host = HostModel(**phases, graph_max_batch=sizes[-1] if sizes else 0, layers=-(-model.layers // pp))
    want = CostRequest(
        model,
        gpu,
        weights,
        settings.kv_dtype,
        tp,
        pp,
        settings.ep,
        sizes,
        mixed_sizes,
        engine.gpu_step_s,
        engine.gpu_request_s(max_context, settings.page_size, gpu.host_bandwidth),
    )
    cost = build_cost(settings.cost, want)
    if lock_step and not hasattr(cost, "group_forward"):
        raise ConfigError(
            f"cost: {settings.cost!r} has no times of steps that instances take together (ep {settings.ep})"
        )
    return Instance(model, gpu, loop, tp, pp, scheduler, sizes, mixed_sizes, host, cost, lock_step, budget, weights)


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


def _measured_host(settings: RunSettings) -> dict[str, float]:
    """The CPU phases that came with the cost model, if any did."""
    kind, path = split(settings.cost)
    if path is None:
        return {}
    if kind == "fitted":
        from backends.simulated.cost.models.fitted import read_fitted

        host: dict[str, float] = read_fitted(path)["host"]
    else:
        from backends.simulated.cost.tables.profiles import host_phases

        host = dict(host_phases(path))
    known = {field.name for field in dataclasses.fields(HostModel) if field.init}
    for name in host:
        if name not in known:
            raise ConfigError(f"{path}: host.{name}: no such CPU phase")
    return host


def _captured(settings: RunSettings, engine: Engine, scheduler: SchedulerConfig) -> tuple[list[int], list[int]]:
    """Sizes of captured graphs: of decode batches, and of steps with prompt tokens."""
    if not settings.cuda_graphs:
        return [], []
    running = scheduler.max_running_per_slot
    decode = engine.capture_sizes(running)
    return decode if decode is not None else default_capture_sizes(running), engine.mixed_capture_sizes(running)


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
    found = _identity(values.get("cost", RunSettings.cost))
    return {name: value for name, value in found.items() if name in ("model", "gpu")}


def _weights(settings: RunSettings, model: ModelSpec) -> Precision:
    """What the weights are held in: what ``dtype`` says, else a profile's, else the checkpoint's."""
    profiled = _identity(settings.cost).get("dtype") if settings.dtype == "auto" else None
    return named(profiled, f"--cost {settings.cost}") if profiled else model.precision(settings.dtype)


def _identity(cost: str) -> dict[str, str]:
    """The model, GPU and dtype that a profile is of."""
    kind, path = split(cost)
    if path is None:
        return {}
    from backends.simulated.cost.tables.profiles import identity

    return identity(path, kind)


def _nearest(name: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, 3)
    return f"; nearest: {', '.join(near)}" if near else ""
