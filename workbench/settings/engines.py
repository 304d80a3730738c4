"""Engines by name: presets of settings, captured graphs, CPU phases and front ends (``engines.toml``)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

from ground.value_file import read_toml
from workbench.scheduler.config import ConfigError

PRESETS = Path(__file__).parent / "engines.toml"
_SHORT = "short"
GRAPH_KEYS = frozenset({"most", "mixed"})
"""What `[NAME.graphs]` holds."""
GPU_KEYS = frozenset({"below_gib", "named", "tp", "graphs"})
"""What `[[NAME.gpus]]` holds beside settings."""

SHARED_KEY = "divides"
"""What `[NAME.shared]` holds beside settings."""


@dataclass(frozen=True)
class Hardware:
    """What an engine's defaults go by."""

    gpu: str
    memory_bytes: float
    tp: int = 1
    ep: int = 1


@dataclass(frozen=True)
class Engine:
    """One preset."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Under the names of the flags."""
    graphs: dict[str, Any] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    """Fields of the host model."""
    gpu_step_s: float = 0.0
    """GPU time of a step beside the model."""
    exchange: dict[str, Any] = field(default_factory=dict)
    """What is its own in how tokens reach experts on other GPUs: fields of the simulator's rule."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Settings of instances that share their experts (DP attention); `divides` names those that all have together."""
    kv: dict[str, Any] = field(default_factory=dict)
    """How it reserves KV where layers do not keep every token: fields of the simulator's rule."""
    page_entry_bytes: int = 0
    """Of the page table that the host sends before every step, 0 if it sends none."""
    front_end: dict[str, float] = field(default_factory=dict)
    """Fields of the model of its front end; empty: nobody knows."""
    gpus: tuple[dict[str, Any], ...] = ()
    """Settings and graphs that go by the GPU, the first of which holds that fits."""
    offers: dict[str, list[Any]] = field(default_factory=dict)
    """Of settings that it has not, or has fewer values of, those that it has."""
    tunable: tuple[str, ...] = ()
    """Rules of engines that it can be told otherwise."""

    def on(self, hardware: Hardware) -> Engine:
        """The preset as the engine resolves its defaults on this hardware."""
        instances = hardware.ep // hardware.tp if self.shared and hardware.ep > hardware.tp else 1
        found = self
        for case in self.gpus:
            if _holds(case, replace(hardware, tp=hardware.tp * instances)):
                settings = {name: value for name, value in case.items() if name not in GPU_KEYS}
                graphs = {**self.graphs, "most": case["graphs"]} if "graphs" in case else self.graphs
                found = replace(self, settings={**self.settings, **settings}, graphs=graphs)
                break
        if instances == 1:
            return found
        others = {name: value for name, value in self.shared.items() if name != SHARED_KEY}
        divided = {name: found.settings[name] // instances for name in self.shared.get(SHARED_KEY, ())}
        return replace(found, settings={**found.settings, **divided, **others})

    def capture_sizes(self, max_running: int) -> list[int] | None:
        """Batches for which decode graphs are captured; None: the default of the cost models."""
        if not self.graphs:
            return None
        return _sizes(min(self.graphs["most"], _next_size(max_running)))

    def gpu_request_s(self, max_context: int, page_size: int, gpu_bytes_per_s: float) -> float:
        """GPU time of a step for each request in it: receiving its row of the page table."""
        return self.page_entry_bytes * -(-max_context // page_size) / gpu_bytes_per_s

    def mixed_capture_sizes(self, max_running: int) -> list[int]:
        """Token counts for which everything but the attention of a step with prompt tokens is captured."""
        if not self.graphs.get("mixed"):
            return []
        return _sizes(min(self.graphs["most"], 2 * max_running))


_PARTS = frozenset(each.name for each in fields(Engine)) - {"name", "settings"}
"""What a preset says beside settings."""


def load_engine(name: str) -> Engine:
    """A preset by its name or a short one. Raises ConfigError for one that does not exist."""
    exact = exact_name(name)
    values = dict(_presets()[exact])
    above = load_engine(values.pop("extends")) if "extends" in values else Engine(exact)
    own = {part: values.pop(part) for part in _PARTS if part in values}
    for part, said in own.items():
        if isinstance(said, list):
            own[part] = tuple(said)
        elif isinstance(said, dict):
            own[part] = {**getattr(above, part), **said}
    return replace(above, name=exact, settings={**above.settings, **values}, **own)


def _holds(case: dict[str, Any], hardware: Hardware) -> bool:
    """Tell whether a case of `[[NAME.gpus]]` is of this hardware."""
    named = "named" not in case or any(name in hardware.gpu for name in case["named"])
    fits = hardware.memory_bytes < case.get("below_gib", inf) * 2**30
    return named and fits and hardware.tp >= case.get("tp", 1)


def exact_name(name: Any) -> str:
    """The name of a preset, with the version whose decisions it has, of that or a short one. Raises ConfigError."""
    presets, short = _presets(), short_names()
    if not isinstance(name, str):
        raise ConfigError(f"engine: {name!r} is not str")
    if name in presets:
        return name
    if name not in short:
        near = difflib.get_close_matches(name, [*presets, *short], 3, 0.3)
        hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(presets)}"
        raise ConfigError(f"engine: {name!r} is not known; {hint}")
    return short[name]


def engine_names() -> list[str]:
    """Names of the presets."""
    return list(_presets())


def short_names() -> dict[str, str]:
    """Short names, and the presets that they stand for."""
    return _tables()[_SHORT]


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return {name: values for name, values in _tables().items() if name != _SHORT}


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return read_toml(PRESETS)


def _sizes(most: int) -> list[int]:
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)) if size <= most]


def _next_size(count: int) -> int:
    """The smallest captured size that holds ``count``."""
    return next((size for size in _sizes(8192) if size >= count), count)
