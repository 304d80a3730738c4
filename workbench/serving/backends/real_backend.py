"""A real model behind a server, on a CPU or on GPUs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.cluster.device import DTYPE_NAMES, choose_device, device_name, hardware_on, held_weights, runner_options
from workbench.handover.kv_shares import RanksKV
from workbench.instance import Recipe
from workbench.phase_log import LogIteration
from workbench.scheduler.config import ConfigError
from workbench.serving.backends.live_backend import LiveBackend, LiveKV, SyntheticText, own_tokenizer
from workbench.settings.loading import HardwareOf
from workbench.settings.loop_spec import loop_spec
from workbench.settings.real import check_device_effects, device_defaults
from workbench.settings.run_settings import RunSettings

if TYPE_CHECKING:
    from backends.node_place import NodePlace
    from backends.torch.backend import TorchBackend
    from backends.torch.workers import RunnerOptions


@dataclass(frozen=True)
class RealBackendSpec:
    """``--backend auto``, ``cpu`` or ``cuda``."""

    name: str = "auto"
    load_format: str = "auto"
    place: NodePlace | None = None
    """This machine's among several that hold the model."""
    needs_text: ClassVar[bool] = False
    has_weights: ClassVar[bool] = True

    def here(self) -> RealBackendSpec:
        """Return it on the device that it will run on. Raises ConfigError for a GPU that is not there, ModuleNotFoundError
        without torch."""
        return dataclasses.replace(self, name=choose_device(self.name))

    def at(self, place: NodePlace) -> RealBackendSpec:
        """Return it for one of several machines."""
        return dataclasses.replace(self, place=place)

    def defaults(self) -> dict[str, Any]:
        """Return the settings of a run on the device that are neither given nor those of a simulation."""
        return device_defaults(self.name)

    def hardware(self) -> HardwareOf:
        """Return how to find what the device is to an engine whose defaults go by the GPU."""
        return hardware_on(self.name)

    def check_flags(self, flags: Mapping[str, Any], config: Path | None) -> list[str]:
        """Return notes on settings of the file ``config`` that do nothing here. Raises ConfigError for such a flag."""
        return check_device_effects(flags, config, self.name)

    def check(self, run: RunSettings, loop: str) -> list[str]:
        """Raise ConfigError for what the runner does not do, in any pool, before anything is loaded. It assumes nothing."""
        for pool in run.pools(loop):
            try:
                self.options(dataclasses.replace(pool.settings, dp=1), pool.loop)
            except ConfigError as error:
                raise ConfigError(f"pool {pool.name}: {error}" if run.pool else str(error)) from None
        return []

    @property
    def on_gpus(self) -> bool:
        """Whether each instance takes GPUs of its own."""
        return self.name == "cuda"

    def options(self, run: RunSettings, loop: str) -> RunnerOptions:
        """Return what the runner has to know. Raises ConfigError for what it does not do."""
        return runner_options(run, loop, choose_device(self.name), self.load_format, self.place)

    def tokenizer(self, model: str) -> str | None:
        """Return the model's: only one without weights need not have one."""
        return own_tokenizer(model) if self.load_format == "dummy" else model

    def build(
        self,
        run: RunSettings,
        loop: str,
        text: SyntheticText | None,
        log_iteration: LogIteration,
        epoch_s: float,
    ) -> LiveBackend:
        """Load the model. Raises ValueError, in one line, when it cannot run here."""
        try:
            from backends.torch.backend import make_backend
        except ImportError as error:
            raise ConfigError(f"backend: {self.name} cannot run here: {error}") from error
        options = self.options(run, loop)
        device = options.device
        backend = make_backend(options, log_iteration, began_s=epoch_s)
        tp, pp = run.layout(loop)
        return LiveBackend(
            backend=backend,
            recipe=Recipe(
                loop=loop_spec(run, loop),
                scheduler=run.scheduler(backend.kv_tokens, backend.max_context, run.slots(loop)).for_role(run.role),
                eos_token_ids=backend.eos_token_ids,
                stages=pp,
            ),
            vocab=backend.vocab,
            logprobs=True,
            profiles=True,
            name=device,
            device=device_name(device),
            gpus=tp * pp,
            model=run.model,
            simulated=False,
            packages=("torch",),
            used={"gpu": None, "cost": None, "time_scale": None, "simulated_output_tokens": None},
            kv_budget={},
            weights=held_weights(backend.dtype, run),
            kv_dtype=DTYPE_NAMES[backend.kv_dtype],
            kv=None if run.role == "both" else _kv(backend, run.page_size),
            rested=backend.rested,
            control=backend,
            worked_s=backend.workers.worked_s,
            heard_s=backend.workers.heard_s,
            failure=backend.workers.failure,
            end_asked=backend.workers.end_asked,
            close=backend.close,
        )


def _kv(backend: TorchBackend, page_size: int) -> LiveKV:
    facts = backend.kv_facts()
    workers, pages = backend.workers, backend.kv_tokens // page_size
    memory = RanksKV(facts.shares, pages, workers.read_kv, workers.write_kv, backend.landed)
    return LiveKV(
        memory=memory,
        model=hashlib.sha256(facts.config.encode()).hexdigest(),
        weights=hashlib.sha256("".join(facts.weights).encode()).hexdigest(),
        layers=memory.shape.layers,
        kv_heads=memory.shape.heads,
        head_dim=facts.head_dim,
    )
