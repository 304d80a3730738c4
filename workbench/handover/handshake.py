"""The handshake of two instances: either proves that it has the key before the other says anything else.

    connects                                   accepts
    HELLO, a random number          ──>
                                    <──   another, and a proof over both
    who it is, and a proof          ──>
                                    <──   who it is, and a proof; or why not

A proof is an HMAC-SHA256 over its maker's part, both numbers and what is said along with it, so that none can be used twice
or sent back. The key is never sent. What follows is neither signed nor encrypted: a private network is asked for.
"""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from workbench.handover.addresses import split_address
from workbench.handover.identity import Identity
from workbench.handover.peer_link import Link, LinkLost, NotUnderstood

HELLO = b"workbench handover\n"
_NONCE_BYTES = 32
_MOST_BYTES = 1 << 16
HANDSHAKE_S = 10.0
"""How long one may take, all in all."""


class Refused(Exception):
    """No connection, and why, in one line."""


class _Begin(msgspec.Struct, array_like=True):
    hello: bytes
    nonce: bytes


class _Proof(msgspec.Struct, array_like=True):
    nonce: bytes
    proof: bytes


class _Introduction(msgspec.Struct, array_like=True):
    identity: Identity | None
    refused: str
    carriers: dict[str, bytes]
    """By name, what the other side has to know to take blocks that come that way."""
    proof: bytes


_encode = msgspec.msgpack.Encoder().encode


def introduce(link: Link, key: bytes, own: Identity, carriers: dict[str, bytes]) -> tuple[Identity, str]:
    """Shake hands over a connection that this side has made. Returns who the other is, and which carrier it takes. Raises
    Refused or LinkLost."""
    link.limit(HANDSHAKE_S)
    nonce = os.urandom(_NONCE_BYTES)
    link.send(_encode(_Begin(HELLO, nonce)))
    answer = _receive(link, _Proof)
    if len(answer.nonce) != _NONCE_BYTES:
        raise Refused("it is no instance of workbench")
    both = nonce + answer.nonce
    if not hmac.compare_digest(answer.proof, _proof(key, b"accepts", both, b"")):
        raise Refused("the peer keys differ (--peer-key)")
    said = _Introduction(own, "", carriers, b"")
    said.proof = _proof(key, b"connects", both, _content(said))
    link.send(_encode(said))
    other = _receive(link, _Introduction)
    if not hmac.compare_digest(other.proof, _proof(key, b"introduces", both, _content(other))):
        raise Refused("the peer keys differ (--peer-key)")
    if other.identity is not None and (fault := own.fault(other.identity)) is not None:
        raise Refused(fault)
    if other.refused or other.identity is None:
        raise Refused(f"it says: {other.refused[:300]}")
    link.limit(None)
    return other.identity, next(iter(other.carriers), "")


def accept(link: Link, key: bytes, own: Identity, choose: Callable[[dict[str, bytes]], str]) -> tuple[Identity, str]:
    """Shake hands over a connection that the other side has made; ``choose`` names one of the carriers that are offered, or
    none that will do by nothing. Returns who the other is, and that carrier's name. Raises Refused, once the other has been
    told why, or LinkLost."""
    link.limit(HANDSHAKE_S)
    begin = _receive(link, _Begin)
    if begin.hello != HELLO or len(begin.nonce) != _NONCE_BYTES:
        raise Refused("it is no instance of workbench")
    nonce = os.urandom(_NONCE_BYTES)
    both = begin.nonce + nonce
    link.send(_encode(_Proof(nonce, _proof(key, b"accepts", both, b""))))
    try:
        other = _receive(link, _Introduction)
    except LinkLost as lost:
        raise Refused(f"{lost}, at this side's proof: the peer keys may differ (--peer-key)") from None
    if not hmac.compare_digest(other.proof, _proof(key, b"connects", both, _content(other))):
        raise Refused("the peer keys differ (--peer-key)")
    if other.identity is None:
        raise Refused("it does not say who it is")
    fault = own.fault(other.identity)
    chosen = "" if fault else choose(other.carriers)
    if not fault and not chosen:
        fault = f"KV has no way to come that is offered ({', '.join(other.carriers)[:100]}; --kv-transfer)"
    said = _Introduction(own, fault or "", {chosen: b""}, b"")
    said.proof = _proof(key, b"introduces", both, _content(said))
    link.send(_encode(said))
    if fault is not None:
        raise Refused(fault)
    link.limit(None)
    return other.identity, chosen


def connect(address: str) -> Link:
    """Return a connection to ``host:port``. Raises LinkLost."""
    try:
        return Link(socket.create_connection(split_address(address), timeout=HANDSHAKE_S))
    except OSError as error:
        raise LinkLost(f"cannot be reached: {error.strerror or error}") from None
    except ValueError:  # no address, or no name of a host
        raise LinkLost("cannot be reached: it is not host:port") from None


def _receive(link: Link, kind: Any) -> Any:
    try:
        return link.receive(msgspec.msgpack.Decoder(kind), _MOST_BYTES)
    except NotUnderstood:
        raise Refused("it is no instance of workbench") from None


def _content(said: _Introduction) -> bytes:
    return _encode((said.identity, said.refused, said.carriers))


def _proof(key: bytes, part: bytes, nonces: bytes, content: bytes) -> bytes:
    return hmac.digest(key, b"workbench:" + part + b":" + nonces + content, "sha256")
