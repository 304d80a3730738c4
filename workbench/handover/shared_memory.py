"""Blocks of KV between two instances of one machine: in memory that both map, in places that take turns."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import threading
from dataclasses import dataclass

import msgspec
import numpy as np

from workbench.handover.peer_link import Link, LinkLost
from workbench.handover.peer_messages import Block, encode

PLACES = 4
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Memory that lost its end would end the process that reads there."""
_MARK_BYTES = 64
"""At the beginning: a random number that shows that both have mapped the same memory."""
WAIT_S = 60.0
"""How long a sender waits for a place. The other side is silent or at an end long before that."""


class _Offer(msgspec.Struct, array_like=True):
    process: int
    descriptor: int
    """By which that process has it open: the memory has no name, so that nothing is left of it however both end."""
    place_bytes: int
    places: int
    mark: bytes


@dataclass
class _Mapped:
    file: mmap.mmap
    place_bytes: int
    places: int

    def place(self, place: int, size: int) -> np.ndarray:
        return np.frombuffer(self.file, np.uint8, size, _MARK_BYTES + place * self.place_bytes)


class ShmOutgoing:
    """Memory of its own for each connection. Raises OSError where there is not enough of it."""

    name = "shm"

    def __init__(self, place_bytes: int) -> None:
        self._mark = os.urandom(_MARK_BYTES)
        size = _MARK_BYTES + PLACES * place_bytes
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memory that two processes open")
        self._descriptor: int | None = os.memfd_create("workbench-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Taken now: memory that is not there would end the process when it is written.
            os.posix_fallocate(self._descriptor, 0, size)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            self._memory = _Mapped(mmap.mmap(self._descriptor, size), place_bytes, PLACES)
        except BaseException:
            self.begin()
            raise
        self._memory.file[:_MARK_BYTES] = self._mark
        self._free = threading.Condition()
        self._places = list(range(PLACES))
        self._over = False

    def offer(self) -> bytes:
        memory = self._memory
        assert self._descriptor is not None, "it is offered before it is chosen"
        offer = _Offer(os.getpid(), self._descriptor, memory.place_bytes, memory.places, self._mark)
        return msgspec.msgpack.encode(offer)

    def begin(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # both have it mapped
            self._descriptor = None

    def send(self, link: Link, block: Block, data: np.ndarray) -> None:
        with self._free:
            if not self._free.wait_for(lambda: self._places or self._over, WAIT_S) or self._over:
                raise LinkLost("it took no block in time" if not self._over else "the connection is at an end")
            place = self._places.pop()
        self._memory.place(place, block.size)[:] = data.reshape(-1)
        link.send(encode(msgspec.structs.replace(block, place=place)))

    def freed(self, place: int) -> None:
        with self._free:
            if not 0 <= place < PLACES or place in self._places:
                raise LinkLost(f"it gave back a place that it did not have ({place})")
            self._places.append(place)
            self._free.notify()

    def close(self) -> None:
        self.begin()
        with self._free:
            self._over = True
            self._free.notify_all()


class ShmIncoming:
    """The same memory, mapped to read."""

    answers = True

    def __init__(self, offer: bytes) -> None:
        """Raises ValueError or OSError where this is another machine or user, or the offer is none."""
        try:
            said = msgspec.msgpack.decode(offer, type=_Offer)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from None
        size = _MARK_BYTES + said.places * said.place_bytes
        if min(said.process, said.descriptor) < 0 or said.places < 1 or said.place_bytes < 1 or size > 1 << 40:
            raise ValueError("no shared memory of an instance")
        # Of another kind it may be, on another machine: opening that must not wait for anybody.
        path = f"/proc/{said.process}/fd/{said.descriptor}"
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid() or about.st_size != size:
                raise ValueError("no shared memory of an instance of this user")
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:  # and of a file, OSError
                raise ValueError("memory whose size may change")
            self._memory = _Mapped(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), said.place_bytes, said.places)
        finally:
            os.close(descriptor)
        if self._memory.file[:_MARK_BYTES] != said.mark:
            raise ValueError("the memory of another machine")

    def take(self, link: Link, block: Block) -> np.ndarray:
        memory = self._memory
        if not 0 <= block.place < memory.places or block.size > memory.place_bytes:
            raise LinkLost(f"it named a place that there is not ({block.place}, {block.size} bytes)")
        return memory.place(block.place, block.size)

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a view of it may still be about; it goes with that
            self._memory.file.close()
