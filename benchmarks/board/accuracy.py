"""The file of errors that predictions are told by, ``workbench/settings/accuracy.json``, from those of the scoreboard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backends.simulated.catalogue.gpu_specs import gpu_names, load_gpu, same_gpu
from benchmarks.board.errors import LOW_CONCURRENCY, kind_of
from benchmarks.board.predict import Predicted
from workbench.settings.accuracy import Case, layout_text

DIGITS = 4


def keep_errors(scored: Mapping[str, Sequence[Predicted]], every: int, path: Path) -> list[str]:
    """Write the errors of the scoring half, by cost model, to the file at ``path``.

    What other cost models have there stays, and so does what is there of more rows than every Nth: returns a line for each
    of those.
    """
    recorded = json.loads(path.read_text()) if path.is_file() else {"every": {}, "groups": []}
    lines = []
    for cost, predicted in scored.items():
        if (before := recorded["every"].get(cost, every)) < every:
            lines.append(f"{path.name}: {cost}: stays as it is, of every {before}. row")
            continue
        recorded["every"][cost] = every
        others = [group for group in recorded["groups"] if group["cost"] != cost]
        recorded["groups"] = [*others, *groups_of(predicted, cost)]
    rows = ",\n".join(json.dumps(group) for group in recorded["groups"])
    path.write_text(f'{{"every": {json.dumps(recorded["every"])}, "groups": [\n{rows}\n]}}\n')
    return lines


def groups_of(predicted: Iterable[Predicted], cost: str) -> list[dict[str, Any]]:
    """Errors of rows of the scoring half, by case; of rows that are published twice, once."""
    loads: dict[tuple[Any, ...], int] = {}
    groups: dict[Case, dict[tuple[Any, ...], list[Any]]] = {}
    for one in predicted:
        row = one.row
        if not row.scores:
            continue
        load = loads.setdefault((row.configuration, row.precision, row.input_tokens, row.output_tokens), len(loads))
        rows = groups.setdefault(_case(one, cost), {})
        rows[load, row.concurrency, row.ttft_s, row.tpot_s] = [load, *_errors(one)]
    return [
        {**asdict(case), "rows": [rows[key] for key in sorted(rows)]}
        for case, rows in sorted(groups.items(), key=lambda item: tuple(asdict(item[0]).values()))
    ]


def _case(one: Predicted, cost: str) -> Case:
    row = one.row
    gpu = load_gpu(next(name for name in gpu_names() if same_gpu(name, row.system)))
    layout = layout_text(row.tp, row.dp, row.tp * row.dp if row.ep > 1 else 1)
    return Case(row.engine, gpu.family or gpu.name, kind_of(row.model), layout, cost)


def _errors(one: Predicted) -> tuple[float | None, float, float]:
    """Signed errors of TTFT, where it is scored, TPOT and E2E: a first token and as many gaps as the rest has."""
    row = one.row
    gaps = row.output_tokens * (1 + row.shortest) / 2 - 1
    e2e = (one.ttft_s + gaps * one.tpot_s) / (row.ttft_s + gaps * row.tpot_s) - 1
    ttft = round(one.ttft_error, DIGITS) if row.concurrency <= LOW_CONCURRENCY else None
    return ttft, round(one.tpot_error, DIGITS), round(e2e, DIGITS)
