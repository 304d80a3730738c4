"""Host phases from a run record: constant, per request, per token, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from backends.simulated.cost.models.least_squares import nonnegative_least_squares

ISSUE_SHARE = 0.3
"""Part of a decode step's launch that replays the graph; a record has only the sum."""


def fit_host(
    iterations: Mapping[str, np.ndarray], ended: np.ndarray | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """(fields of a host model, relative error of each phase's total) from the first stage's rows of iterations.csv.

    ``ended`` is the number of requests that ended in each iteration, where it is known.
    """
    decodes = iterations["decode_tokens"].astype(np.float64)
    requests = iterations["requests"].astype(np.float64)
    prompts = np.maximum(requests - decodes, 0)
    tokens = iterations["prefill_tokens"].astype(np.float64)
    one = np.ones(len(requests))
    ended = np.zeros(len(requests)) if ended is None else ended.astype(np.float64)
    alone = (prompts == 0).astype(np.float64)
    phases: dict[str, tuple[list[str], np.ndarray]] = {
        "receive_s": (["receive_s", "receive_message_s"], np.stack((one, prompts), 1)),
        "schedule_s": (
            ["schedule_s", "schedule_request_s", "schedule_prefill_s", "schedule_token_s"],
            np.stack((one, requests, prompts, tokens), 1),
        ),
        "launch_host_s": (
            ["graph", "eager", "prepare_request_s", "prepare_token_s"],
            np.stack((alone, 1 - alone, requests, tokens), 1),
        ),
        "process_s": (["process_s", "process_token_s", "process_ended_s"], np.stack((one, requests, ended), 1)),
    }
    found: dict[str, float] = {}
    errors: dict[str, float] = {}
    for phase, (names, rows) in phases.items():
        measured = iterations[phase].astype(np.float64)
        known = ~np.isnan(measured)
        if not known.any() or measured[known].sum() <= 0:
            values = np.zeros(len(names))
        else:
            values = nonnegative_least_squares(rows[known], measured[known])
            errors[phase] = float((rows[known] @ values).sum() / measured[known].sum() - 1)
        found |= dict(zip(names, map(float, values), strict=True))
    graph, eager = found.pop("graph"), found.pop("eager")
    launch = graph or eager
    found["graph_s"] = ISSUE_SHARE * launch
    found["prepare_s"] = launch - found["graph_s"]
    found["eager_s"] = max(eager - found["prepare_s"], 0.0)
    found["eager_layer_s"] = 0.0
    return found, errors
