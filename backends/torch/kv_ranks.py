"""The KV of ranks that are processes: each reads and writes its own share, in a thread beside the one that runs batches."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from backends.torch.kv_pages import KVPages


class KVRanks:
    """The scheduler process's end: a pipe to each rank, apart from the one that batches go through."""

    def __init__(self) -> None:
        self._pipes: list[tuple[Connection, threading.Lock]] = []

    def pipe(self, context: Any) -> Connection:
        """Make the pipe of the next rank; returns its end."""
        ours, theirs = context.Pipe()
        self._pipes.append((ours, threading.Lock()))
        end: Connection = theirs
        return end

    def read(self, rank: int, pages: np.ndarray) -> np.ndarray:
        """As ``Workers.read_kv``. Raises OSError or EOFError where the rank is gone."""
        pipe, lock = self._pipes[rank]
        with lock:
            pipe.send(("read", pages, None, None))
            shape = pipe.recv()
            return np.frombuffer(pipe.recv_bytes(), np.uint8).reshape(shape)

    def write(self, rank: int, layers: slice, heads: slice, pages: np.ndarray, block: np.ndarray) -> None:
        """As ``Workers.write_kv``. Raises OSError or EOFError where the rank is gone."""
        pipe, lock = self._pipes[rank]
        with lock:
            pipe.send(("write", pages, (layers, heads), block.shape))
            pipe.send_bytes(np.ascontiguousarray(block).reshape(-1).data)
            pipe.recv()

    def close(self) -> None:
        """End it, also for whoever waits."""
        for pipe, _ in self._pipes:
            pipe.close()


def serve_kv(pipe: Connection, pages: KVPages) -> None:
    """Do in a rank's process what is asked over its pipe, from a thread that ends with it."""

    def serve() -> None:
        try:
            while True:
                what, which, where, shape = pipe.recv()
                if what == "read":
                    found = pages.read(which)
                    pipe.send(found.shape)
                    pipe.send_bytes(found.reshape(-1).data)
                else:
                    layers, heads = where
                    pages.write(layers, heads, which, np.frombuffer(pipe.recv_bytes(), np.uint8).reshape(shape))
                    pipe.send(None)
        except (EOFError, OSError):
            pass  # the scheduler's process is gone, or needs no KV any more

    threading.Thread(target=serve, name="kv", daemon=True).start()
