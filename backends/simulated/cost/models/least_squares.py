"""Least squares for times: errors relative to the prediction, and nothing that takes less than no time."""

from __future__ import annotations

import numpy as np

REWEIGHTINGS = 4


def relative_least_squares(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """min |(rows x - seconds) / (rows x)| over x >= 0, by weighting anew with what was found.

    Errors relative to what was measured would find too little where measurements scatter: of two steps alike, the
    shorter one weighs more. Relative to the prediction, steps alike get their mean.
    """
    expected = seconds
    for _ in range(REWEIGHTINGS):
        values = nonnegative_least_squares(rows / expected[:, None], seconds / expected)
        expected = np.maximum(rows @ values, seconds.min() / 10)
    return values


def nonnegative_least_squares(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """min |rows x - wanted| over x >= 0 (Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23)."""
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1.0
    scaled = rows / scale
    count = rows.shape[1]
    x = np.zeros(count)
    active = np.zeros(count, bool)
    for _ in range(3 * count):
        gradient = scaled.T @ (wanted - scaled @ x)
        gradient[active] = -np.inf
        new = int(gradient.argmax())
        if gradient[new] <= 1e-10:
            break
        active[new] = True
        while True:
            solved = np.zeros(count)
            solved[active] = np.linalg.lstsq(scaled[:, active], wanted, rcond=None)[0]
            if (solved[active] > 0).all():
                x = solved
                break
            falling = active & (solved <= 0)
            step = (x[falling] / (x[falling] - solved[falling])).min()
            x = x + step * (solved - x)
            active &= x > 1e-15
            x[~active] = 0.0
    return x / scale
