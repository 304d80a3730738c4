"""The settings of a run, each declared once and checked. How they are found is in loading.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from workbench.scheduler.config import DEFAULT_MAX_NEW_TOKENS, ConfigError, Role, SchedulerSettings, Seeded
from workbench.scheduler.handover_settings import PAIRS, paired
from workbench.scheduler.settings import (
    HARDWARE,
    RUN,
    SCHEDULER,
    TRACE,
    UNRECORDED,
    Place,
    is_own,
    setting,
    settings_of,
)
from workbench.settings.cost_spec import split
from workbench.settings.engines import exact_name
from workbench.settings.fleet_settings import FleetSettings
from workbench.settings.fleet_spec import check_fleet
from workbench.settings.front_end_file import FRONT_ENDS, front_end_said
from workbench.settings.kv_links import KvLinkSettings
from workbench.settings.machine import MachineSettings
from workbench.settings.no_such import no_such_setting
from workbench.settings.pool_spec import PoolSpec, parse_pools, read_pools

LOOP_NAMES = ("normal", "overlap", "pipeline")
MOST_INSTANCES = 10_000
"""Each has a KV pool of its own, so that a slip of the finger would fill the memory."""
RouterKind = Literal["round_robin", "least_requests", "least_tokens", "cache_aware", "expected_ttft"]
Dtype = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "int4", "nvfp4"]
KvDtype = Literal["bf16", "fp16", "fp32", "fp8", "auto"]
KvWindows = Literal["engine", "exact"]
ExpertExchange = Literal[
    "all-to-all", "allgather-reducescatter", "naive", "sum-or-max", "deepep-normal", "deepep-low-latency", "deepep"
]
_NO_TRACE: dict[Place, str] = {"served": "its requests come from clients, not from a trace"}


def check_loop_name(loop: str) -> None:
    """Raise ConfigError for the name of a loop that there is not; whether one's own can be loaded is seen later."""
    if loop not in LOOP_NAMES and not is_own(loop):
        raise ConfigError(f"loop: {loop!r} is not one of {', '.join(LOOP_NAMES)}, nor module:function")


def runs_stages(loop: str) -> bool:
    """Tell whether a loop may run several stages, a micro-batch or more in flight each. One's own is taken at its word."""
    return loop == "pipeline" or is_own(loop)


@dataclass(frozen=True, kw_only=True)
class LoadSettings(Seeded):
    """Settings of the load: which requests of a trace come and when, and what is asked of the answers.

    Raises ConfigError when a value is out of bounds or two settings contradict each other.
    """

    slo_ttft: float | None = setting(
        None,
        above=0,
        group=RUN,
        help="Seconds in which a first token is due, unless the request says: goodput counts it, edf goes by it.",
    )
    slo_tpot: float | None = setting(
        None, above=0, group=RUN, help="Seconds a token; goodput counts requests within it."
    )
    requests: int | None = setting(None, least=1, group=TRACE, help="Only the first N requests.", idle=_NO_TRACE)
    rate: float | None = setting(
        None, above=0, group=TRACE, help="Rescale arrivals to this mean rate, requests/s.", idle=_NO_TRACE
    )
    speedup: float | None = setting(None, above=0, group=TRACE, help="Divide arrival times by this.", idle=_NO_TRACE)
    concurrency: int | None = setting(
        None, least=1, group=TRACE, help="Closed loop: so many at a time, arrivals ignored.", idle=_NO_TRACE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.concurrency is not None and (self.rate is not None or self.speedup is not None):
            raise ConfigError("concurrency: replaces arrivals, so rate and speedup have nothing to act on")
        if self.rate is not None and self.speedup is not None:
            raise ConfigError("speedup: has no effect beside rate, which replaces the trace's own")


@dataclass(frozen=True, kw_only=True)
class RunnerSettings:
    """Settings of a real model runner beside those of a run."""

    load_format: str = setting(
        "auto",
        group=HARDWARE,
        help="Weights: auto | safetensors | gguf | dummy (random). Default {default}.",
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings(SchedulerSettings, LoadSettings, MachineSettings, KvLinkSettings, FleetSettings):
    """Every setting of a run, under the names of the flags: the scheduler's, and those of what it schedules for. None means:
    found from the others.

    Raises ConfigError when a value is out of bounds or two settings contradict each other.
    """

    engine: str = setting(
        "workbench",
        group=SCHEDULER,
        first=True,
        help="Preset of settings, graphs and CPU phases: workbench | vllm-0.33.0 | vllm-0.24.0 | vllm-0.19.0 | "
        "vllm-0.14.0 | vllm-0.12.0 | sglang-0.5.23 | sglang-0.5.10.post1 | sglang-0.5.9 | sglang-0.5.6.post2 | "
        "sglang-0.5.1.post1 | sglang-0.4.10.post2 | mini-sglang-20fcd7f; in short: vllm, sglang, mini-sglang. Flags win.",
        read=exact_name,
    )
    overlap: bool = setting(
        True,
        group=SCHEDULER,
        help="Whether the loop chosen without --loop overlaps. Default {default}.",
        needs="no loop that is named, and pp 1",
        acts=lambda s, loop: s.loop is None and s.pp == 1,
    )
    overlap_prefills: bool = setting(
        True,
        group=SCHEDULER,
        help="Overlap two prefills in a row. Default {default}.",
        needs="the overlap loop",
        acts=lambda s, loop: loop == "overlap",
    )
    loop: str | None = setting(
        None,
        group=RUN,
        first=True,
        help="normal, overlap, pipeline, module:function, or a comma list to compare. "
        "Default: pipeline if pp > 1, else overlap.",
    )
    exact: bool = setting(
        False,
        group=RUN,
        help="Simulate every decode step by itself, instead of many at once where they are decided: slower, same record.",
        idle={"live": "no step is skipped in real time"},
    )
    model: str = setting(
        "meta-llama/Llama-3.1-8B",
        group=HARDWARE,
        first=True,
        help="Hugging Face id of the catalogue, folder, or config.json. Default {default}.",
    )
    tp: int = setting(1, least=1, group=HARDWARE, help="Tensor parallel GPUs. Default {default}.")
    pp: int = setting(1, least=1, group=HARDWARE, help="Pipeline stages. Default {default}.")
    micro_batches: int | None = setting(
        None,
        group=HARDWARE,
        help="Micro-batches that take turns in the pipeline; more than stages hide CPU phases and uneven stages. "
        "Default: as many as stages.",
        needs="the pipeline loop",
        acts=lambda s, loop: runs_stages(loop),
    )
    dp: int = setting(
        1,
        least=1,
        most=MOST_INSTANCES,
        unit="instances",
        group=HARDWARE,
        help="Instances behind a router, all alike. Default {default}.",
    )
    pool: tuple[str, ...] | None = setting(
        None,
        group=HARDWARE,
        help="Instances behind the router that have settings of their own: [NAME=]ROLE:N, then ,key=value for each, as in "
        "both:2,gpu=h100,tp=2. ROLE is both, prefill or decode. Repeatable.",
        read=read_pools,
    )
    ep: int = setting(
        1,
        least=1,
        group=HARDWARE,
        help="GPUs that experts are spread over: tp, or tp * dp (instances then step together). Default {default}.",
    )
    router: RouterKind = setting(
        "round_robin",
        own="module:Class",
        group=HARDWARE,
        help="{choices}. Default {default}.",
        needs="dp of 2 or more, or as many in pools",
        acts=lambda s, loop: s.instances > 1,
    )
    decode_router: RouterKind | None = setting(
        None,
        own="module:Class",
        group=HARDWARE,
        help="Which decode instance a request goes on at: as router. Default: what router says.",
        needs=PAIRS,
        acts=paired,
    )
    front_end: str = setting(
        "none",
        group=HARDWARE,
        help="The process between clients and each instance (simulated), so that latencies are what clients see: "
        f"{' | '.join(FRONT_ENDS)} | FILE.toml, which calibrate writes. Of the preset's version where it is that engine's; "
        "none: the engine's own latencies. Default {default}.",
        read=front_end_said,
        needs="instances of role both",
        acts=lambda s, loop: not s.disaggregated,
        idle={"live": "clients and what is before the scheduler are real"},
    )
    dtype: Dtype = setting(
        "auto",
        group=HARDWARE,
        help="Weights: bf16 | fp16 | fp32 | fp8 | int8, int4, nvfp4 (simulated) | auto: as the checkpoint says. "
        "Default {default}.",
    )
    kv_dtype: KvDtype = setting(
        "bf16",
        group=HARDWARE,
        help="KV cache (simulated): {choices}: what the checkpoint has scales for, else what is computed in. "
        "Default {default}.",
        needs="KV capacity found from memory, not kv_tokens, or costs that are not fitted",
        acts=lambda s, loop: s.kv_tokens is None or split(s.cost)[0] != "fitted",
        idle={"real": "KV is kept in what is computed in"},
    )
    mem_fraction: float = setting(
        0.9,
        above=0,
        most=1,
        group=HARDWARE,
        help="Share of GPU memory to use. Default {default}.",
        needs="KV capacity found from memory, not kv_tokens",
        acts=lambda s, loop: s.kv_tokens is None,
    )
    kv_windows: KvWindows = setting(
        "engine",
        group=HARDWARE,
        help="KV of layers with windows and recurrent ones (simulated): as the engine of the preset reserves it (workbench "
        "and mini-sglang: every token), or exact: what is needed and no more. Default {default}.",
        needs="KV capacity found from memory, not kv_tokens",
        acts=lambda s, loop: s.kv_tokens is None,
        idle={"real": "a real runner keeps every token"},
    )
    kv_tokens: int | None = setting(
        None, least=1, group=HARDWARE, help="KV capacity in tokens. Default: found from memory."
    )
    max_context: int | None = setting(None, least=1, group=HARDWARE, help="Longest sequence. Default: the model's.")
    cuda_graphs: bool = setting(True, group=HARDWARE, help="Decode in captured graphs. Default {default}.")
    cost: str = setting(
        "roofline",
        group=HARDWARE,
        help="Cost model: roofline | measured | profile:PATH | fitted:PATH | module:Class. Default {default}.",
        idle={"real": "times are measured"},
    )
    expert_exchange: ExpertExchange = setting(
        "all-to-all",
        group=HARDWARE,
        help="How tokens reach experts on other GPUs (simulated): {choices}. deepep: normal for steps with prompts, else "
        "low-latency. Default {default}, or the engine's.",
        needs="ep of 2 or more, and costs that are not fitted",
        acts=lambda s, loop: s.ep > 1 and split(s.cost)[0] != "fitted",
        idle={"real": "the runner has a way of its own"},
    )
    expert_skew: float | None = setting(
        None,
        least=0,
        most=10,
        group=HARDWARE,
        help="How unevenly tokens fall on experts (simulated): exponent of a power law, 0 for not at all. "
        "Default: 0, and for cost measured 1.01, of what its tables have: 0, 1.01 and 1.2.",
        needs="costs that are not fitted",
        acts=lambda s, loop: split(s.cost)[0] != "fitted",
        idle={"real": "routers choose"},
    )
    ignore_eos: bool = setting(False, group=TRACE, help="Output lengths are known to the scheduler.")
    max_tokens: int | None = setting(
        None,
        least=1,
        group=TRACE,
        help="Output bound of requests that have none. "
        f"Default {DEFAULT_MAX_NEW_TOKENS}, or what the trace says they write if that is more.",
    )

    role: Role = field(default="both", metadata={UNRECORDED: True})
    """Of a pool's own settings: what its instances are there for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        split(self.cost)
        if self.fail or self.autoscale:
            self._check_fleet()
        if self.pool:
            self._check_pools()
            return
        for loop in self.loops:
            check_loop_name(loop)
            if not any(map(runs_stages, self.loops)) and self.pp > 1:
                raise ConfigError(f"loop: {loop!r} runs one stage, but pp is {self.pp}; use pipeline")
        if len(set(self.loops)) != len(self.loops):
            raise ConfigError(f"loop: {self.loop!r} names a loop twice")
        if self.loops == ["pipeline"] and self.pp == 1:
            raise ConfigError("loop: pipeline needs pp of 2 or more")
        if self.micro_batches is not None:
            stages = max((self.layout(loop)[1] for loop in self.loops if runs_stages(loop)), default=0)
            if not stages:
                raise ConfigError("micro_batches: only the pipeline loop has them")
            if self.micro_batches < stages:
                raise ConfigError(
                    f"micro_batches: {self.micro_batches} leaves some of the {stages} stages without work"
                )
            if self.micro_batches > max(stages, self.max_running):
                raise ConfigError(
                    f"micro_batches: {self.micro_batches} is more than the {self.max_running} requests that may run "
                    "(max_running)"
                )

    def _check_fleet(self) -> None:
        specs = parse_pools(self.pool) if self.pool else [PoolSpec("both", "both", self.dp)]
        slo = {spec.name: self.slo_tpot if spec.role == "decode" else self.slo_ttft for spec in specs}
        counts = {spec.name: spec.count for spec in specs}
        scalings = list(self.scalings.values())
        check_fleet(self.failures, scalings, counts, {name: limit is not None for name, limit in slo.items()})

    def _check_pools(self) -> None:
        if self.dp > 1:
            raise ConfigError("dp: is short for --pool both:N, so beside pools there is none; give the pool its number")
        if self.instances > MOST_INSTANCES:
            raise ConfigError(f"pool: {self.instances} is more than {MOST_INSTANCES} instances")
        for loop in self.loops:
            check_loop_name(loop)
        if len(set(self.loops)) != len(self.loops):
            raise ConfigError(f"loop: {self.loop!r} names a loop twice")
        check_pairs(self.pools(self.loops[0]))

    @property
    def disaggregated(self) -> bool:
        """Whether some instances prefill and others decode."""
        return any(pool.role != "both" for pool in parse_pools(self.pool or ()))

    @property
    def instances(self) -> int:
        """How many instances there are at most, of all kinds."""
        counts = {pool.name: pool.count for pool in parse_pools(self.pool)} if self.pool else {"both": self.dp}
        scalings = self.scalings if self.autoscale else {}
        return sum(scalings[name].most if name in scalings else count for name, count in counts.items())

    def pools(self, loop: str) -> list[PoolSettings]:
        """The pools of the cluster, each with its settings, when ``loop`` is run. All have the loop that is named; where
        none is, each has the one that its settings imply. Raises ConfigError, which names the pool."""
        if not self.pool:
            return [PoolSettings("both", "both", self.dp, self, loop)]
        found = []
        for spec in parse_pools(self.pool):
            try:
                given = {name: pool_value(name, text) for name, text in spec.given}
                own = replace(
                    self, **{**given, **_OF_FLEET, "pool": None, "dp": spec.count, **self._of_role(spec.role, given)}
                )
            except ConfigError as error:
                raise ConfigError(f"pool {spec.name}: {error}") from None
            runs = loop if own.loop is not None else own.loops[0]
            found.append(PoolSettings(spec.name, spec.role, spec.count, own, runs, given))
        return found

    def as_role(self, role: Role) -> RunSettings:
        """These settings for one instance of a role. Raises ConfigError for what such an instance cannot have."""
        return replace(self, **self._of_role(role, {}))

    def _of_role(self, role: Role, given: Mapping[str, Any]) -> dict[str, Any]:
        """What follows for a pool from its role. ``--loop`` is not for prefill instances of several stages, which have but
        one. Raises ConfigError."""
        if role == "both":
            return {}
        pp = given.get("pp", self.pp)
        if role == "decode" and pp > 1:
            raise ConfigError(f"pp: {pp} stages; a decode instance has one")
        if role == "decode" and self.loop is not None and "pipeline" in self.loops:
            raise ConfigError("loop: pipeline runs stages, and a decode instance has one; normal and overlap run there")
        return {"role": role, **({"loop": None} if pp > 1 else {})}

    @property
    def loops(self) -> list[str]:
        """The loops to run: those named, else the one the settings imply, of the first pool where there are pools."""
        if self.loop is not None:
            return [part.strip() for part in self.loop.split(",")]
        if self.pool:
            return self.pools("")[0].settings.loops
        return ["pipeline" if self.pp > 1 else "overlap" if self.overlap else "normal"]

    def layout(self, loop: str) -> tuple[int, int]:
        """(tp, pp) that a loop runs with. All compared loops get the same GPUs: the pipeline loop cuts its ``tp * pp``
        GPUs into stages, the others use them as one tensor-parallel group. Asked for pipeline beside others without a
        ``pp``, two of the ``tp`` GPUs' ways become stages. A loop of one's own has the layout that is asked for."""
        if is_own(loop):
            return self.tp, self.pp
        if loop == "pipeline":
            if self.pp > 1:
                return self.tp, self.pp
            return self.tp // 2, 2
        return self.tp * self.pp, 1

    def slots(self, loop: str) -> int:
        """Micro-batches that take turns under a loop."""
        stages = self.layout(loop)[1]
        return self.micro_batches or stages if runs_stages(loop) else stages


@dataclass(frozen=True)
class PoolSettings:
    """A pool of a cluster: ``count`` instances with ``settings``, of which ``given`` are its own, under ``loop``."""

    name: str
    role: Role
    count: int
    settings: RunSettings
    loop: str
    given: Mapping[str, Any] = field(default_factory=dict)


def check_pairs(pools: Sequence[PoolSettings]) -> None:
    """Raise ConfigError, which names a pool, where instances that prefill or decode alone do not go together."""
    of_role = {role: [pool for pool in pools if pool.role == role] for role in ("both", "prefill", "decode")}
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if of_role[role] and not of_role[other]:
            raise ConfigError(f"pool {of_role[role][0].name}: role {role} needs a pool of role {other} beside it")
        if of_role[role] and of_role["both"]:
            raise ConfigError(
                f"pool {of_role['both'][0].name}: role both does not go with prefill and decode, which share requests"
            )
    pairs = [*of_role["prefill"], *of_role["decode"]]
    for pool in pairs[1:]:
        if pool.settings.page_size != pairs[0].settings.page_size:
            raise ConfigError(
                f"pool {pool.name}: page_size: {pool.settings.page_size}, but {pairs[0].settings.page_size} in pool "
                f"{pairs[0].name}; KV is handed over in pages of one size"
            )


_OF_FLEET = {"fail": None, "autoscale": None}
RUN_WIDE = frozenset(
    {
        *settings_of(LoadSettings),
        *settings_of(FleetSettings),
        *(
            "model",
            "loop",
            "exact",
            "dp",
            "pool",
            "router",
            "decode_router",
            "front_end",
            "ignore_eos",
            "max_tokens",
            "first_token",
        ),
    }
)
"""Settings of a run that its pools cannot have different values of."""


def check_of_pool(name: str, beside: Sequence[str] = ()) -> None:
    """Raise ConfigError for a setting that no pool can have of its own. ``beside``: keys that a pool has beside settings."""
    if name in RUN_WIDE:
        raise ConfigError(f"{name}: is of the whole run, not of a pool")
    if name not in (declared := settings_of(RunSettings)):
        raise ConfigError(no_such_setting(name, [*sorted(declared.keys() - RUN_WIDE), *beside]))


def pool_value(name: str, text: str) -> Any:
    """Read what a pool says of a setting. Raises ConfigError."""
    check_of_pool(name)
    declared = settings_of(RunSettings)[name]
    value = declared.parse(text)
    declared.check(value)
    return value
