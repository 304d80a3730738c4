"""Engines by name: presets of settings, captured graphs and CPU phases (``engines.toml``)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ground.value_file import read_toml
from workbench.scheduler.config import ConfigError

PRESETS = Path(__file__).parent / "engines.toml"
_SHORT = "short"
GRAPH_KEYS = frozenset({"most", "mixed"})
"""What `[NAME.graphs]` holds."""


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
    kv: dict[str, Any] = field(default_factory=dict)
    """How it reserves KV where layers do not keep every token: fields of the simulator's rule."""
    page_entry_bytes: int = 0
    """Of the page table that the host sends before every step, 0 if it sends none."""

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


def load_engine(name: str) -> Engine:
    """A preset by its name or a short one. Raises ConfigError for one that does not exist."""
    exact = exact_name(name)
    values = dict(_presets()[exact])
    above = load_engine(values.pop("extends")) if "extends" in values else Engine(exact)
    graphs, host = values.pop("graphs", above.graphs), values.pop("host", above.host)
    kv = values.pop("kv", above.kv)
    gpu_step_s = values.pop("gpu_step_s", above.gpu_step_s)
    page_entry_bytes = values.pop("page_entry_bytes", above.page_entry_bytes)
    return Engine(exact, {**above.settings, **values}, graphs, host, gpu_step_s, kv, page_entry_bytes)


def exact_name(name: Any) -> str:
    """The name of a preset, with the version whose decisions it has, of that or a short one. Raises ConfigError."""
    presets, short = _presets(), short_names()
    if not isinstance(name, str):
        raise ConfigError(f"engine: {name!r} is not str")
    if name in presets:
        return name
    if name not in short:
        near = difflib.get_close_matches(name, [*presets, *short], 1, 0.3)
        hint = f"nearest: {near[0]}; " if near else ""
        raise ConfigError(f"engine: {name!r} is not known; {hint}known: {', '.join([*presets, *short])}")
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
