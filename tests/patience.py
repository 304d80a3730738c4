"""How long a test waits for what must come.

Only to end a test that would wait for ever: nothing is concluded from how long something took, so that a machine that is
busy with other things makes a test slow and not wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 600.0


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that must come.

    Raises AssertionError when it does not.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
