"""The key that machines and instances of one server show each other."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from workbench.handover.addresses import is_loopback
from workbench.scheduler.config import ConfigError


def shared_key(said: str | None, host: str) -> bytes:
    """Return the key of those who meet at an address: the one that was ``said``, else on the loopback one that is made once
    for each user and kept where nobody else can read it.

    Raises ConfigError, in one line, where a key has to be said.
    """
    if said is not None:
        if not said:
            raise ConfigError("peer_key: is empty")
        return said.encode()
    if not is_loopback(host):
        raise ConfigError(
            f"peer_key: {host} is not this machine alone, so say a key that all know: --peer-key or WORKBENCH_PEER_KEY"
        )
    file = Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache") / "workbench" / "peer.key"
    try:
        return _kept(file)
    except OSError as error:
        raise ConfigError(f"peer_key: {file}: {error.strerror or error}; say one with --peer-key") from error


def _kept(file: Path) -> bytes:
    """The key in a file, which is made if it is not there: whole, and by the first of several."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(secrets.token_hex(32))
        try:
            with contextlib.suppress(FileExistsError):
                os.link(part, file)
        finally:
            part.unlink()
    with open(file, "rb") as opened:
        known = os.fstat(opened.fileno())
        if known.st_uid != os.geteuid() or stat.S_IMODE(known.st_mode) & 0o077:
            raise ConfigError(f"peer_key: {file} is not this user's alone; say one with --peer-key")
        return opened.read()
