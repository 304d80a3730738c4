"""The content of meta.json: one type for every kind of run, each of which fills in its part (docs/run-record.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

RunKind = Literal["simulated", "replayed", "served", "observed", "imported"]
RUN_KINDS: tuple[RunKind, ...] = get_args(RunKind)
EARLIER_PACKAGE = "llm-workbench"
"""What records of real runs once called the workbench in their versions."""


class _Part:
    """Something that becomes JSON field by field; what is None is left out."""

    def to_json(self) -> dict[str, Any]:
        """Give the part as meta.json holds it."""
        found = {declared.name: getattr(self, declared.name) for declared in fields(self)}  # type: ignore[arg-type]
        return {name: _plain(value) for name, value in found.items() if value is not None or name in self._kept}

    _kept = frozenset[str]()
    """Fields that are null where nothing is known."""


@dataclass(frozen=True)
class TraceMeta(_Part):
    """The trace that a run served, or that a server's traffic became."""

    name: str
    format: str
    sha256: str
    notes: Sequence[str] = ()
    """Sentences about what the reader of the trace found or assumed, and what the run made of it."""


@dataclass(frozen=True)
class HardwareMeta(_Part):
    """The hardware that the run took place on."""

    gpu: str
    gpus: int | None
    """None: unknown."""
    simulated: bool
    url: str | None = None
    """Of the server that was observed."""
    _kept = frozenset({"gpus"})


@dataclass(frozen=True)
class Totals(_Part):
    """Counts that the run made itself; seconds are those of its own clock."""

    requests: int
    ended: int
    iterations: int
    cut: Mapping[str, Any] | None = None
    """Outputs that are shorter than in the trace, by what cut them."""
    simulated_s: float | None = None
    wall_s: float | None = None
    traced: int | None = None
    """Served: requests in the trace of the traffic."""
    failed: int | None = None
    """Observed: requests that got no whole answer; the rest of this class too is of an observed run."""
    pieces: int | None = None
    resent: int | None = None
    late_mean_s: float | None = None
    late_max_s: float | None = None


@dataclass(frozen=True)
class FleetSpan(_Part):
    """What an instance was from one moment of the run to another."""

    instance: int
    state: str
    """``starting``, ``up``, ``draining`` (it takes nothing new) or ``down`` (lost)."""
    begin_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class PoolMeta(_Part):
    """Instances of one kind. What is the same in all pools of a run, ``RunMeta`` says."""

    name: str
    role: str
    count: int
    first_instance: int
    """Theirs are numbered from there."""
    gpu: str
    gpus: int
    """Of one instance."""
    loop: str
    tp: int
    pp: int
    dtype: str
    kv_tokens: int
    max_context: int
    settings: Mapping[str, Any]
    """That the pool has of its own."""
    weights: Mapping[str, Any] | None = None
    kv_budget: Mapping[str, Any] | None = None
    host_model: Mapping[str, Any] | None = None
    front_end: Mapping[str, Any] | None = None
    cost_notes: Sequence[str] | None = None
    parity: str | None = None
    power_w: Mapping[str, float] | None = None
    """What a GPU draws, by what it does."""
    rests_on: Mapping[str, str] | None = None
    accuracy: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RunMeta(_Part):
    """The description of a run. Every kind has the fields without a default."""

    kind: RunKind
    name: str
    """What the run is called in comparisons, such as its loop."""
    command: str
    trace: TraceMeta
    model: str
    hardware: HardwareMeta
    settings: Mapping[str, Any]
    """Every setting finally used."""
    versions: Mapping[str, str]
    totals: Totals
    interrupted: bool
    weights: Mapping[str, Any] | None = None
    kv_budget: Mapping[str, Any] | None = None
    host_model: Mapping[str, Any] | None = None
    front_end: Mapping[str, Any] | None = None
    """What was modelled between clients and scheduler: ``engine``, and what things took it. None: nothing."""
    cost_notes: Sequence[str] | None = None
    parity: str | None = None
    """How far the scheduler was seen to decide as the engine of its preset does."""
    rests_on: Mapping[str, str] | None = None
    """Where modelled times come from: ``steps``, ``host``, ``links``."""
    accuracy: Mapping[str, Any] | None = None
    """How far off predictions like this run were."""
    pools: Sequence[PoolMeta] | None = None
    prices: Mapping[str, Any] | None = None
    """``currency``, ``source``, and what an hour of each GPU costs: ``gpu_hour``."""
    fleet: Sequence[FleetSpan] | None = None
    """Of a run whose instances come and go: what is not in it was not there."""
    latency_from: str | None = None
    recorded_at: str | None = None
    observed: bool | None = field(default=None, init=False)
    """Set by ``kind``: a key of its own in records from the beginning on."""

    def __post_init__(self) -> None:
        if self.kind == "observed":
            object.__setattr__(self, "observed", True)


def _plain(value: Any) -> Any:
    if isinstance(value, _Part):
        return value.to_json()
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str) or not isinstance(value, Sequence) else [_plain(each) for each in value]


def upgraded(meta: dict[str, Any]) -> dict[str, Any]:
    """The content of a meta.json, earlier versions' words for a thing replaced by those of this one."""
    versions = meta.get("versions")
    if isinstance(versions, dict) and EARLIER_PACKAGE in versions:
        versions.setdefault("workbench", versions.pop(EARLIER_PACKAGE))
    return meta


def kind_of(meta: Mapping[str, Any]) -> RunKind:
    """Name the kind of a run by what meta.json says; records of earlier versions say it by what they hold."""
    for kind in RUN_KINDS:
        if meta.get("kind") == kind:
            return kind
    settings, hardware = (meta[key] if isinstance(meta.get(key), Mapping) else {} for key in ("settings", "hardware"))
    if meta.get("observed") is True:
        return "observed"
    if "recorded_at" in meta or "record_content" in settings:
        return "served"
    if "latency_from" in meta or "engine_kwargs" in settings:
        return "imported"
    return "simulated" if hardware.get("simulated") is True else "replayed"
