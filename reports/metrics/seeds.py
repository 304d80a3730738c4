"""What chance has its part in: how far apart the numbers of runs are that differ in their seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.metrics.how_sure import RANGED
from reports.metrics.labels import METRICS, Summaries, difference, percent, written


def seed_numbers(by_seed: Sequence[Summaries]) -> dict[str, dict[str, list[float | int | None]]]:
    """Values of each run by metric, one a seed."""
    return {name: {metric: [of[name].get(metric) for of in by_seed] for metric in RANGED} for name in by_seed[0]}


def seed_lines(by_seed: Sequence[Summaries], baseline: str) -> list[str]:
    """Say between what the numbers of each run lie over the seeds, and its differences from a baseline, seed by seed: what
    both have from the same seed cancels."""
    if all(of == by_seed[0] for of in by_seed):
        return [f"{len(by_seed)} seeds change nothing: nothing in these runs is drawn at random"]
    lines = []
    for name, of in seed_numbers(by_seed).items():
        texts = [
            f"{METRICS[metric].label} {' to '.join(written([min(known), max(known)], METRICS[metric].unit))}"
            for metric, values in of.items()
            if (known := _known(values))
        ]
        lines.append(f"{name} over {len(by_seed)} seeds: {', '.join(texts)}")
    for name in by_seed[0]:
        if name == baseline:
            continue
        texts = []
        for metric in RANGED:
            apart = _known([difference(of[name].get(metric), of[baseline].get(metric)) for of in by_seed])
            if apart:
                low, high = (percent(share, signed=True) for share in (min(apart), max(apart)))
                texts.append(f"{METRICS[metric].label} {low} to {high}")
        lines.append(f"{name} against {baseline} over {len(by_seed)} seeds: {', '.join(texts)}")
    return lines


def _known(values: Sequence[Any]) -> list[float]:
    return [value for value in values if value is not None]
