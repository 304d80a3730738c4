"""The grammar of a constrained request, as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Grammar(Protocol):
    """What one request may write, as far as it has written it. It goes with the request, through every retraction."""

    words: int
    """Length of a mask over the vocabulary: ceil(vocabulary / 32); 0 for a grammar that only costs: anything may come."""

    def accept(self, token: int) -> bool:
        """Take the next token; False where it may not come, or nothing may."""
        ...

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        ...

    def fill(self, grammars: Sequence[tuple[Grammar, int]], masks: np.ndarray) -> None:
        """Write the masks of several of this kind at once: each into the row of ``masks`` that stands beside it.

        masks: int32[k, words], as ``Backend.sample`` takes them. A grammar in which nothing can follow writes a mask that
        allows something all the same, for a row has to sample; it then refuses that token.
        """
        ...
