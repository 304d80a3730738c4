"""The backend behind a server: what it is made from, and what the server has to know of it once it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.node_place import NodePlace
from workbench.backend import Backend
from workbench.handover.kv_shares import KVMemory
from workbench.instance import Recipe
from workbench.phase_log import LogIteration
from workbench.serving.backends.backend_control import BackendControl
from workbench.settings.loading import HardwareOf
from workbench.settings.run_settings import RunSettings


@dataclass(frozen=True)
class SyntheticText:
    """Vocabulary of a model that makes its answers up."""

    writable_ids: np.ndarray
    eos_token_id: int
    closing_ids: np.ndarray
    """Tokens that end a part of a JSON document."""


@dataclass(frozen=True, kw_only=True)
class LiveKV:
    """The KV of an instance that shares requests with others, and what it is the KV of."""

    memory: KVMemory
    model: str
    """A hash of the model's configuration."""
    weights: str
    """A hash of samples of its weights."""
    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class LiveBackend:
    """A backend ready to run."""

    backend: Backend
    recipe: Recipe
    vocab: int
    logprobs: bool
    """It can report log probabilities."""
    profiles: bool
    """It has something that a profiler can see."""
    name: str
    device: str
    gpus: int
    model: str
    simulated: bool
    """Its times are modelled."""
    packages: tuple[str, ...]
    """Those whose versions count for its times, beside numpy."""
    used: dict[str, Any]
    """Settings of its own kind as a record has them, None those that another kind has."""
    kv_budget: dict[str, Any]
    weights: dict[str, Any]
    """Their `dtype`, in our words, and who said it."""
    kv_dtype: str
    """Of keys and values, in our words."""
    rested: Callable[[], None]
    """To be called when a wait of its loop is over."""
    control: BackendControl
    worked_s: Callable[[], float]
    """Grows while a batch computes, and stands while none does, whatever waits for it."""
    heard_s: Callable[[], float]
    """``time.monotonic()`` when the process that computes and is silent longest was last heard of."""
    close: Callable[[], None]
    """To be called at the end."""
    kv: LiveKV | None = None
    """For instances that prefill or decode alone."""
    failure: Callable[[], str | None] = lambda: None
    """What has ended while nobody waited for it, in one line; None while nothing has."""
    end_asked: Callable[[], str | None] = lambda: None
    """Who, beside the server's own process, was told to end it, in words."""
    cost_notes: Callable[[], list[str]] | None = None
    """What a cost model had to say of its predictions so far; None: times are measured."""


class BackendSpec(Protocol):
    """Specification of a server's backend, before any process is started. Other processes get a copy."""

    @property
    def name(self) -> str:
        """Name of the backend, as ``--backend`` has it."""
        ...

    @property
    def needs_text(self) -> bool:
        """It cannot be built before the tokenizer has said what may be written."""
        ...

    @property
    def on_gpus(self) -> bool:
        """Each instance takes GPUs of its own, of those that there are."""
        ...

    @property
    def has_weights(self) -> bool:
        """There are weights to replace, and a device to profile."""
        ...

    def here(self) -> BackendSpec:
        """Return it for this machine. Raises ConfigError where it cannot run here."""
        ...

    def at(self, place: NodePlace) -> BackendSpec:
        """Return it for one of several machines that hold its model."""
        ...

    def defaults(self) -> dict[str, Any]:
        """Return the settings of a run on it that are neither given nor those of a simulation."""
        ...

    def hardware(self) -> HardwareOf:
        """Return how to find what it runs on to an engine whose defaults go by the GPU."""
        ...

    def check_flags(self, flags: Mapping[str, Any], config: Path | None) -> list[str]:
        """Return notes on settings of the file ``config`` that do nothing here, and on keys of a GPU's file that are called
        otherwise now. Raises ConfigError for a flag that does nothing."""
        ...

    def check(self, run: RunSettings, loop: str) -> list[str]:
        """Return notes on what it assumes of settings, before anything is loaded. Raises ValueError, in one line, for those
        that it cannot run with."""
        ...

    def tokenizer(self, model: str) -> str | None:
        """Return where the tokenizer of ``model`` is; None: it has none, and bytes are its tokens."""
        ...

    def build(
        self,
        run: RunSettings,
        loop: str,
        text: SyntheticText | None,
        log_iteration: LogIteration,
        epoch_s: float,
    ) -> LiveBackend:
        """Build it. ``text`` is there if it is needed; times of iterations count from ``epoch_s`` of the monotonic clock.

        Raises ValueError, in one line, when it cannot run here.
        """
        ...


def own_tokenizer(model: str) -> str | None:
    """Return where the tokenizer is of a model that need not have one: in its folder, if at all."""
    return model if (Path(model) / "tokenizer.json").is_file() else None
