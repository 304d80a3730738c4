"""Headers that a router passes on, and those that end with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workbench.routing.connection import Header
from workbench.routing.worker import Worker
from workbench.serving.http import request_ids

_OF_A_CONNECTION = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    )
)
_NOT_TO_WORKERS = _OF_A_CONNECTION | {b"host", b"content-length", b"expect", b"origin", request_ids.HEADER.encode()}
"""Beside them, who says what to whom: the worker's name, and pages that the router has let in."""
_FAMILIES_NOT_TO_WORKERS = (b"sec-fetch-", b"access-control-", b"x-workbench-")
_NOT_TO_CLIENTS = _OF_A_CONNECTION | {b"date", request_ids.HEADER.encode()}
_FAMILIES_NOT_TO_CLIENTS = (b"access-control-",)


def to_worker(given: Iterable[Header], request_id: str, with_key: bool) -> list[Header]:
    """The headers of a request as every worker gets them, but for its key. ``with_key``: the client's key was for the
    router, and goes no further."""
    given = list(given)
    dropped = _NOT_TO_WORKERS | _named_by_connection(given) | ({b"authorization"} if with_key else set())
    kept = [(k, v) for k, v in given if k not in dropped and not k.startswith(_FAMILIES_NOT_TO_WORKERS)]
    return [*kept, (request_ids.HEADER.encode(), request_id.encode("ascii"))]


def with_key_of(worker: Worker, headers: Sequence[Header]) -> Sequence[Header]:
    """Headers with a worker's own key, if it has one."""
    if worker.api_key is None:
        return headers
    return [*(header for header in headers if header[0] != b"authorization"), *worker.authorization]


def to_client(given: Iterable[Header]) -> list[Header]:
    """The headers of an answer as the client gets them."""
    lowered = [(k.lower(), v) for k, v in given]
    dropped = _NOT_TO_CLIENTS | _named_by_connection(lowered)
    if any(k == b"transfer-encoding" for k, _ in lowered):
        dropped |= {b"content-length"}  # which means nothing beside it
    return [(k, v) for k, v in lowered if k not in dropped and not k.startswith(_FAMILIES_NOT_TO_CLIENTS)]


def _named_by_connection(headers: Iterable[Header]) -> set[bytes]:
    """Headers that are said to be of this connection only."""
    return {name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")}
