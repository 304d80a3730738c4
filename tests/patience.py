"""How long a test waits for what must come.

Only to end a test that would wait for ever: nothing is concluded from how long something took, so that a machine that is
busy with other things makes a test slow and not wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 600.0
_TRY_EVERY_S = 0.02


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that must come: so many tries, whatever the time between them.

    Raises AssertionError when it does not.
    """
    for _ in range(round(PATIENCE_S / _TRY_EVERY_S)):
        if true():
            return
        time.sleep(_TRY_EVERY_S)
    raise AssertionError(f"never: {what}")
