"""Single steps of a measured run against the profile cost model.

    python benchmarks/measured_steps.py TRUTH [--data FOLDER]

An engine's records have no steps, but a step is visible when something was queued, scheduled, sampled first or finished at
both of its ends. Who ran in it follows from the requests' times; contexts are interpolated between a request's first and
last token, and prefix-cache hits are taken from the simulation. Prints the error of the model by kind and size of step.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from board.truth import DATA, score
from profile_lookup import batch

from reports.imported.llmservingsim import read_measured
from reports.record.run_record import RunRecord
from workbench.cluster.resolve import resolve
from workbench.settings.loading import recorded_settings
from workbench.settings.run_settings import RunSettings

SAME_S = 0.003
"""Events closer than this belong to one boundary between steps."""
DECODES = (0, 8, 16, 35, 64, 96, 128, 1024)
TOKENS = (0, 385, 513, 641, 769, 897, 1025, 1281, 1409, 1665, 4096)


def visible_steps(run: RunRecord, cached: np.ndarray) -> list[tuple[float, list[int], tuple[int, ...]]]:
    """(seconds, context of every request, new tokens of those that prefill) of the steps that stand alone."""
    r = run.requests
    queued, scheduled, first, last = (r[name] for name in ("queued_s", "scheduled_s", "first_token_s", "finish_s"))
    events = np.sort(np.concatenate((queued, scheduled, first, last)))
    bounds = events[np.concatenate(([True], np.diff(events) > SAME_S))]
    found = []
    for before, begin, end in zip(bounds, bounds[1:], bounds[2:], strict=False):
        running = (first < end - SAME_S) & (last > end - SAME_S)
        fresh = abs(first - end) < SAME_S
        if not running.any() or (abs(scheduled[fresh] - before) > SAME_S).any():
            continue
        done = (end - first[running]) / (last - first)[running]
        lens = r["input_tokens"][running] + done * (r["output_tokens"][running] - 1)
        new = (r["input_tokens"] - cached)[fresh]
        found.append(
            (end - begin, [*r["input_tokens"][fresh].tolist(), *lens.astype(int).tolist()], tuple(new.tolist()))
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("truth", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    measured = read_measured(options.truth)
    _, simulated = score(options.data, options.truth)
    settings = RunSettings(**recorded_settings(simulated.meta, simulated.name))
    cost = resolve(settings, settings.loops[0]).cost
    errors: dict[tuple[str, int], list[float]] = defaultdict(list)
    for seconds, lens, new in visible_steps(measured, simulated.requests["cached_tokens"]):
        step = batch(np.array(lens, np.int64), new)
        tokens = step.prefill_tokens + step.decode_tokens
        predicted = cost.forward(step)
        # A gap much longer than a step holds several; a prompt beyond the budget took several.
        if not 0.7 < seconds / predicted < 1.4 or tokens > settings.max_batch_tokens:
            continue
        kind, edges = ("with prompts, tokens", TOKENS) if new else ("decodes, requests", DECODES)
        errors[kind, int(np.searchsorted(edges, tokens, side="left"))].append(predicted / seconds - 1)
    for (kind, place), found in sorted(errors.items()):
        edges = TOKENS if kind.startswith("with") else DECODES
        low, high = edges[place - 1] + (edges is DECODES), edges[place] - (edges is TOKENS)
        print(
            f"{kind:22}{low:6,} to {high:6,}: {len(found):4} steps, median {np.median(found):+6.1%}, "
            f"from {min(found):+.1%} to {max(found):+.1%}"
        )


if __name__ == "__main__":
    main()
