"""Use of the server from browsers: checks of Host, Origin and Content-Type, and CORS.

A page of any site can send requests to a server on this machine without its user's knowledge: a form, or a ``fetch`` of
plain text, is sent without asking first; and a name that the site's owner points at 127.0.0.1 (DNS rebinding) makes page and
server the same site. So what changes something or costs work is refused to pages of other origins, a body has to be JSON,
which no page of another origin may send unasked, and a server without a key on the loopback answers to its names only.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from workbench.scheduler.config import ConfigError
from workbench.serving.http import request_ids
from workbench.serving.http.errors import ApiError, error_response
from workbench.serving.listen_settings import ListenSettings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Nothing is changed by these, and no page of another origin can read what they answer."""
EXPOSED_HEADERS = ("retry-after", request_ids.HEADER)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::(?P<port>[0-9]{0,5}))?")
_UTF8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})


@dataclass(frozen=True)
class Access:
    """The origins whose pages may use the server, and the names it answers to."""

    origins: tuple[str, ...] = ()
    """As browsers write them; ``*``: every page."""
    hosts: frozenset[str] | None = None
    """Names beside those of the loopback; None: any name will do."""

    @classmethod
    def of(cls, settings: ListenSettings, address: str) -> Access:
        """Make the rules of a server at ``address``. Raises ConfigError for an origin or a name that cannot be one."""
        origins = tuple(parse_origin(given) for given in settings.allow_origin)
        names = [_parse_name(given) for given in settings.allow_host]
        local = ipaddress.ip_address(address.partition("%")[0]).is_loopback and settings.api_key is None
        if names and not local:
            raise ConfigError("allow_host: the name is checked only on the loopback and without --api-key")
        if not local or "*" in names:
            return cls(origins)
        return cls(origins, frozenset([*names, settings.host.lower()]))

    def allows_origin(self, origin: str) -> bool:
        """Return whether pages of ``origin`` are let in by name."""
        return "*" in self.origins or origin in self.origins

    def allows_host(self, host: str) -> bool:
        """Return whether a Host header names this server."""
        found = _HOST.fullmatch(host)
        if self.hosts is None or found is None:
            return self.hosts is None
        name = found["name"].strip("[]").removesuffix(".").lower()
        return name in self.hosts or name == "localhost" or name.endswith(".localhost") or _is_loopback(name)

    def notes(self) -> list[str]:
        """Return what whoever starts the server should know."""
        if "*" in self.origins:
            return ["--allow-origin '*' lets every web page that is open on a machine which reaches this server use it"]
        return []


def guarded(app: ASGIApp, access: Access, refused: Callable[[int], None]) -> ASGIApp:
    """Return ``app`` behind the checks; ``refused`` is told the status of every refusal."""
    inner: ASGIApp = _JsonBodies(app, refused)
    if access.origins:
        inner = _Cors(
            inner,
            refused,
            allow_origins=access.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
            allow_private_network=True,
        )
    return _Doors(inner, access, refused)


def parse_origin(given: str) -> str:
    """Return an origin as browsers write it, or ``*``. Raises ConfigError for anything else."""
    if given == "*":
        return given
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError:
        raise ConfigError(f"allow_origin: {given!r} is not an origin such as https://example.org:8443") from None
    host = parts.hostname
    beyond = "*" in given or parts.path or parts.query or parts.fragment or parts.username or parts.password
    if not parts.scheme or not host or beyond or _HOST.fullmatch(parts.netloc) is None:
        raise ConfigError(
            f"allow_origin: {given!r} is not an origin such as https://example.org:8443: a scheme, a name and perhaps a "
            "port, no path; '*' is every page"
        )
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}" + ("" if port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{port}")


def _parse_name(given: str) -> str:
    if given == "*":
        return given
    name = given.strip("[]").removesuffix(".").lower()
    if not (_is_address(name) or re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name)):
        raise ConfigError(f"allow_host: {given!r} is not a name or an address without port, nor '*'")
    return name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def same_origin(origin: str, host: str) -> bool:
    """Return whether a page of ``origin`` came from the server that ``host``, a Host header, names."""
    server = _HOST.fullmatch(host)
    try:
        page = urlsplit(origin)
        given_port = page.port
    except ValueError:  # no origin, such as http://[::1
        return False
    default = _DEFAULT_PORTS.get(page.scheme)
    if server is None or default is None or page.hostname is None:
        return False
    return (page.hostname, given_port or default) == (
        server["name"].strip("[]").lower(),
        int(server["port"] or default),
    )


class _Refusing:
    """An application that answers some requests with an error of its own."""

    def __init__(self, app: ASGIApp, refused: Callable[[int], None]) -> None:
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.check(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            self._refused(error.status)
            await error_response(error)(scope, receive, send)

    def check(self, method: str, headers: Headers) -> ApiError | None:
        """Return why this request is not taken, if so."""
        raise NotImplementedError


class _Cors(CORSMiddleware):
    """Starlette's, with this server's errors."""

    def __init__(self, app: ASGIApp, refused: Callable[[int], None], **options: Any) -> None:
        super().__init__(app, **options)
        self._refused = refused

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        method, origin = request_headers["access-control-request-method"], request_headers["origin"]
        error = ApiError(
            response.status_code,
            f"{bytes(response.body).decode()}: {method} from {origin}; pages of --allow-origin may send GET and POST",
            code="preflight_refused",
        )
        self._refused(error.status)
        made = error_response(error)
        made.headers.update({**response.headers, **made.headers})
        return made


class _Doors(_Refusing):
    """Names of the server, and pages of other origins."""

    def __init__(self, app: ASGIApp, access: Access, refused: Callable[[int], None]) -> None:
        super().__init__(app, refused)
        self._access = access

    def check(self, method: str, headers: Headers) -> ApiError | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        for host in hosts:
            if not self._access.allows_host(host):
                return ApiError(
                    403,
                    f"Host: {host!r} is not a name of this server, which listens on the loopback "
                    "without a key (--allow-host adds names)",
                    code="host_not_allowed",
                )
        preflight = method == "OPTIONS" and "access-control-request-method" in headers
        if method in SAFE_METHODS and not preflight:
            return None
        for origin in origins:
            if not self._access.allows_origin(origin) and not any(same_origin(origin, host) for host in hosts):
                return ApiError(
                    403,
                    f"Origin: pages of {origin!r} may not use this server (--allow-origin lets them)",
                    code="origin_not_allowed",
                )
        site = headers.get("sec-fetch-site", "none")
        if not origins and site in ("cross-site", "same-site") and not self._access.allows_origin("*"):
            return ApiError(
                403,
                f"Sec-Fetch-Site: a page of another origin ({site}) may not use this server "
                "(--allow-origin '*' lets it)",
                code="origin_not_allowed",
            )
        return None


class _JsonBodies(_Refusing):
    """The check that a body says it is JSON."""

    def check(self, method: str, headers: Headers) -> ApiError | None:
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
        if method in SAFE_METHODS or not has_body:
            return None
        given: Iterable[str] = headers.getlist("content-type") or [""]
        for value in given:
            if (why := _not_json(value)) is not None:
                return ApiError(
                    415,
                    f"Content-Type: {why}; send the body with 'Content-Type: application/json'",
                    code="unsupported_media_type",
                )
        return None


def _not_json(content_type: str) -> str | None:
    """Return what is wrong with a Content-Type, if anything is."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if not kind:
        return "is missing"
    if kind != "application/json" and not re.fullmatch(r"application/[a-z0-9!#$&^_.-]+\+json", kind):
        return f"{kind[:100]!r} is not JSON"
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in _UTF8:
            return f"charset {value.strip()[:40]!r} is not that of JSON, UTF-8"
    return None
