"""Settings of what listens for HTTP: a server of a model, or a router before several."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.scheduler.settings import ConfigError, check_settings, setting

SERVER = "Server"
"""Group of flags of what listens."""
BODY_MIB = 16


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """Where it listens, who may use it, and how it ends. Raises ConfigError for what cannot work."""

    host: str = setting("127.0.0.1", group=SERVER, help="Address to listen on. Default {default}: this machine only.")
    port: int = setting(8000, least=0, most=65535, group=SERVER, help="Port; 0 takes a free one. Default {default}.")
    api_key: str | None = setting(
        None,
        group=SERVER,
        envvar="WORKBENCH_API_KEY",
        help="Key that clients must send as a bearer token.",
    )
    admin_key: str | None = setting(
        None,
        group=SERVER,
        envvar="WORKBENCH_ADMIN_KEY",
        help="Key that /workers of a router wants. Default: none on the loopback without --api-key; elsewhere /workers is "
        "refused.",
    )
    allow_origin: tuple[str, ...] = setting(
        (),
        group=SERVER,
        help="Origin whose pages may use the server, such as https://example.org:8443; repeatable; '*' is every page. "
        "Default: none.",
    )
    allow_host: tuple[str, ...] = setting(
        (),
        group=SERVER,
        help="Name that the server answers to beside localhost when it listens on the loopback without a key; "
        "repeatable; '*' is any.",
    )
    max_body_bytes: int = setting(
        BODY_MIB << 20, least=1, group=SERVER, help=f"Largest request body. Default {BODY_MIB} MiB."
    )
    drain_timeout_s: float = setting(
        300.0,
        least=0,
        group=SERVER,
        flag="drain-timeout",
        help="Seconds that requests have to finish after SIGTERM. Default {default}.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_api_key("api_key", self.api_key)
        check_api_key("admin_key", self.admin_key)


def check_api_key(name: str, key: str | None) -> None:
    """Raise ConfigError for a key, given as ``name``, that no header can carry."""
    if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(f"{name}: is empty, not printable ASCII, or has a space around it")
