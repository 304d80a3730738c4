"""Whether our scheduler decides what an engine's did, batch by batch: `parity.py RECORD.json.gz [--case CASE] [--explain]`.

Replays every scenario of a recording through this project's scheduler and loop, under the preset of that engine and without
a model or a clock. The last line counts; the exit code is 0 when all are equal and 1 when not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ground.errors import InputError
from workbench.parity.decide import replay
from workbench.parity.explain import explained
from workbench.parity.recording import read_recording
from workbench.parity.score import Score, keep_score
from workbench.scheduler.settings import ConfigError


def main(
    recordings: Annotated[list[Path], typer.Argument(metavar="RECORD.json.gz", show_default=False)],
    case: Annotated[
        str, typer.Option(help="Only scenarios whose key has this in it, as tight or tight/16/overlap.")
    ] = "",
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the state that led to each first difference.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Keep the counts in workbench/settings/parity.json.")] = False,
) -> None:
    """Compare our decisions with recorded ones."""
    if write and case:
        raise typer.BadParameter("counts of some cases are not those of a recording", param_hint="--write")
    try:
        equal = [_compare(path, case, explain, write) for path in recordings]
        if not any(one is not None for one in equal):
            raise InputError(f"--case: no scenario of {', '.join(map(str, recordings))} has {case!r} in its key")
    except (InputError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(1 if False in equal else 0)


def _compare(path: Path, case: str, explain: bool, write: bool) -> bool | None:
    """Tell whether all scenarios are equal; None: the recording has none of the case."""
    recording = read_recording(path)
    keys = [key for key in recording.decisions if f"/{case}" in f"/{key}/"]
    if not keys:
        print(f"{path.name}: no scenario has {case!r} in its key; there are {', '.join(recording.decisions)}")
        return None
    print(f"{path.name}: {recording.engine}, preset {recording.preset}")
    score = Score()
    for key in keys:
        replayed = replay(recording, key)
        score.add(replayed)
        if not replayed.equal:
            print("\n".join(explained(recording, replayed, whole=explain)))
    if write:
        keep_score(recording, score)
    print(score)
    return score.equal == score.scenarios


if __name__ == "__main__":
    typer.run(main)
