"""Addresses of instances, as they call themselves: ``host:port``."""

from __future__ import annotations

import contextlib
import ipaddress


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port``, the host in brackets where it is an IPv6 address. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{address[:80]!r} is not host:port")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Return ``host:port``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Tell whether an address, or its name, is of this machine alone."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    return False


def is_here(address: str) -> bool:
    """Tell whether ``host:port`` is on this machine, by its name alone."""
    try:
        return is_loopback(split_address(address)[0])
    except ValueError:
        return False
