"""The rows of a GPU's published operator tables that one kind of operator is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from backends.simulated.cost.models.operator_tables import NotMeasured
from backends.simulated.cost.tables import published_package
from backends.simulated.cost.tables.attention_kernels import ATTENTION, of_one_kernel
from backends.simulated.cost.tables.published_package import PublishedTables
from backends.simulated.cost.tables.table_kinds import OPTIONAL
from benchmarks.board.halves import rows_score

ENGINES = tuple(sorted(published_package.ENGINES))


@dataclass(frozen=True)
class Measured:
    """Measurements of one kind of operator."""

    rows: pd.DataFrame
    """With the columns ``seconds``, ``engine`` and ``scores``."""

    def __getattr__(self, name: str) -> np.ndarray:
        """A column in numbers."""
        if name not in self.rows:
            raise AttributeError(name)
        return self.rows[name].to_numpy(float)

    @property
    def weight(self) -> np.ndarray:
        """What a row counts, so that engines count the same."""
        return 1 / self.rows.groupby("engine").seconds.transform("size").to_numpy(float)

    def part(self, of: np.ndarray) -> Measured:
        """Some of the rows."""
        return Measured(self.rows[of])


def engine_rows(rows: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """Each engine, and which rows are its own."""
    return ((name, rows.engine.eq(name)) for name in rows.engine.unique())


class Tables:
    """The tables of one GPU, of all engines or of one."""

    def __init__(self, system: Path, engine: str | None = None) -> None:
        self.system, self.engine = system, engine

    def rows(
        self,
        kind: str,
        of: Callable[[pd.DataFrame], pd.Series],
        sizes: Sequence[str],
        engines: Sequence[str] = ENGINES,
    ) -> Measured | None:
        """Rows of a kind of table that ``of`` chooses, of each engine's newest version, the fastest kernel of each size.

        None where there are none, or those of one half alone.
        """
        found = []
        for engine in engines if self.engine is None else {*engines} & {self.engine}:
            try:
                table = pd.read_parquet(PublishedTables(self.system, engine, "").file_of(kind))
            except NotMeasured:
                continue
            table["scores"] = rows_score(kind, table)
            table = table[of_one_kernel(table)] if kind in ATTENTION else table
            table = table.assign(**{name: value for name, value in OPTIONAL.items() if name not in table})
            chosen = table[of(table)]
            if len(chosen):
                best = chosen.groupby([*sizes, "scores"], as_index=False).latency.min()
                found.append(best.assign(seconds=best.latency * 1e-3, engine=engine))
        if not found:
            return None
        together = pd.concat(found)
        return None if together.scores.all() or not together.scores.any() else Measured(together)
