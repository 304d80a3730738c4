"""A run of benchmarks/gpu.py: its folder, its budget of time, and what it has found so far."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Run:
    """The folder, the clock and what has been found so far."""

    def __init__(self, out: Path, device: str, quick: bool, budget_s: float) -> None:
        self.out, self.device, self.quick = out, device, quick
        self.deadline = time.monotonic() + budget_s
        self.skipped: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.table: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def fits(self, what: str, need_s: float) -> bool:
        """Whether there is time for ``what``; if not, it is named as skipped."""
        if self.quick or self.left() >= need_s:
            return True
        self.skip(what, f"needs about {need_s:.0f} s, {max(self.left(), 0):.0f} s are left")
        return False

    def skip(self, what: str, why: str) -> None:
        """Name something that is not measured."""
        self.skipped.append({"what": what, "why": why})
        self.say(f"skipped: {what}: {why}")
        self.write("skipped", self.skipped)

    def check(self, what: str, right: bool, detail: str = "") -> None:
        """Note a check; one that fails is printed and changes the exit status."""
        if not right:
            self.failed.append(f"{what}: {detail}" if detail else what)
            self.say(f"CHECK FAILED: {self.failed[-1]}")
            self.write("failed", self.failed)

    def write(self, name: str, data: Any) -> None:
        """FOLDER/name.json, whole or not at all."""
        partial = self.out / f".{name}.json"
        partial.write_text(json.dumps(data, indent=1, default=str))
        partial.replace(self.out / f"{name}.json")

    def say(self, line: str) -> None:
        """Progress, with the time that has been spent."""
        print(line, flush=True)

    def row(self, line: str) -> None:
        """A line of the table that is printed last."""
        self.table.append(line)
        self.say(line)
