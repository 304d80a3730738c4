"""A connection between two instances: frames of a known length over a socket."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from typing import Any

import msgspec

MOST_FRAME_BYTES = 16 << 20
"""Of a frame: what is longer is a lie. A prompt of a million tokens that is asked for again is 4 MiB."""
_LENGTH = struct.Struct("!I")


class LinkLost(Exception):
    """A connection is of no use any more, and why, in one line."""


class NotUnderstood(LinkLost):
    """What has come is no message, or longer than one may be."""


class Link:
    """One connection. Any thread may send; one receives. What cannot be done raises LinkLost."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self.heard_s = time.monotonic()
        """When something last came."""
        self._due_s: float | None = None
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def limit(self, timeout_s: float | None) -> None:
        """Let all that is said from now on take no longer than so many seconds, however little comes at a time; None: as
        long as it takes."""
        self._due_s = None if timeout_s is None else time.monotonic() + timeout_s
        if timeout_s is None:
            with contextlib.suppress(OSError):
                self._socket.settimeout(None)

    def send(self, frame: bytes, payload: memoryview | None = None) -> None:
        """Send a frame, and bytes behind it that the frame says the length of."""
        with self._sending:
            self._send(frame, payload)

    def send_if_free(self, frame: bytes) -> None:
        """Send a short frame unless another one is on its way, or the other side does not read. Never waits."""
        if self._sending.acquire(blocking=False):
            try:
                if self._takes_more():
                    self._send(frame, None)
            finally:
                self._sending.release()

    def _takes_more(self) -> bool:
        """Whether what is short can be sent without waiting."""
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLOUT)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            return True  # closed: sending says so

    def _hurry(self) -> None:
        """Have the next call to the socket end in time, where there is a limit. Raises TimeoutError when it is over."""
        if self._due_s is not None:
            left_s = self._due_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(left_s)

    def _send(self, frame: bytes, payload: memoryview | None) -> None:
        try:
            self._hurry()
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
            if payload is not None:
                self._socket.sendall(payload)
        except OSError as error:
            raise LinkLost(_why(error)) from None

    def receive(self, decoder: Any, most_bytes: int = MOST_FRAME_BYTES) -> Any:
        """Return the next frame, decoded."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, begins=True))
        if length > most_bytes:
            raise NotUnderstood(f"it sent a frame of {length} bytes, more than the {most_bytes} that one may have")
        data = self._exactly(length)
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NotUnderstood(f"it sent what is no message: {str(error).splitlines()[0]}") from None

    def receive_into(self, buffer: memoryview) -> None:
        """Fill a buffer with what comes next."""
        at = 0
        while at < len(buffer):
            try:
                self._hurry()
                count = self._socket.recv_into(buffer[at:])
            except OSError as error:
                raise LinkLost(_why(error)) from None
            if not count:
                raise LinkLost(f"it ended in the middle of a transfer, {at} of {len(buffer)} bytes in")
            self.heard_s = time.monotonic()
            at += count

    def _exactly(self, count: int, begins: bool = False) -> bytes:
        found = bytearray()
        while len(found) < count:
            try:
                self._hurry()
                piece = self._socket.recv(count - len(found))
            except OSError as error:
                raise LinkLost(_why(error)) from None
            if not piece:
                raise LinkLost("it closed the connection" if begins and not found else "it ended inside a message")
            self.heard_s = time.monotonic()
            found += piece
        return bytes(found)

    def close(self) -> None:
        """End it, also for whoever waits for it in another thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._socket.close()


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return error.strerror or str(error) or type(error).__name__
