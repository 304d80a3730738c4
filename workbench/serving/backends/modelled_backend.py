"""A modelled GPU behind a server: it waits as long as the GPU would compute, and its answers are made up."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from backends.node_place import NodePlace
from traces.requests.lengths import parse_lengths
from workbench.handover.kv_shares import RanksKV
from workbench.phase_log import LogIteration
from workbench.scheduler.config import ConfigError
from workbench.serving.backends.live_backend import LiveBackend, LiveKV, SyntheticText, own_tokenizer
from workbench.settings.loading import HardwareOf, modelled_hardware, settings_from
from workbench.settings.run_settings import RunSettings

if TYPE_CHECKING:
    from workbench.cluster.resolve import SimulatedRecipe


@dataclass(frozen=True)
class ModelledBackendSpec:
    """``--backend simulated``."""

    name: ClassVar[str] = "simulated"
    needs_text: ClassVar[bool] = True
    on_gpus: ClassVar[bool] = False
    has_weights: ClassVar[bool] = False
    time_scale: float = 1.0
    """Real seconds per modelled second."""
    output_tokens: str | None = None
    """Distribution of output lengths; None: as long as the client allows."""

    def here(self) -> ModelledBackendSpec:
        """Return it: it runs everywhere."""
        return self

    def at(self, place: NodePlace) -> ModelledBackendSpec:
        """Fail: its machines are modelled, too."""
        raise AssertionError("a modelled backend has no machines of its own")

    def defaults(self) -> dict[str, Any]:
        """Return nothing: its defaults are those of a simulation."""
        return {}

    def hardware(self) -> HardwareOf:
        """Return how to find what the modelled GPU is to an engine whose defaults go by it."""
        return modelled_hardware

    def check_flags(self, flags: Mapping[str, Any], config: Path | None) -> list[str]:
        """Return notes on keys of the GPU's file that are called otherwise now: it has a use for all settings.

        Raises ConfigError or CatalogueError for files that cannot be read.
        """
        from backends.simulated.catalogue.gpu_specs import renamed_in_gpu

        return renamed_in_gpu(settings_from(config, flags).gpu)

    def check(self, run: RunSettings, loop: str) -> list[str]:
        """Return notes on links that are assumed. Raises ValueError, in one line, for settings that do not go together."""
        from workbench.cluster.pools import assumed_links, resolve_pools

        return [*assumed_links(resolve_pools(run, loop))]

    def tokenizer(self, model: str) -> str | None:
        """Return the model's own, if it has one."""
        return own_tokenizer(model)

    def build(
        self,
        run: RunSettings,
        loop: str,
        text: SyntheticText | None,
        log_iteration: LogIteration,
        epoch_s: float,
    ) -> LiveBackend:
        """Build it, to write ``text``. Raises ValueError, in one line, for settings that do not go together."""
        from backends.simulated.realtime import RealtimeBackend
        from backends.simulated.synthetic import SyntheticSampler
        from workbench.cluster.resolve import resolve

        assert text is not None, "it has nothing else to write"
        recipe = resolve(run, loop)
        sampler = SyntheticSampler(
            text.writable_ids,
            text.eos_token_id,
            recipe.rows,
            output_lengths(self.output_tokens, run.seed),
            text.closing_ids,
        )
        backend = RealtimeBackend(
            recipe.cost,
            sampler,
            log_iteration,
            lambda: time.monotonic() - epoch_s,
            self.time_scale,
            recipe.stages,
            recipe.copies(),
        )
        return LiveBackend(
            backend=backend,
            recipe=dataclasses.replace(recipe, eos_token_ids=(text.eos_token_id,)),
            vocab=max(recipe.model.vocab, text.eos_token_id + 1, int(text.writable_ids.max()) + 1),
            logprobs=False,
            profiles=False,
            name=self.name,
            device=recipe.gpu.name,
            gpus=recipe.gpus,
            model=recipe.model.name,
            simulated=True,
            packages=(),
            used={"time_scale": self.time_scale, "simulated_output_tokens": self.output_tokens},
            kv_budget=recipe.kv_budget,
            weights=recipe.weights.described,
            kv_dtype=recipe.kv_dtype,
            kv=None if run.role == "both" else _kv(recipe, self.time_scale),
            rested=backend.rested,
            control=ModelledControl(),
            worked_s=backend.worked_s,
            heard_s=time.monotonic,
            close=lambda: None,
            cost_notes=lambda: [*recipe.notes, *getattr(recipe.cost, "notes", ())],
        )


def _kv(recipe: SimulatedRecipe, time_scale: float) -> LiveKV:
    from backends.checkpoint.layer_kinds import Attention
    from backends.simulated.kv_layout import kv_between
    from backends.simulated.live_pages import ModelledPages

    model, page = recipe.model, recipe.scheduler.page_size
    sent = kv_between(model, recipe.kv_dtype, recipe.tp, recipe.keeps_windows)
    port = recipe.port
    held = ModelledPages(
        recipe.scheduler.pages, sent.pages_bytes(1, page) / port.bytes_s * time_scale, port.latency_s * time_scale
    )
    memory = RanksKV([held.share], held.pages, held.read, held.write)
    heads = [layer.mixer.kv_heads for layer in model.stack if isinstance(layer.mixer, Attention)]
    return LiveKV(
        memory=memory,
        model=hashlib.sha256(repr(model).encode()).hexdigest(),
        weights="modelled",
        layers=model.layers,
        kv_heads=max(heads, default=0),
        head_dim=0,
    )


class ModelledControl:
    """Neither weights nor anything that a profiler could see."""

    def check_weights(self, folder: str) -> None:
        """Refuse."""
        raise ValueError("the simulated backend has no weights to update")

    def write_weights(self) -> None:
        """Fail: nothing was checked."""
        raise AssertionError("there is nothing that could have been checked")

    def start_profile(self, folder: str, steps: int | None) -> None:
        """Refuse."""
        raise ValueError(
            "the simulated backend has no device to profile; the timeline of the report that --record leaves has its steps"
        )

    def stop_profile(self) -> list[str]:
        """Refuse."""
        raise ValueError("no profile is running")


def output_lengths(spec: str | None, seed: int) -> Callable[[int], int | None]:
    """Return the length of a synthetic answer as a function of its key: the same prompt, the same length.

    Raises ConfigError for a distribution that cannot be read.
    """
    if spec is None:
        return lambda key: None
    try:
        lengths = parse_lengths(spec)
    except ValueError as error:
        raise ConfigError(f"simulated_output_tokens: {error}") from error
    return lambda key: lengths.draw(np.random.default_rng((seed, key)))
