"""What the published operator tables of a GPU measured of one kind of operator, chosen for a fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.board.halves import rows_score

ENGINES = ("sglang", "vllm")


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
        family: str,
        kind: str,
        of: Callable[[pd.DataFrame], pd.Series],
        sizes: Sequence[str],
        engines: Sequence[str] = ENGINES,
    ) -> Measured | None:
        """Rows of all engines that ``of`` chooses, the fastest kernel of each size; None without any."""
        found = []
        for engine in engines if self.engine is None else {*engines} & {self.engine}:
            files = sorted((self.system / family / engine).glob(f"*/{kind}_perf.parquet"), key=_version)
            if not files:
                continue
            table = pd.read_parquet(files[-1])
            if kind.endswith("_attention") and "window_size" not in table:
                table = table.assign(window_size=0)
            table["scores"] = rows_score(kind, table)
            chosen = table[of(table)]
            if len(chosen):
                best = chosen.groupby([*sizes, "scores"], as_index=False).latency.min()
                found.append(best.assign(seconds=best.latency * 1e-3, engine=engine))
        if not found:
            return None
        together = pd.concat(found)
        return None if together.scores.all() or not together.scores.any() else Measured(together)


def _version(file: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", file.parent.name)]
