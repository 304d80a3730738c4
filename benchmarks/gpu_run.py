"""One section of benchmarks/gpu.py: its folder, its time, and what it leaves there.

Sections run in processes of their own and several commands may share a folder, so what is found is in files as soon as it
is there, and lists are added to: ``table.json``, ``skipped.json`` and ``failed.json`` hold one entry a line, named by its
section. A section that runs again replaces what it left before.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

LISTS = ("table", "skipped", "failed")


def check_folder(out: Path) -> str:
    """Make a folder for results; what is wrong with it, in one line, or ""."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return f"{out}: {error.strerror}"
    for name, kind in (*((name, list) for name in LISTS), ("timing", dict)):
        file = out / f"{name}.json"
        try:
            found = json.loads(file.read_text()) if file.exists() else kind()
        except (OSError, ValueError) as error:
            return f"{file}: {error}"
        ours = isinstance(found, kind) and all(name == "timing" or "section" in entry for entry in found)
        if not ours:
            return f"{file} is not of this script; name another folder"
    return ""


class Run:
    """The folder, the clock, and notes of what was found."""

    def __init__(self, out: Path, device: str, quick: bool, budget_s: float, section: str) -> None:
        """``budget_s``: what the section may take."""
        self.out, self.device, self.quick, self.section = out, device, quick, section
        self.deadline = time.monotonic() + budget_s
        self.failed: list[str] = []
        """Checks of this section."""
        out.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Forget what an earlier run of this section noted."""
        for name in LISTS:
            kept = [entry for entry in self.read(name, []) if entry["section"] != self.section]
            self.write(name, kept)

    @property
    def repetitions(self) -> int:
        """How often a measurement is made, if there is time."""
        return 1 if self.quick else 3

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
        self.say(f"skipped: {what}: {why}")
        self._add("skipped", {"what": what, "why": why})

    def check(self, what: str, right: bool, detail: str = "") -> None:
        """Note a check; one that fails is printed and changes the exit status."""
        if not right:
            self.failed.append(f"{what}: {detail}" if detail else what)
            self.say(f"CHECK FAILED: {self.failed[-1]}")
            self._add("failed", {"what": self.failed[-1]})

    def row(self, line: str) -> None:
        """A line of the table that is printed last."""
        self.say(line)
        self._add("table", {"line": line})

    def say(self, line: str) -> None:
        """Progress. That nobody listens any more is no reason to lose what is found."""
        with contextlib.suppress(OSError):
            print(line, flush=True)

    def _add(self, name: str, entry: dict[str, str]) -> None:
        self.write(name, [*self.read(name, []), {"section": self.section, **entry}])

    def write(self, name: str, data: Any) -> None:
        """FOLDER/name.json, whole or not at all."""
        partial = self.out / f".{name}.json"
        partial.write_text(json.dumps(data, indent=1, default=str))
        partial.replace(self.out / f"{name}.json")

    def read(self, name: str, default: Any) -> Any:
        """FOLDER/name.json, or ``default`` where there is none."""
        file = self.out / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else default
