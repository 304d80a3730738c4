"""Which token's chunk clients of SGLang count as the first: one number of benchmarks/board/launched.py.

    python benchmarks/first_chunk.py [--every N] [--jobs N]

InferenceMAX's rows of SGLang that belong to fitting, at up to 16 requests at a time: how many TPOT lie between the first
token as predicted and the measured TTFT. Prints each configuration that it used, its rows, their median, and the median
over the rows of each model, on all GPUs and on each. Rows of more than 60 tokens waited for something else and are left
out. Nothing is written.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.board.errors import LOW_CONCURRENCY
from benchmarks.board.launched import FIRST_CHUNK_TOKENS, first_chunk_tokens
from benchmarks.board.predict import predict
from benchmarks.board.silicon import Row, find_rows, read_rows

MOST_TOKENS = 60


def main(
    every: Annotated[int, typer.Option(min=1, help="Only every Nth row.")] = 4,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Fit which chunk clients of SGLang count as the first."""
    path = find_rows()
    if path is None:
        print("error: silicon_sample.csv: not here; pip install aiconfigurator-core", file=sys.stderr)
        raise typer.Exit(2)
    fitting = (row for row in read_rows(path)[0] if not row.scores and row.concurrency <= LOW_CONCURRENCY)
    rows = [row for row in fitting if first_chunk_tokens(row)][::every]
    with ProcessPoolExecutor(jobs) as pool:
        found = list(pool.map(tokens_later, rows, chunksize=4))
    by: dict[str, list[float]] = {}
    models: dict[tuple[str, str], list[float]] = {}
    for row, tokens in zip(rows, found, strict=True):
        by.setdefault(f"{row.configuration.strip('|')} {row.precision}", []).append(tokens)
        if tokens <= MOST_TOKENS:
            model = next(name for name, _ in FIRST_CHUNK_TOKENS if name in row.model)
            for system in ("", row.system):
                models.setdefault((model, system), []).append(tokens)
    for name, tokens_of in sorted(by.items()):
        print(f"{len(tokens_of):3} rows of {name}: {np.median(tokens_of):.1f} tokens")
    for (model, system), tokens_of in sorted(models.items()):
        taken = FIRST_CHUNK_TOKENS.get((model, system), "nothing")
        print(f"{model} {system}: {np.median(tokens_of):.1f} of {len(tokens_of)} rows; launched.py has {taken}")


def tokens_later(row: Row) -> float:
    """Tokens between the first one and the one whose chunk a row's clients counted, in its own TPOT."""
    first_s = predict(row).ttft_s - first_chunk_tokens(row) * row.tpot_s
    return (row.ttft_s - first_s) / row.tpot_s


if __name__ == "__main__":
    typer.run(main)
