"""The grammar of a request whose output is known: it costs what any does, and lets everything through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workbench.scheduler.grammar import Grammar


class Unchecked:
    """Its masks have no words: everything is allowed, as what a trace's request writes stands in the trace."""

    __slots__ = ()

    words = 0
    complete = False

    def accept(self, token: int) -> bool:
        return True

    def fill(self, grammars: Sequence[tuple[Grammar, int]], masks: np.ndarray) -> None:
        """Write nothing."""
