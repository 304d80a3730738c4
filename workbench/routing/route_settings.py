"""Settings of a router on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from workbench.scheduler.config import Role
from workbench.scheduler.settings import ConfigError, setting, settings_of
from workbench.serving.listen_settings import SERVER, ListenSettings, check_api_key
from workbench.settings.run_settings import RunSettings

WORKERS, HEALTH, QUEUE = "Workers", "Health of workers", "Queue"
"""Groups of flags of a router's own."""


@dataclass(frozen=True, kw_only=True)
class RouteSettings(ListenSettings):
    """Everything that ``workbench route`` is told. Raises ConfigError for what cannot work."""

    port: int = setting(8080, least=0, most=65535, group=SERVER, help="Port; 0 takes a free one. Default {default}.")
    worker: tuple[str, ...] = setting((), group=WORKERS, help="URL of a server that serves whole requests; repeatable.")
    prefill: tuple[str, ...] = setting(
        (), group=WORKERS, help="URL of a server of role prefill; repeatable. Goes with --decode."
    )
    decode: tuple[str, ...] = setting((), group=WORKERS, help="URL of a server of role decode; repeatable.")
    worker_api_key: str | None = setting(
        None,
        group=WORKERS,
        envvar="WORKBENCH_WORKER_API_KEY",
        help="Key that workers are sent in place of the client's.",
    )
    session_header: str = setting(
        "x-session-id",
        group=WORKERS,
        help="Header that names a request's session where the body has no session_id. Default {default}.",
    )
    connect_timeout_s: float = setting(
        5.0, above=0, group=WORKERS, flag="connect-timeout", help="Seconds to reach a worker. Default {default}."
    )
    first_byte_timeout_s: float = setting(
        600.0,
        above=0,
        group=WORKERS,
        flag="first-byte-timeout",
        help="Seconds that a worker has until the first byte of its answer. Default {default}.",
    )
    silence_timeout_s: float = setting(
        600.0,
        above=0,
        group=WORKERS,
        flag="silence-timeout",
        help="Seconds without a byte after which an answer that has begun is given up. Default {default}.",
    )
    retries: int = setting(
        2,
        least=0,
        group=WORKERS,
        help="How often a request is sent again, to another worker if there is one, before its first byte. "
        "Default {default}.",
    )
    health_path: str = setting(
        "/health", group=HEALTH, help="Path that tells whether a worker is well. Default {default}."
    )
    health_interval_s: float = setting(
        5.0,
        above=0,
        group=HEALTH,
        flag="health-interval",
        help="Seconds between two looks at a worker. Default {default}.",
    )
    health_timeout_s: float = setting(
        5.0, above=0, group=HEALTH, flag="health-timeout", help="Seconds that it has to answer. Default {default}."
    )
    health_failures: int = setting(
        3, least=1, group=HEALTH, help="Looks in a row that fail before it gets nothing new. Default {default}."
    )
    breaker_failures: int | None = setting(
        5,
        least=1,
        group=HEALTH,
        zero_is_none=True,
        help="Requests in a row that a worker fails before its breaker opens; 0: it never does. Default {default}.",
    )
    breaker_open_s: float = setting(
        30.0,
        above=0,
        group=HEALTH,
        flag="breaker-open-for",
        help="Seconds that an open breaker lets nothing through; then one request at a time is tried. Default {default}.",
    )
    breaker_successes: int = setting(
        2, least=1, group=HEALTH, help="Such requests in a row that close it again. Default {default}."
    )
    worker_requests: int | None = setting(
        None,
        least=1,
        group=QUEUE,
        zero_is_none=True,
        help="Requests under way at a worker; others wait here. 0, the default: no limit, they wait there.",
    )
    max_queue: int = setting(
        1000, least=0, group=QUEUE, help="Requests that may wait here; more are answered 503. Default {default}."
    )
    queue_timeout_s: float = setting(
        60.0, above=0, group=QUEUE, flag="queue-timeout", help="Seconds that one may wait; then 503. Default {default}."
    )
    router: str = RunSettings.router
    decode_router: str | None = None

    def __post_init__(self) -> None:
        for name in ("worker", "prefill", "decode"):
            object.__setattr__(self, name, tuple(parse_url(name, url) for url in getattr(self, name)))
        super().__post_init__()
        for name in ("router", "decode_router"):
            settings_of(RunSettings)[name].check(getattr(self, name))
        check_api_key("worker_api_key", self.worker_api_key)
        if self.worker and (self.prefill or self.decode):
            raise ConfigError("worker: serves whole requests and does not go with prefill and decode")
        if bool(self.prefill) != bool(self.decode):
            given, missing = ("prefill", "decode") if self.prefill else ("decode", "prefill")
            raise ConfigError(f"{given}: a pair needs a --{missing} URL, too")
        if not self.worker and not self.prefill:
            raise ConfigError("worker: say where they are: --worker URL, or --prefill URL and --decode URL")
        seen: set[str] = set()
        for url in (*self.worker, *self.prefill, *self.decode):
            if url in seen:
                raise ConfigError(f"worker: {url} is given twice")
            seen.add(url)
        if self.decode_router is not None and not self.paired:
            raise ConfigError("decode_router: has no effect without --decode")
        if not self.health_path.startswith("/"):
            raise ConfigError(f"health_path: {self.health_path!r} does not begin with /")
        if not _is_header(self.session_header):
            raise ConfigError(f"session_header: {self.session_header!r} is not the name of a header")

    @property
    def paired(self) -> bool:
        """Whether requests are shared by a prefill and a decode worker."""
        return bool(self.prefill)

    @property
    def given(self) -> list[tuple[Role, str]]:
        """Role and URL of every worker."""
        roles: tuple[tuple[Role, tuple[str, ...]], ...] = (
            ("both", self.worker),
            ("prefill", self.prefill),
            ("decode", self.decode),
        )
        return [(role, url) for role, urls in roles for url in urls]

    def router_of(self, role: Role) -> str:
        """The kind of router among workers of a role."""
        return self.decode_router or self.router if role == "decode" else self.router


def parse_url(name: str, given: str) -> str:
    """Return the URL of a worker without its slash or /v1 at the end. Raises ConfigError for what is none."""
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError:
        raise ConfigError(f"{name}: {given!r} is not a URL such as http://127.0.0.1:8000") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not given.isascii() or " " in given:
        raise ConfigError(f"{name}: {given!r} is not a URL such as http://127.0.0.1:8000")
    if any(not 0 < len(label) < 64 for label in parts.hostname.rstrip(".").split(".")) or not parts.path.isprintable():
        raise ConfigError(f"{name}: {given[:80]!r}: there is no such host or path")
    if parts.query or parts.fragment or parts.username is not None or parts.password is not None or port == 0:
        raise ConfigError(f"{name}: {given!r}: a scheme, a name, perhaps a port and a path, and nothing else")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def _is_header(name: str) -> bool:
    return name.isascii() and bool(name) and all(c.isalnum() or c in "!#$%&'*+-.^_`|~" for c in name)
