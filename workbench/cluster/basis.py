"""What the times of a modelled instance rest on, and what other predictions it is like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from backends.simulated.catalogue.gpu_specs import GPU, achieved_from
from backends.simulated.cost.models.communication import reached_link
from ground.link import Link, written_rate, written_time
from workbench.settings.accuracy import Case, engine_of, layout_text
from workbench.settings.engines import Engine
from workbench.settings.run_settings import RunSettings


def rests_on(
    settings: RunSettings,
    engine: Engine,
    gpu: GPU,
    together: int,
    kind: str,
    path: Path | None,
    measured_host: bool,
    collectives_measured: bool,
) -> Mapping[str, str]:
    """Say where the times of steps, the host's and those of links come from, for ``together`` GPUs that work together and a
    cost model of a ``kind``, out of the file ``path``."""
    return {
        "steps": _steps(settings.cost, kind, path, gpu, engine),
        "host": _host(engine, path if measured_host else None),
        "links": _links(settings, gpu, together, collectives_measured),
    }


def case_of(settings: RunSettings, gpu: GPU, model: str, tp: int, pp: int, lock_step: bool, kind: str) -> Case:
    """What other predictions a run is like; ``model`` says what its layers are made of."""
    layout = layout_text(tp, settings.dp if lock_step else 1, settings.ep, pp)
    return Case(engine_of(settings.engine), gpu.family or gpu.name, model, layout, kind)


def _steps(cost: str, kind: str, path: Path | None, gpu: GPU, engine: Engine) -> str:
    if kind == "roofline":
        return f"the roofline of {gpu.name}: {gpu.source}; efficiencies {achieved_from(gpu)}"
    if kind == "measured":
        return f"operators of {engine_of(engine.name)} measured on {gpu.name} (aiconfigurator-core), else the roofline"
    if kind == "profile":
        return f"operators measured, of {path}"
    return f"coefficients fitted to measured steps, of {path}" if kind == "fitted" else cost


def _host(engine: Engine, measured: Path | None) -> str:
    if measured is not None:
        return f"measured, of {measured}"
    if not engine.host:
        return f"preset {engine.name}: the assumed CPU phases of backends/simulated/host.py"
    return f"preset {engine.name}: workbench/settings/engines.toml, where its sources stand"


def _links(settings: RunSettings, gpu: GPU, together: int, measured: bool) -> str:
    if together == 1:
        return "none: one GPU"
    if measured:
        return "measured with the steps"
    nodes = -(-together // gpu.gpus_per_node)
    parts = []
    if gpu.gpus_per_node > 1:
        parts.append(_link(gpu, reached_link(together, gpu), settings.link, settings.link_latency, "between GPUs"))
    if nodes > 1:
        parts.append(_link(gpu, gpu.node_link, settings.node_link, settings.node_link_latency, "between nodes"))
    return "; ".join(parts)


def _link(gpu: GPU, link: Link, rate: str | None, latency: str | None, where: str) -> str:
    said = [text for text, given in (("rate", rate), ("latency", latency)) if given is not None]
    source = (
        "as said" if len(said) == 2 else f"of {gpu.name} in the catalogue" + (f", {said[0]} as said" if said else "")
    )
    return f"{written_rate(link.bandwidth)} and {written_time(link.latency_s)} {where}, {source}"
