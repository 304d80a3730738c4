"""Published operator tables without the rows that belong to scoring: what a prediction of these may know."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backends.simulated.cost.tables.published_package import PublishedTables
from benchmarks.board.halves import rows_score


class FittingHalf(PublishedTables):
    """The rows of a set of tables that are of shapes of the fitting half."""

    @classmethod
    def of(cls, tables: PublishedTables) -> FittingHalf:
        """Withhold the other half of ``tables``."""
        return cls(**{field.name: getattr(tables, field.name) for field in fields(tables)})

    def table(self, kind: str, text: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, Any]:
        """Columns of a table, without the rows that score."""
        fits = _fits(self.file_of(kind), kind)
        return {name: np.asarray(column)[fits] for name, column in super().table(kind, text, numbers).items()}


@lru_cache(maxsize=16)
def _fits(file: Path, kind: str) -> np.ndarray:
    return ~rows_score(kind, pd.read_parquet(file))
