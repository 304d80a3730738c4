"""Work that would hold the event loop up, in threads that hold nobody up at the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_running: set[threading.Thread] = set()


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call ``function`` in a thread of its own. Who stops waiting for it leaves it behind; it keeps no process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def call() -> None:
        try:
            result = function(*args)
        except BaseException as error:
            tell(future.set_exception, error)
        else:
            tell(future.set_result, result)
        finally:
            _running.discard(thread)

    def tell(say: Callable[[Any], None], what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(unless_left, say, what)

    def unless_left(say: Callable[[Any], None], what: Any) -> None:
        if not future.done():
            say(what)

    thread = threading.Thread(target=call, name=f"in_thread {function.__name__}", daemon=True)
    _running.add(thread)
    thread.start()
    return await future


def end_process_if_busy(code: int) -> None:
    """End the process here if a thread is still at work: the interpreter cannot be taken down under one that is."""
    if _running:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
