"""``--backend``: the one place that knows what its names mean. Everything else asks what was made from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from workbench.scheduler.config import ConfigError

if TYPE_CHECKING:
    from workbench.serving.backends.live_backend import BackendSpec

BackendName = Literal["auto", "cpu", "cuda", "simulated"]
BACKEND_SETTINGS = ("backend", "load_format", "time_scale", "simulated_output_tokens")
"""The settings of a server that :func:`backend_spec` takes."""


def backend_spec(
    backend: str = "auto",
    load_format: str = "auto",
    time_scale: float = 1.0,
    simulated_output_tokens: str | None = None,
) -> BackendSpec:
    """Return what a backend is made from. Only building a modelled one loads the simulator.

    Raises ConfigError for another name, and for what is said of the other kind of backend.
    """
    if backend not in get_args(BackendName):
        raise ConfigError(f"backend: {backend!r} is not one of {', '.join(get_args(BackendName))}")
    if backend == "simulated":
        if load_format != "auto":
            raise ConfigError("load_format: a simulated model has no weights to load")
        from workbench.serving.backends.modelled_backend import ModelledBackendSpec

        return ModelledBackendSpec(time_scale, simulated_output_tokens)
    for name, given in (
        ("time_scale", time_scale != 1.0),
        ("simulated_output_tokens", simulated_output_tokens is not None),
    ):
        if given:
            raise ConfigError(f"{name}: is for --backend simulated")
    from workbench.serving.backends.real_backend import RealBackendSpec

    return RealBackendSpec(backend, load_format)
