"""Time as a router sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

Within = Callable[[float], AbstractAsyncContextManager[Any]]
"""Makes the context in which so many seconds may pass, before TimeoutError."""


@dataclass(frozen=True)
class Clocks:
    """How time passes: by itself, or as a test says."""

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    within: Within = asyncio.timeout
