"""The few numbers with the least mean error (of logarithms) on measurements, found one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from backends.simulated.catalogue.gpu_specs import GPU
from benchmarks.board.table_rows import Measured, engine_rows

DIGITS = 3
NEGLIGIBLE_S = {
    "each_overhead_s": 1e-9,
    "head_overhead_s": 1e-10,
    "peer_overhead_s": 1e-9,
    "overhead_s": 1e-7,
    "depth_s": 1e-11,
}
"""What is written as 0 below these."""
Seconds = np.ndarray
Model = Callable[..., Seconds]


@dataclass(frozen=True)
class Fit:
    """Numbers of one kind of operator."""

    what: str
    values: dict[str, float]
    by_engine: dict[str, tuple[float, float]]
    """Means of the absolute and of the signed errors on what scores."""
    gained: float
    """By how much the mean error (of logarithms) on what is fitted fell from that of the numbers which were there."""
    fitted: int
    scored: int

    @property
    def error(self) -> float:
        """Mean of the absolute errors on what scores, over engines."""
        return float(np.mean([absolute for absolute, _ in self.by_engine.values()]))

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {_number(value)}" for name, value in self.values.items())
        engines = ", ".join(f"{name} {signed:+.1%}" for name, (_, signed) in self.by_engine.items())
        return (
            f"  {self.what}: off by {self.error:.1%} on {self.scored:,} rows that score ({engines}); "
            f"{self.fitted:,} fitted\n    {shown}"
        )


def fit(
    what: str,
    measured: Measured,
    fields: Sequence[str],
    start: GPU,
    model: Callable[[Measured], Model],
    choices: Mapping[str, Sequence[float]] | None = None,
) -> Fit:
    """The numbers of ``fields`` that come nearest: one at a time, by ever smaller steps, from those of ``start``; of
    ``choices`` one of those given."""
    choices = choices or {}
    scores = measured.rows.scores.to_numpy(bool)
    learned, kept = measured.part(~scores), measured.part(scores)
    seconds, weight, predict = np.log(learned.seconds), learned.weight / learned.weight.sum(), model(learned)

    def error(values: Sequence[float]) -> float:
        return float((weight * np.abs(np.log(predict(*values)) - seconds)).sum())

    values = [float(getattr(start, name)) for name in fields]
    first = best = error(values)
    step = 1.4
    while step > 1.005:
        moved = False
        for i, name in enumerate(fields):
            for value in choices.get(name, (values[i] * step, values[i] / step)):
                tried = values.copy()
                tried[i] = value
                if name.endswith("_efficiency"):
                    tried[i] = min(tried[i], 1.0)
                if (found := error(tried)) < best - 1e-7:
                    best, values, moved = found, tried, True
        if not moved:
            step = step**0.5
    values = [value if name in choices else _rounded(name, value) for name, value in zip(fields, values, strict=True)]
    off = model(kept)(*values) / kept.seconds - 1
    by_engine = {
        str(name): (float(np.abs(off[of]).mean()), float(off[of].mean()))
        for name, of in ((name, of.to_numpy()) for name, of in engine_rows(kept.rows))
    }
    values_of = dict(zip(fields, values, strict=True))
    return Fit(what, values_of, by_engine, first - best, int((~scores).sum()), int(scores.sum()))


def _rounded(name: str, value: float) -> float:
    least = next((least for end, least in NEGLIGIBLE_S.items() if name.endswith(end)), 0.0)
    return float(f"{value:.{DIGITS}g}") if value >= least else 0.0


def _number(value: float) -> str:
    return f"{value:.3g}"
