"""What nobody could measure without the GPUs: the worker's part of an engine's host, what a step waits for or runs beside
its operators, and the way to its front end.

    python benchmarks/host_fit.py [GROUP ...] [--rows FILE] [--every N] [--rounds N]

Fits numbers of ``workbench/settings/engines.toml`` to rows of AIConfigurator's silicon_sample.csv that belong to fitting
(benchmarks/board/silicon.py); a row that belongs to scoring stops it. For hosts, models are dense ones where there are any,
whose steps the roofline has within a few per cent, so that what is left is the host's. For each group it prints the rows
that it used by configuration, what it began and ended with, and the errors then. Nothing is written: the numbers go into
the file by hand, with their source.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.simulated.cost.models.least_squares import nonnegative_least_squares
from backends.simulated.front_end import FrontEndModel
from backends.simulated.host import HostModel
from benchmarks.board.predict import Predicted, predict, settings_of
from benchmarks.board.silicon import Row, find_rows, read_rows
from workbench.settings import engines

DENSE = ("Qwen/Qwen3-32B", "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-8B-Instruct")
"""Not their rows in FP8 under vLLM 0.12, which ran otherwise (benchmarks/board/launched.py)."""
STEP = 0.25
"""Of a number, to find its derivative."""
SMALLEST_STEP_S = 20e-6
TOKEN = "_token_s"
SMALLEST_TOKEN_STEP_S = 50e-9
"""The same of numbers that are of a token, as their names end."""


@dataclass(frozen=True)
class Group:
    """Numbers of one preset, and the rows that tell them."""

    preset: str
    table: str
    """Of the preset: ``host`` or ``front_end``."""
    names: tuple[str, ...]
    rows: Callable[[Row], bool]
    of: str
    """What is fitted to: ``ttft`` or ``tpot``."""


def fields_of(table: str) -> list[str]:
    """Numbers that a table of a preset may hold."""
    return [field.name for field in fields({"host": HostModel, "front_end": FrontEndModel}[table])]


def _dense(row: Row, engine: str, *versions: str) -> bool:
    cached = row.version == "0.12.0" and row.precision == "fp8"
    return row.engine == engine and row.model in DENSE and row.version in versions and not cached


def _of(row: Row, version: str, model: str) -> bool:
    return row.engine == "sglang" and row.version == version and model in row.model


def _with_experts(row: Row) -> bool:
    """Rows of asynchronous versions, of which there are no dense ones, with experts on as many GPUs as attention, and few
    requests: there the host weighs most."""
    known = row.engine == "vllm" and row.version[:4] in ("0.15", "0.16", "0.17", "0.18", "0.19")
    return known and row.dp == row.ep == 1 and row.concurrency <= 16


GROUPS = {
    # A synchronous engine shows its host in every step, one that overlaps what does not.
    "vllm-host": Group(
        "vllm-0.12.0",
        "host",
        ("prepare_s", "prepare_rank_s", "prepare_request_s"),
        lambda row: _dense(row, "vllm", "0.12.0"),
        "tpot",
    ),
    "vllm-overlapped": Group(
        "vllm-0.14.0",
        "host",
        ("gap_rank_s",),
        lambda row: (_dense(row, "vllm", "") and row.concurrency <= 16) or _with_experts(row),
        "tpot",
    ),
    # Prompts of models with experts take longer than their operators.
    "vllm-experts": Group(
        "vllm-0.14.0",
        "host",
        ("gap_expert_token_s",),
        _with_experts,
        "ttft",
    ),
    "vllm-front-end": Group(
        "vllm-0.12.0",
        "front_end",
        ("latency_s",),
        lambda row: _dense(row, "vllm", "0.12.0", "") and row.concurrency <= 16,
        "ttft",
    ),
    "sglang-0.5.1-host": Group(
        "sglang-0.5.1.post1",
        "host",
        ("gap_s", "gap_request_s"),
        lambda row: _dense(row, "sglang", "0.5.1.post1"),
        "tpot",
    ),
    "sglang-0.5.6-host": Group(
        "sglang-0.5.6.post2",
        "host",
        ("gap_s", "gap_request_s"),
        lambda row: _dense(row, "sglang", "0.5.6.post2") and row.concurrency <= 256,
        "tpot",
    ),
    # There are no dense ones of later versions.
    "sglang-0.5.9-host": Group(
        "sglang-0.5.9",
        "host",
        ("gap_s", "gap_request_s"),
        lambda row: row.engine == "sglang" and row.version == "0.5.9" and row.concurrency <= 64,
        "tpot",
    ),
    # Its models with recurrences and with sparse attention take longer than their operators.
    "sglang-0.5.9-recurrent": Group(
        "sglang-0.5.9",
        "host",
        ("gap_recurrent_s",),
        lambda row: _of(row, "0.5.9", "Qwen3.5") and row.ep == 1 and row.concurrency <= 64,
        "tpot",
    ),
    "sglang-0.5.9-sparse": Group(
        "sglang-0.5.9",
        "host",
        ("gap_sparse_s",),
        lambda row: _of(row, "glm5-hopper", "GLM-5") and row.concurrency <= 64,
        "tpot",
    ),
    "sglang-chunks": Group(
        "sglang-0.5.6.post2",
        "front_end",
        ("chunk_s",),
        lambda row: _dense(row, "sglang", "0.5.6.post2") and row.concurrency > 256,
        "tpot",
    ),
    "sglang-front-end": Group(
        "sglang-0.5.1.post1",
        "front_end",
        ("latency_s",),
        lambda row: _dense(row, "sglang", "0.5.1.post1") and row.concurrency <= 16,
        "ttft",
    ),
}


def main(
    groups: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(GROUPS)}; default: all.")] = None,
    rows: Annotated[Path | None, typer.Option(help="silicon_sample.csv. Default: the installed package's.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Only every Nth row of a group.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Times to linearise.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Fit what hosts and front ends take, and what steps take beside their operators, to rows that belong to fitting."""
    path = rows or find_rows()
    if path is None:
        print("error: silicon_sample.csv: not here; pip install aiconfigurator-core, or --rows FILE", file=sys.stderr)
        raise typer.Exit(2)
    try:
        fitting = [row for row in read_rows(path)[0] if not row.scores]
        chosen = [GROUPS[name] for name in groups or GROUPS]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyError as error:
        print(f"error: no group {error}; there are {', '.join(GROUPS)}", file=sys.stderr)
        raise typer.Exit(2) from None
    for name, group in zip(groups or GROUPS, chosen, strict=True):
        print(f"{name}: {group.preset}, {group.table}", flush=True)
        fit(group, [row for row in fitting if group.rows(row) and _can_be_simulated(row)][::every], rounds, jobs)


def _can_be_simulated(row: Row) -> bool:
    try:
        settings_of(row)
    except ValueError:
        return False
    return True


def fit(group: Group, rows: Sequence[Row], rounds: int, jobs: int) -> np.ndarray:
    """Fit a group's numbers, and print what was used and found. Raises AssertionError for a row that belongs to scoring."""
    assert not any(row.scores for row in rows), "a row that belongs to scoring"
    for configuration, count in sorted(Counter(row.configuration.strip("|") for row in rows).items()):
        print(f"  {count:3} rows of {configuration}")
    values = np.array([getattr(engines.load_engine(group.preset), group.table).get(name, 0.0) for name in group.names])
    with ProcessPoolExecutor(jobs) as pool:

        def errors(at: np.ndarray) -> np.ndarray:
            sizes = dict(zip(group.names, at.tolist(), strict=True))
            asked = [(row, group.preset, group.table, sizes, group.of) for row in rows]
            return np.array(list(pool.map(_error, asked, chunksize=2)))

        now = errors(values)
        _say("begins with", group, values, now)
        for _ in range(rounds):
            least = [SMALLEST_TOKEN_STEP_S if name.endswith(TOKEN) else SMALLEST_STEP_S for name in group.names]
            steps = np.maximum(values * STEP, least)
            slopes = np.stack(
                [
                    (errors(values + step * place) - now) / step
                    for step, place in zip(steps, np.eye(len(steps)), strict=True)
                ],
                1,
            )
            weights = 1 / np.maximum(np.abs(now), 0.05)  # nearly the least absolute errors: no row decides alone
            # Scaled, for a matrix of slopes a second is in other units than one.
            found = (
                nonnegative_least_squares(slopes * steps * weights[:, None], (slopes @ values - now) * weights) * steps
            )
            for share in (1.0, 0.4, 0.15):
                tried_at = values + share * (found - values)
                tried = errors(tried_at)
                if np.abs(tried).mean() < np.abs(now).mean():
                    break
            else:
                break
            values, now = tried_at, tried
            _say("then", group, values, now)
    return values


def _error(asked: tuple[Row, str, str, dict[str, float], str]) -> float:
    """The signed error of a row under these numbers."""
    row, preset, table, values, of = asked
    engines._presets()[preset].setdefault(table, {}).update(values)
    found: Predicted = predict(row, engine=preset)
    return float(found.ttft_error if of == "ttft" else found.tpot_error)


def _say(when: str, group: Group, values: np.ndarray, errors: np.ndarray) -> None:
    numbers = ", ".join(
        f"{name} {value * 1e6:.{3 if name.endswith(TOKEN) else 1}f} us"
        for name, value in zip(group.names, values, strict=True)
    )
    size = np.abs(errors)
    print(
        f"  {when}: {numbers}; {group.of} off by {np.median(size):.1%} (median), {size.mean():.1%} (mean), "
        f"{errors.mean():+.1%} (bias)",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
