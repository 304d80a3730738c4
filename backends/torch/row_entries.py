"""Lists of tokens that some rows have: biases, stop tokens. A step takes those of its rows without a loop over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class RowEntries:
    """(token, value) pairs of table rows, on the host, where it is known which rows run."""

    def __init__(self, rows: int, vocab: int) -> None:
        self._rows, self._vocab = rows, vocab
        self._row = np.empty(0, np.int64)
        self._token = np.empty(0, np.int64)
        self._value = np.empty(0, np.float32)

    def put(self, row: int, tokens: Sequence[int], values: Sequence[float] | None = None) -> None:
        """Give a row these in place of what it has; ``values`` None: zeros. What is no token of the vocabulary is left out:
        it is never sampled."""
        if not len(self._row) and not len(tokens):
            return
        token = np.array(tokens, np.int64)
        value = np.zeros(len(token), np.float32) if values is None else np.array(values, np.float32)
        exists, kept = (token >= 0) & (token < self._vocab), self._row != row
        self._row = np.concatenate((self._row[kept], np.full(int(exists.sum()), row, np.int64)))
        self._token = np.concatenate((self._token[kept], token[exists]))
        self._value = np.concatenate((self._value[kept], value[exists]))

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(index into ``rows``, int64[k]; token, int64[k]; value, float32[k]) of what these rows have."""
        if not len(self._row):
            return self._row, self._token, self._value
        place = np.full(self._rows, -1)
        place[rows] = np.arange(len(rows))
        index = place[self._row]
        there = index >= 0
        return index[there], self._token[there], self._value[there]
