"""The backend behind a server, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.simulated.cost.roofline import RooflineCost
from backends.simulated.realtime import RealtimeBackend
from backends.simulated.synthetic import SyntheticSampler
from traces.lengths import parse_lengths
from workbench.backend import Backend
from workbench.run.settings import Instance, resolve
from workbench.scheduler.config import ConfigError, SchedulerConfig
from workbench.serving.settings import ServeSettings


@dataclass(frozen=True)
class SyntheticText:
    """What a simulated model may write."""

    writable_ids: np.ndarray
    eos_token_id: int


@dataclass(frozen=True)
class LiveBackend:
    """A backend ready to run, and what the server has to know of it."""

    backend: Backend
    scheduler: SchedulerConfig
    eos_token_ids: tuple[int, ...]
    vocab: int
    logprobs: bool
    name: str
    device: str
    gpus: int
    kv_budget: dict[str, Any]


def make_backend(settings: ServeSettings, text: SyntheticText | None, log_iteration: Callable[..., None],
                 now_s: Callable[[], float]) -> LiveBackend:  # fmt: skip
    """Build the backend that ``settings`` ask for; ``text`` is needed by the simulated one.

    Raises ValueError, in one line, when it cannot run here.
    """
    instance = resolve(settings.run, settings.loop)
    if settings.backend == "simulated":
        assert text is not None
        return _simulated(settings, instance, text, log_iteration, now_s)
    return _torch(settings, instance, log_iteration)


def _simulated(settings: ServeSettings, instance: Instance, text: SyntheticText, log_iteration: Callable[..., None],
               now_s: Callable[[], float]) -> LiveBackend:  # fmt: skip
    run, config = settings.run, instance.scheduler
    cost = RooflineCost(
        instance.model, instance.gpu, dtype=run.dtype, kv_dtype=run.kv_dtype, tp=instance.tp, pp=instance.pp, ep=run.ep,
        capture_sizes=instance.capture_sizes,
    )  # fmt: skip
    sampler = SyntheticSampler(
        text.writable_ids, text.eos_token_id, config.max_running_per_slot * config.slots,
        output_lengths(settings.simulated_output_tokens, run.seed),
    )  # fmt: skip
    backend = RealtimeBackend(cost, sampler, log_iteration, now_s, settings.time_scale, instance.pp)
    vocab = max(instance.model.vocab, text.eos_token_id + 1, int(text.writable_ids.max()) + 1)
    return LiveBackend(
        backend, config, (text.eos_token_id,), vocab, False, "simulated", instance.gpu.name,
        instance.tp * instance.pp, instance.kv_budget,
    )  # fmt: skip


def output_lengths(spec: str | None, seed: int) -> Callable[[int], int | None]:
    """The length of a synthetic answer as a function of its key: the same prompt, the same length.

    Raises ConfigError for a distribution that cannot be read.
    """
    if spec is None:
        return lambda key: None
    try:
        lengths = parse_lengths(spec)
    except ValueError as error:
        raise ConfigError(f"simulated_output_tokens: {error}") from error
    return lambda key: lengths.draw(np.random.default_rng((seed, key)))


def _torch(settings: ServeSettings, instance: Instance, log_iteration: Callable[..., None]) -> LiveBackend:
    try:
        from backends.torch.backend import make_backend as make_torch_backend  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(f"backend: {settings.backend} cannot run here: {error}") from error
    backend: Any = make_torch_backend(settings, instance, log_iteration)
    config = dataclasses.replace(
        instance.scheduler, kv_tokens=backend.kv_tokens, max_context=min(backend.max_context, backend.kv_tokens + 1)
    )
    return LiveBackend(
        backend, config, tuple(backend.eos_token_ids), instance.model.vocab, True, settings.backend,
        str(getattr(backend, "device", settings.backend)), instance.tp * instance.pp, {},
    )  # fmt: skip
