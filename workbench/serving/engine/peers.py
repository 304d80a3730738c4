"""The peers of a server's instance: where they connect, who it is to them, and the wire to them."""

from __future__ import annotations

import socket
from collections.abc import Callable

from workbench.handover.addresses import join_address
from workbench.handover.identity import VERSION, Identity
from workbench.handover.live_wire import LiveWire
from workbench.handover.wire_state import WireSettings
from workbench.scheduler.config import ConfigError
from workbench.serving.backends.live_backend import LiveBackend
from workbench.serving.listening import listen
from workbench.serving.peer_keys import shared_key
from workbench.serving.serve_settings import ServeSettings


def listen_to_peers(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens for peers. Raises ConfigError."""
    try:
        return listen(settings.peer_host, settings.peer_port, backlog=256)
    except ConfigError as error:
        raise ConfigError(f"peer_host: {error}") from error


def wire_of(
    settings: ServeSettings, built: LiveBackend, instance_id: str, listener: socket.socket, wake: Callable[[], None]
) -> LiveWire:
    """Return the wire of an instance that prefills or decodes alone. Raises ConfigError where its key cannot be had."""
    kv, config = built.kv, built.recipe.scheduler
    assert kv is not None
    identity = Identity(
        version=VERSION,
        role=config.role,
        address=join_address(*listener.getsockname()[:2]),
        instance_id=instance_id,
        model=kv.model,
        weights=kv.weights,
        page_size=config.page_size,
        kv_dtype=built.kv_dtype,
        layers=kv.layers,
        kv_heads=kv.kv_heads,
        head_dim=kv.head_dim,
    )
    asked = WireSettings(
        key=shared_key(settings.peer_key, settings.peer_host),
        carrier=settings.kv_transfer,
        timeout_s=settings.peer_timeout_s,
        loopback_only=settings.peer_key is None,
    )
    return LiveWire(identity, kv.memory, listener, wake, asked)
