"""Sources of a run's settings: a TOML file, flags, a run record, an engine's preset, a profile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ground.value_file import read_toml
from workbench.scheduler.config import ConfigError
from workbench.scheduler.settings import settings_of
from workbench.settings.cost_spec import identity
from workbench.settings.engines import Hardware, load_engine
from workbench.settings.machine import read_machine
from workbench.settings.no_such import no_such_setting
from workbench.settings.pool_spec import PoolSpec, parse_pools
from workbench.settings.run_settings import RUN_WIDE, RunSettings, pool_value

SETTINGS = settings_of(RunSettings)
"""Every setting of a run by its name in files, records and flags."""
HardwareOf = Callable[[Mapping[str, Any]], Hardware | None]
"""Finds what a run with these settings is to an engine whose defaults go by the GPU; None: no GPU that is known."""
FORMER = {alias: name for name, declared in SETTINGS.items() for alias in declared.aliases}
"""Names that settings had, and those that they have."""


def modelled_hardware(values: Mapping[str, Any]) -> Hardware | None:
    """What the GPU of a simulated run is to an engine. None: it cannot be looked up, which is told where it is used."""
    from backends.simulated.catalogue.gpu_specs import CatalogueError, load_gpu  # only engines that go by the GPU ask

    try:
        gpu = load_gpu(values.get("gpu", RunSettings.gpu))
    except CatalogueError:
        return None
    return hardware_with(values, gpu.name, gpu.memory_bytes)


def hardware_with(values: Mapping[str, Any], gpu: str, memory_bytes: float) -> Hardware:
    """A run's settings on so large a GPU, as an engine's defaults go by it."""
    return Hardware(gpu, memory_bytes, values.get("tp", RunSettings.tp), values.get("ep", RunSettings.ep))


def settings_from(
    config: Path | None,
    flags: Mapping[str, Any],
    like: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    hardware: HardwareOf = modelled_hardware,
) -> RunSettings:
    """Settings of a TOML file, with ``flags`` (those given; None otherwise) over them. Below both come the settings of the
    run record ``like``, the model and GPU that a profile is of, the engine's preset on its ``hardware``, and ``defaults``.

    Raises ConfigError for a file that cannot be read and for unknown or mistyped settings, RecordError for a bad record.
    """
    values = _on_machine(read_settings_file(config)) if config is not None else {}
    meant = {name: SETTINGS[name].meant(value) for name, value in flags.items() if value is not None}
    values = _over(values, _on_machine(meant))
    if like is not None:
        values = _over(_recorded(like), values)
    profiled = _profiled(values)
    preset = _of_engine({**profiled, **values}, hardware)
    if values.get("pool"):
        pools = parse_pools(values["pool"])
        if any(name == "engine" for pool in pools for name, _ in pool.given):
            preset = _with_own_loops(preset, values)
        values["pool"] = tuple(_filled(pool, values, preset).text for pool in pools)
    return RunSettings(**{**(defaults or {}), **preset, **profiled, **values})


def _on_machine(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what the file of their machine says under them. Raises ConfigError.

    A record's are not looked up again: they hold what the file said then.
    """
    return {**read_machine(values["machine"]), **values} if values.get("machine") else dict(values)


def _of_engine(values: Mapping[str, Any], hardware: HardwareOf = modelled_hardware) -> dict[str, Any]:
    """The settings of the preset of the engine of these, on their GPU, with None for a 0 that stands for it.

    Raises ConfigError.
    """
    engine = load_engine(values.get("engine", RunSettings.engine))
    if engine.gpus and (found := hardware(values)) is not None:
        engine = engine.on(found)
    settings = {name: SETTINGS[name].meant(value) for name, value in engine.settings.items()}
    if values.get("pp", RunSettings.pp) > 1 and values.get("loop") is None:
        settings.pop("loop", None)  # of one stage; of several it is the pipeline's
    if engine.gpus and "max_running" in settings and (budget := values.get("max_batch_tokens")) is not None:
        # As vLLM: of a budget that is asked for, no more may run than it has tokens (engine/arg_utils.py).
        settings["max_running"] = min(settings["max_running"], budget)
    return settings


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over others. Pools take the place of a number of instances, and the other way round.

    Raises ConfigError where both are given at once.
    """
    if {"dp", "pool"} <= above.keys():
        raise ConfigError("dp: is short for --pool both:N; give the number to a pool")
    replaced = {"dp"} if "pool" in above else {"pool"} if "dp" in above else set()
    return {**{name: value for name, value in below.items() if name not in replaced}, **above}


def _filled(pool: PoolSpec, values: Mapping[str, Any], preset: Mapping[str, Any]) -> PoolSpec:
    """A pool with what follows from its own engine or profile, where neither the pool nor the run says otherwise; ``preset``
    is what follows from the engine of the run. Raises ConfigError."""
    own = dict(pool.given)
    more: dict[str, Any] = {}
    try:
        # Its facts take the place of the file's name, so that a record's pools need no file.
        own = {name: str(value) for name, value in _on_machine(own).items() if name != "machine"}
        if "engine" in own:
            more |= {name: getattr(RunSettings, name) for name in preset}
        if "cost" in own:
            more |= _profiled({**values, **own})
        if {"engine", "gpu", "tp", "ep", "cost"} & own.keys():
            read = {name: pool_value(name, own[name]) for name in own if name in ("engine", "gpu", "tp", "ep")}
            found = _with_own_loops(_of_engine({**_profiled(values), **values, **more, **read}), values)
            more |= found if "engine" in own else {k: v for k, v in found.items() if preset.get(k) != v}
    except ValueError as error:  # every error of bad input is one
        raise ConfigError(f"pool {pool.name}: {error}") from error
    for name, value in more.items():
        if name not in values and name not in RUN_WIDE:
            own.setdefault(name, "none" if value is None else str(value))
    return replace(pool, given=tuple(own.items()))


def _with_own_loops(preset: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A preset with its loop as whether steps overlap, which each pool may have its own of; where the run names a loop, all
    have that."""
    if values.get("loop") is not None or preset.get("loop") not in ("normal", "overlap"):
        return dict(preset)
    others = {name: value for name, value in preset.items() if name != "loop"}
    return {**others, "overlap": preset["loop"] == "overlap"}


def read_settings_file(config: Path) -> dict[str, Any]:
    """Read a TOML file of settings, under the names of the fields, with None for a 0 that stands for it.

    Raises ConfigError.
    """
    return checked_values(read_toml(config, ConfigError), f"{config}: ")


def checked_values(written: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings under the names of the fields, with None for a 0 that stands for it.

    Raises ConfigError, which begins with ``where``, for a name that no setting has, one given twice, and a value that is
    not of the setting's type or out of its bounds.
    """
    values: dict[str, Any] = {}
    for dashed, value in written.items():
        name = dashed.replace("-", "_")
        if (now := FORMER.get(name, name)) in values:
            raise ConfigError(f"{where}{name}: given twice" + (f"; it is called {now}" if name != now else ""))
        if now not in SETTINGS:
            raise ConfigError(f"{where}{no_such_setting(name, SETTINGS)}")
        if not SETTINGS[now].fits(value):
            raise ConfigError(f"{where}{name}: {value!r} is not {SETTINGS[now].kind.__name__}")
        try:
            values[now] = SETTINGS[now].meant(value)
            SETTINGS[now].check(values[now])
            if now == "pool" and value is not None:
                _check_pools(value, values[now])
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
    return values


def _check_pools(written: Sequence[object], texts: Sequence[str]) -> None:
    """Check what pools say, and of those that are tables, the types too: their texts tell no 8 from an "8".

    Raises ConfigError, which names the pool.
    """
    for table, pool in zip(written, parse_pools(texts), strict=False):  # one text alone may stand for the list
        try:
            for dashed, value in table.items() if isinstance(table, Mapping) else ():
                declared = SETTINGS.get(name := dashed.replace("-", "_"))
                if declared is not None and not declared.fits(value):
                    raise ConfigError(f"{name}: {value!r} is not {declared.kind.__name__}")
            for name, text in pool.given:
                pool_value(name, text)
        except ConfigError as error:
            raise ConfigError(f"pool {pool.name}: {error}") from None


def renamed(names: Iterable[str], where: str = "") -> list[str]:
    """Notes on those of the names that settings no longer have."""
    return [
        f"{where}{name}: is called {FORMER[name]} now; the next version no longer knows it"
        for name in names
        if name in FORMER
    ]


def renamed_in(config: Path | None) -> list[str]:
    """Notes on the settings of a TOML file that are called otherwise now. Raises ConfigError."""
    if config is None:
        return []
    return renamed((name.replace("-", "_") for name in read_toml(config, ConfigError)), f"{config}: ")


def recorded_settings(meta: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings that the record with this meta.json was made with. Raises ConfigError, which names ``source``."""
    recorded = {FORMER.get(name, name): value for name, value in (meta.get("settings") or {}).items()}
    weights = meta.get("weights")
    if isinstance(weights, dict) and weights.get("said_by") != SETTINGS["dtype"].option:
        recorded["dtype"] = "auto"  # as the checkpoint says
    values = {}
    for name, declared in SETTINGS.items():
        value = recorded.get(name)
        # Where nothing is not what no flag means, it was asked for: prompts computed whole, for example.
        if value is None and not (name in recorded and declared.zero_is_none):
            continue
        if not declared.fits(value):
            raise ConfigError(f"{source}: settings.{name}: {value!r} is not {declared.kind.__name__}")
        try:
            values[name] = value if declared.read is None else declared.read(value)
        except ConfigError as error:
            raise ConfigError(f"{source}: settings.{error}") from None
    if isinstance(meta.get("model"), str):
        values.setdefault("model", meta["model"])
    return values


def _recorded(folder: Path) -> dict[str, Any]:
    """The settings of a run record, or of the only one in an output folder."""
    from reports.record.run_record import read_meta
    from reports.record.schema import META_FILE

    runs = list(folder.glob(f"*/{META_FILE}"))
    if len(runs) == 1 and not (folder / META_FILE).exists():
        folder = runs[0].parent
    return recorded_settings(read_meta(folder), str(folder / META_FILE))


def _profiled(values: Mapping[str, Any]) -> dict[str, str]:
    """The model and GPU that a profile is of, for what is not given."""
    if {"model", "gpu"} <= values.keys():
        return {}
    found = identity(values.get("cost", RunSettings.cost))
    return {name: value for name, value in found.items() if name in ("model", "gpu")}
