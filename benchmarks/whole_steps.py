"""Whole steps of models against the sum of their measured operators: the roofline, and look-ups without those operators.

    python benchmarks/whole_steps.py [--gpu NAME ...] [--engine NAME] [--model PART] [--list] [--jobs N] [--write]

The operators are those of the package aiconfigurator-core (the extra ``profiles``), of every GPU of the catalogue that it
has; what a step is, and which ones score, stands in benchmarks/board/steps.py. --list prints every step instead of
tables. --write puts the tables into docs/cost-model.md, of the GPUs that are asked for.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.simulated.cost.tables.published_package import described
from benchmarks.board.pages import between_markers
from benchmarks.board.steps import Step, cases, steps_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cost-model.md"
WORST = 10
COSTS = ("measured", "roofline")


def main(
    gpu: Annotated[list[str] | None, typer.Option(help="GPU of the catalogue. Default: all.")] = None,
    engine: Annotated[str, typer.Option(help="vllm or sglang. Default: both.")] = "",
    model: Annotated[str, typer.Option(help="Only models with this in their names.")] = "",
    listed: Annotated[bool, typer.Option("--list", help="Print every step that scores.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    write: Annotated[bool, typer.Option("--write", help="Put the tables into docs/cost-model.md.")] = False,
) -> None:
    """Score whole steps against the sum of their measured operators."""
    asked = [one for one in cases(gpu or ()) if one.engine.startswith(engine) and model in one.model]
    if not asked:
        print("error: there are no tables of these; they are in aiconfigurator-core", file=sys.stderr)
        raise typer.Exit(2)
    if write and (engine or model):
        print("error: --write: the page is of all engines and models", file=sys.stderr)
        raise typer.Exit(2)
    with ProcessPoolExecutor(jobs) as pool:
        found = list(track(pool.map(steps_of, asked, chunksize=17), "cases", len(asked), transient=True))
    steps = [step for of in found if not isinstance(of, str) for step in of if step.scores]
    if listed:
        for step in steps:
            print(f"{step.described}: {step.truth_s * 1e3:.3f} ms, " + ", ".join(_error(step, of) for of in COSTS))
        return
    left_out = Counter(f"{case.model}: {of}" for case, of in zip(asked, found, strict=True) if isinstance(of, str))
    text = "\n\n".join(tables(steps))
    print(text)
    for why, count in left_out.most_common():
        print(f"left out: {why} ({count})", file=sys.stderr)
    if write:
        PAGE.write_text(between_markers(PAGE, {"steps": text}))


def tables(steps: Sequence[Step]) -> Iterable[str]:
    """What is said of the steps that score, as Markdown."""
    models = len({step.case.model for step in steps})
    gpus = ", ".join(dict.fromkeys(step.case.gpu for step in steps))
    yield f"{len(steps):,} steps of {models} models on {gpus}, out of {described()}."
    decodes, prompts = ([step for step in steps if step.prompt is prompt] for prompt in (False, True))
    kinds: dict[str, Callable[[Step], str]] = {
        "kind of model": lambda step: step.kind,
        "GPU and engine": lambda step: (
            f"{step.case.gpu}, {step.case.engine.partition('-')[0]}, {step.kind.split(',')[0]}"
        ),
    }
    for by, key in kinds.items():
        yield "\n".join(_table(by, key, decodes, prompts))
    for of in COSTS:
        yield f"The ten furthest off of decodes, {'look-ups' if of == 'measured' else 'roofline'}:"
        worst = sorted(decodes, key=lambda step, of=of: -abs(step.error(of)))[:WORST]  # type: ignore[misc]
        lines = ["| step | measured | error |", "|---|---|---|"]
        lines += [f"| {step.described} | {step.truth_s * 1e3:.2f} ms | {step.error(of):+.0%} |" for step in worst]
        yield "\n".join(lines)


def _table(by: str, key: Callable[[Step], str], decodes: Sequence[Step], prompts: Sequence[Step]) -> Iterable[str]:
    yield f"| {by} | decodes | look-ups | bias | roofline | bias | prompts | look-ups | bias | roofline | bias |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name in sorted({key(step) for step in (*decodes, *prompts)}):
        cells = []
        for steps in (decodes, prompts):
            of = [step for step in steps if key(step) == name]
            cells.append(f"{len(of):,}")
            for cost in COSTS:
                errors = np.array([step.error(cost) for step in of])
                cells += [f"{np.abs(errors).mean():.1%}", f"{errors.mean():+.1%}"] if of else ["", ""]
        yield f"| {name} | {' | '.join(cells)} |"


def _error(step: Step, of: str) -> str:
    return f"{of} {step.error(of):+.1%}"


if __name__ == "__main__":
    typer.run(main)
