"""The settings of a run resolved into what its modelled instances are built from: model, GPU, KV capacity, times.

For the simulator alone; a real run takes ``workbench.cluster.device`` instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.capture_sizes import default_capture_sizes
from backends.checkpoint.precision import Precision, named
from backends.simulated.build_cost import build_cost
from backends.simulated.catalogue.gpu_specs import GPU, load_gpu
from backends.simulated.catalogue.model_specs import ModelSpec, load_model
from backends.simulated.copies import CopyEngine
from backends.simulated.cost import CostModel
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.exchange import Exchange, ExchangeRule
from backends.simulated.cost.step_gaps import with_gaps
from backends.simulated.front_end import FrontEndModel
from backends.simulated.host import GAPS, HostModel
from backends.simulated.kv_layout import lanes
from backends.simulated.kv_memory import MemoryBudget, ModelDoesNotFit, kv_capacity
from backends.simulated.kv_network import Port
from backends.simulated.kv_windows import NEEDED, KvRule
from backends.simulated.links import in_machine, link_notes, spread
from ground.link import parse_latency, parse_rate
from workbench.clients.messages import END_OF_SEQUENCE
from workbench.cluster.basis import case_of, rests_on
from workbench.cluster.own_cost import own_cost
from workbench.instance import Recipe
from workbench.scheduler.config import ConfigError, SchedulerConfig, largest_step
from workbench.scheduler.policy import load_policy
from workbench.settings.accuracy import Case
from workbench.settings.cost_spec import OWN, identity, split
from workbench.settings.engines import Engine, Hardware, load_engine
from workbench.settings.front_end_file import is_file, read_front_end
from workbench.settings.loop_spec import loop_spec
from workbench.settings.offers import not_offered
from workbench.settings.parity import parity_of
from workbench.settings.run_settings import RunSettings


@dataclass(frozen=True)
class FrontEndOf:
    """A front end, and whose it is."""

    engine: str
    """Name of a preset, or the file that was measured."""
    model: FrontEndModel


@dataclass(frozen=True, kw_only=True)
class SimulatedRecipe(Recipe):
    """Recipe of one modelled instance."""

    model: ModelSpec
    gpu: GPU
    tp: int
    capture_sizes: list[int]
    mixed_capture_sizes: list[int]
    host: HostModel
    front_end: FrontEndOf | None
    """What is between clients and the instance; None: nothing, latencies are the engine's own."""
    cost: CostModel
    lock_step: bool
    """Data-parallel instances share their experts and take every step together."""
    kv_budget: dict[str, Any]
    kv_dtype: str
    weights: Precision
    port: Port
    """For KV between instances."""
    keeps_windows: bool
    """Layers with a window keep what is in it, not every token."""
    notes: tuple[str, ...]
    """What to know of how KV is counted."""
    parity: str | None
    """How far the scheduler was seen to decide as the engine of its preset does."""
    rests_on: Mapping[str, str]
    """Where times come from: of steps, the host's, those of links."""
    case: Case
    """What other predictions it is like."""
    settings: RunSettings
    """What it was resolved from."""

    @property
    def gpus(self) -> int:
        """Number of GPUs of one instance."""
        return self.tp * self.stages

    def copies(self) -> CopyEngine | None:
        """What makes the KV copies of one instance; None where it has none to make."""
        if self.role != "decode":
            return None
        page_bytes = self.model.kv_bytes_per_token(self.kv_dtype, self.tp) * self.scheduler.page_size
        return CopyEngine(page_bytes, self.gpu.host_bandwidth, self.port.bytes_s)


def resolve(settings: RunSettings, loop: str) -> SimulatedRecipe:
    """What instances are built from that all have these settings: look up model and GPU, find the KV capacity, and check
    that the settings go together.

    Raises ConfigError, CatalogueError, ModelDoesNotFit, CostError or ProfileError, each with one line.
    """
    model = load_model(settings.model)
    weights = _weights(settings, model)
    kv_dtype, notes = _kv_dtype(settings, model, weights)
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
    if not model.experts and settings.expert_skew is not None:
        raise ConfigError(f"expert_skew: {model.name} has no experts")
    lock_step = settings.ep > tp
    if settings.ep > 1 and settings.ep not in (tp, tp * settings.dp):
        raise ConfigError(
            f"ep: {settings.ep} must equal tp ({tp}) or tp * dp ({tp * settings.dp}): experts are spread over the GPUs of "
            "an instance or of all"
        )
    if lock_step and pp > 1:
        raise ConfigError("ep: experts shared between instances need pp 1")
    gpu, of_links = _gpu(settings, tp, pp, lock_step)
    engine = load_engine(settings.engine).on(Hardware(gpu.name, gpu.memory_bytes, tp, settings.ep))
    max_context = settings.max_context or model.max_context
    load_policy(settings.policy)
    budget: dict[str, Any] = {}
    kv_tokens = settings.kv_tokens
    if kv_tokens is None:
        rule = _kv_rule(settings, engine)

        def capacity(settings: RunSettings) -> MemoryBudget:
            return kv_capacity(
                model,
                gpu,
                dtype=weights,
                kv_dtype=kv_dtype,
                tp=tp,
                pp=pp,
                ep=settings.ep,
                mem_fraction=settings.mem_fraction,
                max_prefill_tokens=largest_step(settings),
                max_running=settings.max_running,
                max_context=max_context,
                page_size=settings.page_size,
                rule=rule,
            )

        try:
            found = capacity(settings)
        except ModelDoesNotFit as problem:
            # An engine runs as many as there are states for where nobody says how many.
            if not problem.fits_running or settings.max_running != engine.settings.get("max_running"):
                raise
            notes = (*notes, f"max_running: {problem.fits_running}, for states have no room for {engine.name}'s own")
            settings = dataclasses.replace(settings, max_running=problem.fits_running)
            found = capacity(settings)
        budget = dataclasses.asdict(found)
        kv_tokens = found.kv_tokens
    scheduler = settings.scheduler(kv_tokens, max_context, settings.slots(loop)).for_role(settings.role)
    sizes, mixed_sizes = _captured(settings, engine, scheduler)
    if settings.expert_exchange == "deepep-normal" and settings.ep > 1 and sizes:
        # Its CPU waits for the sizes; vLLM (compilation.py) and SGLang (server_args.py) turn graphs off as well.
        sizes, mixed_sizes = [], []
        notes = (*notes, "graphs: none are replayed, for DeepEP's normal kernels cannot be captured")
    measured = _measured_host(settings)
    # Steps that were measured hold what the GPU waited between them.
    phases: dict[str, Any] = {**engine.host, **(dict.fromkeys(GAPS, 0.0) if measured else {}), **measured}
    host = HostModel(**phases, graph_max_batch=sizes[-1] if sizes else 0, layers=-(-model.layers // pp), ranks=tp)
    experts = weights.of("experts")
    want = CostRequest(
        model,
        gpu,
        weights,
        kv_dtype,
        tp,
        pp,
        settings.ep,
        sizes,
        mixed_sizes,
        engine.gpu_step_s,
        engine.gpu_request_s(max_context, settings.page_size, gpu.host_bandwidth),
        engine.name,
        settings.expert_skew,
        exchange=Exchange(
            settings.expert_exchange,
            ExchangeRule(**engine.exchange),
            gpu,
            tp,
            gpu.fp8_flops > 0 and all(held.computes == "fp8" for _, held in experts),
            settings.expert_skew or 0.0,
        ),
        links_said=settings.link is not None or settings.link_latency is not None,
    )
    kind, path = split(settings.cost)
    cost = own_cost(settings.cost, want) if kind == OWN else build_cost(kind, path, want)
    collectives = bool(getattr(cost, "collectives_measured", False)) or (kind == "fitted" and pp == 1)
    if collectives:
        of_links = []  # times hold them
    if lock_step and not hasattr(cost, "group_forward"):
        raise ConfigError(
            f"cost: {settings.cost!r} has no times of steps that instances take together (ep {settings.ep})"
        )
    # Costs made of operator tables have what a step runs beside the model already.
    beside_s = engine.gpu_step_s if kind in ("profile", "measured") else 0.0
    gap_s = max(host.gap_s - beside_s, 0.0) + host.gap_rank_s * (tp - 1)
    token_s = 0.0
    if not getattr(cost, "layers_timed", kind == "fitted"):  # what was timed as it ran has them
        gap_s += (host.gap_recurrent_s * model.recurrent_layers + host.gap_sparse_s * model.sparse_layers) / pp
        token_s = host.gap_expert_token_s * sum(model.moe_layers) / pp
    cost = with_gaps(cost, gap_s, host.gap_request_s, token_s)
    return SimulatedRecipe(
        loop=loop_spec(settings, loop),
        scheduler=scheduler,
        eos_token_ids=(END_OF_SEQUENCE,),
        stages=pp,
        model=model,
        gpu=gpu,
        tp=tp,
        capture_sizes=sizes,
        mixed_capture_sizes=mixed_sizes,
        host=host,
        front_end=_front_end(settings),
        cost=cost,
        lock_step=lock_step,
        kv_budget=budget,
        kv_dtype=kv_dtype,
        weights=weights,
        port=Port(
            parse_rate(settings.kv_link) * (lanes(model, tp, pp) if settings.kv_link_per == "gpu" else 1),
            parse_latency(settings.kv_link_latency),
        ),
        keeps_windows=_kv_rule(settings, engine).keeps_windows(model),
        notes=(*not_offered(settings, loop), *notes, *of_links),
        parity=parity_of(settings),
        rests_on=rests_on(
            settings,
            engine,
            gpu,
            tp * settings.dp if lock_step else tp * pp,
            kind,
            path,
            bool(measured),
            collectives,
        ),
        case=case_of(settings, gpu, model.made_of, tp, pp, lock_step, kind),
        settings=settings,
    )


def _gpu(settings: RunSettings, tp: int, pp: int, lock_step: bool) -> tuple[GPU, list[str]]:
    """The GPU in its machine, and what is assumed of the links to others that it works together with."""
    said = {name: getattr(settings, name) for name in ("link", "link_latency", "node_link", "node_link_latency")}
    gpu = in_machine(load_gpu(settings.gpu).under(settings.engine), said, settings.gpus_per_node)
    together = tp * settings.dp if lock_step else tp * pp
    gpu = spread(gpu, tp, together, settings.nodes)
    sizes = {"tp": tp, "pp": pp, "dp": settings.dp if lock_step else 1, "ep": settings.ep}
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return gpu, link_notes(gpu, layout, together, said) if together > 1 else []


def _front_end(settings: RunSettings) -> FrontEndOf | None:
    """Return the front end that is asked for: a file's, or the preset's where it is of that engine, else the newest's.
    Prefill and decode instances have none. Raises ConfigError for a file that is none."""
    if settings.front_end == "none" or settings.role != "both":
        return None
    if is_file(settings.front_end):
        return FrontEndOf(settings.front_end, read_front_end(settings.front_end))
    own = settings.engine.partition("-")[0] == settings.front_end
    engine = load_engine(settings.engine if own else settings.front_end)
    return FrontEndOf(engine.name, FrontEndModel(**engine.front_end))


def _measured_host(settings: RunSettings) -> dict[str, float]:
    """The CPU phases that came with the cost model, if any did."""
    kind, path = split(settings.cost)
    if path is None:
        return {}
    if kind == "fitted":
        from backends.simulated.cost.tables.fitted_file import read_fitted

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


def _weights(settings: RunSettings, model: ModelSpec) -> Precision:
    """Return what the weights are held in: what ``dtype`` says, else a profile's, else the checkpoint's."""
    profiled = identity(settings.cost).get("dtype") if settings.dtype == "auto" else None
    return named(profiled, f"--cost {settings.cost}") if profiled else model.precision(settings.dtype)


def _kv_rule(settings: RunSettings, engine: Engine) -> KvRule:
    """Return what is reserved for windows and states."""
    if settings.kv_windows == "exact":
        return NEEDED
    rule = KvRule(**engine.kv)
    # Without a prefix cache SGLang keeps the states of max_running requests and no more.
    return rule if settings.cache != "none" else dataclasses.replace(rule, state_share=None)


def _kv_dtype(settings: RunSettings, model: ModelSpec, weights: Precision) -> tuple[str, tuple[str, ...]]:
    """Return what KV is held in, and what to know of it."""
    saved = model.saved_kv
    if settings.kv_dtype == "auto":
        return model.kv_dtype(weights.plain.computes), ()
    if saved is None or saved == settings.kv_dtype:
        return settings.kv_dtype, ()
    return settings.kv_dtype, (
        f"KV is in {settings.kv_dtype}; the checkpoint has scales for {saved}, which --kv-dtype auto takes",
    )
