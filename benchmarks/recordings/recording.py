"""What the scripts that record an engine's decisions have in common: which cases and seeds, and the file.

Imported in an environment of the engine: nothing beyond the standard library and :mod:`workbench.parity.scenarios`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from workbench.parity.scenarios import CASES, scenario


def seeds_of(text: str) -> range:
    """Read ``3`` or ``0-4``, both ends included."""
    first, dash, last = text.partition("-")
    try:
        seeds = range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a seed nor a range like 0-4") from None
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it starts")
    return seeds


def cases_of(text: str) -> list[str]:
    """Read names with commas between."""
    names = text.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise argparse.ArgumentTypeError(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    return names


def out_of(text: str) -> Path:
    """Read the path of a file that can be written: a recording takes minutes, and is written at its end."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder")
    return path


def refuse(why: str) -> NoReturn:
    """End with a line for the one who asked."""
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every recording can be asked: where to, which cases, which seeds."""
    parser.add_argument("out", type=out_of, metavar="OUT.json.gz")
    parser.add_argument(
        "--cases", type=cases_of, help="names with commas between; all that the engine has, if not given"
    )
    parser.add_argument(
        "--seeds", type=seeds_of, default=seeds_of("0-1"), help="a seed, or the first and the last (0-1)"
    )


def chosen_cases(engine: str, asked: list[str] | None) -> list[str]:
    """Give the cases to record; refuse those that ask for what the engine has not."""
    having = [name for name, case in CASES.items() if engine in case.engines]
    if without := [name for name in asked or () if name not in having]:
        refuse(f"--cases: {engine} has not what {', '.join(without)} asks for; it has {', '.join(having)}")
    return having if asked is None else asked


def check_written(case: str, seed: int, written: dict[str, list[int]], tokens: dict[str, list[int]]) -> None:
    """Raise AssertionError unless each request got just its tokens, or the first of them if an abort came."""
    for request in scenario(case, seed):
        got, due = written[request.id], tokens[request.id]
        whole = got == due if request.abort_step is None else got == due[: len(got)]
        assert whole, f"{case}, seed {seed}: {request.id} got {len(got)} tokens of {len(due)}, or other ones"


def write(out: Path, record: dict[str, Any]) -> None:
    """Write a recording: the same decisions, the same bytes."""
    out.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
    scenarios = [value for value in record.values() if isinstance(value, list)]
    steps = sum(map(len, scenarios))
    print(f"{out}: {record['engine']}, {len(scenarios)} scenarios, {steps} steps, {out.stat().st_size} bytes")
