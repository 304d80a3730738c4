"""Predictions of rows, kept in a folder so that a run that was cut short goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.board.predict import Predicted
from benchmarks.board.silicon import Row

Outcome = Predicted | str
"""A prediction, or why there is none."""


class Results:
    """Outcomes of one cost model by row, a line each in ``FOLDER/COST.jsonl``; without a folder nowhere."""

    def __init__(self, folder: Path | None, cost: str) -> None:
        self._file = None if folder is None else folder / f"{cost}.jsonl"
        self._known: dict[str, dict[str, object]] = {}
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            lines = self._file.read_text().splitlines() if self._file.is_file() else []
            # The last line of a run that was cut short may be half a line.
            whole = [line for line in lines if line.endswith("}")]
            self._known = {str(one["id"]): one for one in map(json.loads, whole)}
            self._file.write_text("".join(f"{line}\n" for line in whole))

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Rows that have no outcome yet."""
        return [row for row in rows if row.id not in self._known]

    def add(self, row: Row, outcome: Outcome) -> None:
        """Keep a row's outcome."""
        if isinstance(outcome, str):
            one: dict[str, object] = {"id": row.id, "left_out": outcome}
        else:
            one = {"id": row.id, "ttft_s": outcome.ttft_s, "tpot_s": outcome.tpot_s, "lacking": outcome.lacking}
        self._known[row.id] = one
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(one) + "\n")

    def of(self, rows: Sequence[Row]) -> list[Outcome]:
        """The outcomes of rows that all have one."""
        return [self._outcome(row) for row in rows]

    def _outcome(self, row: Row) -> Outcome:
        one = self._known[row.id]
        if "left_out" in one:
            return str(one["left_out"])
        lacking: Sequence[str] = one["lacking"]  # type: ignore[assignment]
        return Predicted(row, float(one["ttft_s"]), float(one["tpot_s"]), tuple(lacking))  # type: ignore[arg-type]
