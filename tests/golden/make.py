"""Make golden.json, or only the entries named: ``python -m tests.golden.make [NAME...] [--keep FOLDER]``.

An entry is made anew only in a commit of its own that says why.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.golden.cases import CASES, Case
from tests.golden.hashes import Entry, differences, entry_of, run_case, unshown
from tests.golden.inputs import write_inputs

GOLDEN = Path(__file__).resolve().parent / "golden.json"


def read_golden() -> dict[str, Entry]:
    """The entries that are kept, by name."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.make", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries to make; all, if none is named")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the traces and the outputs there")
    asked = parser.parse_args()
    known = {case.name: case for case in CASES}
    if strange := [name for name in asked.names if name not in known]:
        parser.error(f"no command is called {', '.join(strange)}; there are {', '.join(known)}")
    cases = [known[name] for name in asked.names] or CASES
    kept = read_golden()
    with tempfile.TemporaryDirectory() as passing:
        folder = (asked.keep or Path(passing)).resolve()
        write_inputs(folder)
        for case in cases:
            made, said = _make(case, kept.get(case.name), folder)
            kept[case.name] = made
            print(f"{case.name}: {said}", flush=True)
    for name in sorted(kept.keys() - known.keys()):
        print(f"{name}: removed")
        del kept[name]
    GOLDEN.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def _make(case: Case, before: Entry | None, folder: Path) -> tuple[Entry, str]:
    """The entry, and whether it is new, changed or unchanged. Ends the program where it would hold nothing of worth."""
    plain, exact = run_case(case, folder)
    made = entry_of(case, plain)
    # Step by step a run must be the same; and what the command is there for must happen.
    if wrong := [*differences(case, made, plain, exact), *unshown(case, plain)]:
        sys.exit(f"{case.name}: not made: {'; '.join(wrong)}")
    if before is None:
        return made, "new"
    if made == before:
        return made, "unchanged"
    return made, "; ".join(["changed", *differences(case, before, plain, exact)])


if __name__ == "__main__":
    main()
