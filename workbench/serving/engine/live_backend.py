"""The backend behind a server, by name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.requests.lengths import parse_lengths
from workbench.backend import Backend
from workbench.cluster.device import DTYPE_NAMES, choose_device, device_name, held_weights, runner_options
from workbench.instance import Recipe
from workbench.scheduler.config import ConfigError
from workbench.serving.engine.upkeep import ModelledGPU, Upkeep
from workbench.serving.serve_settings import ServeSettings
from workbench.settings.loop_spec import loop_spec


@dataclass(frozen=True)
class SyntheticText:
    """What a simulated model may write."""

    writable_ids: np.ndarray
    eos_token_id: int


@dataclass(frozen=True)
class LiveBackend:
    """A backend ready to run, and what the server has to know of it."""

    backend: Backend
    recipe: Recipe
    vocab: int
    logprobs: bool
    name: str
    device: str
    gpus: int
    model: str
    kv_budget: dict[str, Any]
    weights: dict[str, Any]
    """Their `dtype`, in our words, and who said it."""
    kv_dtype: str
    """Of keys and values, in our words."""
    rested: Callable[[], None]
    """To be called when a wait of its loop is over."""
    upkeep: Upkeep
    worked_s: Callable[[], float]
    """Grows while a batch computes, and stands while none does, whatever waits for it."""
    heard_s: Callable[[], float]
    """``time.monotonic()`` when the process that computes and is silent longest was last heard of."""
    close: Callable[[], None]
    """To be called at the end."""


def make_backend(
    settings: ServeSettings, text: SyntheticText | None, log_iteration: Callable[..., None], epoch_s: float
) -> LiveBackend:
    """Build the backend that ``settings`` ask for; ``text`` is needed by the simulated one. Times of iterations count from
    ``epoch_s`` of the monotonic clock.

    Raises ValueError, in one line, when it cannot run here.
    """
    if settings.backend != "simulated":
        return _torch(settings, log_iteration, epoch_s)
    assert text is not None
    return _simulated(settings, text, log_iteration, epoch_s)


def _simulated(
    settings: ServeSettings, text: SyntheticText, log_iteration: Callable[..., None], epoch_s: float
) -> LiveBackend:
    from backends.simulated.realtime import RealtimeBackend
    from backends.simulated.synthetic import SyntheticSampler
    from workbench.cluster.resolve import resolve

    instance = resolve(settings.run, settings.loop)
    run = settings.run
    sampler = SyntheticSampler(
        text.writable_ids,
        text.eos_token_id,
        instance.rows,
        output_lengths(settings.simulated_output_tokens, run.seed),
    )
    backend = RealtimeBackend(
        instance.cost, sampler, log_iteration, lambda: time.monotonic() - epoch_s, settings.time_scale, instance.stages
    )
    vocab = max(instance.model.vocab, text.eos_token_id + 1, int(text.writable_ids.max()) + 1)
    return LiveBackend(
        backend,
        dataclasses.replace(instance, eos_token_ids=(text.eos_token_id,)),
        vocab,
        False,
        "simulated",
        instance.gpu.name,
        instance.gpus,
        instance.model.name,
        instance.kv_budget,
        instance.weights.described,
        run.kv_dtype,
        backend.rested,
        ModelledGPU(),
        backend.worked_s,
        time.monotonic,
        lambda: None,
    )


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


def _torch(settings: ServeSettings, log_iteration: Callable[..., None], epoch_s: float) -> LiveBackend:
    try:
        from backends.torch.backend import make_backend as make_torch_backend
    except ImportError as error:
        raise ConfigError(f"backend: {settings.backend} cannot run here: {error}") from error
    device = choose_device(settings.backend)
    options = runner_options(settings.run, settings.loop, device, settings.load_format)
    backend = make_torch_backend(options, log_iteration, began_s=epoch_s)
    tp, pp = settings.run.layout(settings.loop)
    config = settings.run.scheduler(backend.kv_tokens, backend.max_context, settings.run.slots(settings.loop))
    return LiveBackend(
        backend,
        Recipe(
            loop=loop_spec(settings.run, settings.loop),
            scheduler=config,
            eos_token_ids=backend.eos_token_ids,
            stages=pp,
        ),
        backend.vocab,
        True,
        device,
        device_name(device),
        tp * pp,
        settings.run.model,
        {},
        held_weights(backend.dtype, settings.run),
        DTYPE_NAMES[backend.kv_dtype],
        backend.rested,
        backend,
        backend.workers.worked_s,
        backend.workers.heard_s,
        backend.close,
    )
