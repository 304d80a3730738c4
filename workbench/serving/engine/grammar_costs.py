"""What grammars cost a server."""

from __future__ import annotations


class Spent:
    """What grammars have cost so far. The loop writes, the heartbeat reads."""

    def __init__(self) -> None:
        self.tokens = 0
        """Masks made."""
        self.mask_s = 0.0
        """Seconds that making them and following what was sampled took the loop."""
        self.compiled = 0
        self.compile_s = 0.0
        """Seconds of the thread that compiles."""
