"""The operators of our own runner, timed inside designed steps.

A shape is one step: prompt tokens over so many cached ones, and decodes at so long a context. What its operators took is a
file. Nothing here runs a step: ``measure.py`` does, and ``benchmarks/gpu.py`` where little is installed.
``operator_profile.py`` makes tables of the files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ground.json_file import read_json, write_json
from reports.record.errors import RecordError
from workbench.scheduler.batch import ModelWorkerBatch, NewRequest, PageWrite
from workbench.scheduler.request import SamplingParams

FOLDER = "operators"
"""Of a folder of points: where the shapes are."""
MOST_TOKENS = 1 << 17
"""Of the context of a step's decodes: with room for more it would take longer than it tells."""
LEAST_REPEATS, MOST_REPEATS, ENOUGH_S = 2, 40, 0.1
"""A shape runs until it has run so often, and then until it has taken so long or run that often."""
VISITS = 3
"""How often a shape is come back to: a machine may be slow for a second, or for a minute."""


@dataclass(frozen=True)
class Shape:
    """One step: ``prompts`` prompts of ``prompt`` tokens each, after ``cached`` ones, beside ``decodes`` of ``context``."""

    prompt: int = 0
    cached: int = 0
    decodes: int = 0
    context: int = 0
    prompts: int = 1

    @property
    def name(self) -> str:
        """A file's name."""
        prompts = f"{self.prompts}x{self.prompt}-over-{self.cached}" if self.prompt else ""
        decodes = f"{self.decodes}-decodes-at-{self.context}" if self.decodes else ""
        return "-beside-".join(part for part in (prompts, decodes) if part)

    @property
    def extends(self) -> list[int]:
        """New tokens of each prompt."""
        return [self.prompt] * self.prompts if self.prompt else []

    @property
    def lens(self) -> list[int]:
        """Tokens in the KV of each request after the step."""
        return [self.cached + new for new in self.extends] + [self.context] * self.decodes

    @property
    def tokens(self) -> int:
        """That are computed."""
        return sum(self.extends) + self.decodes


def shapes(max_context: int, kv_tokens: int, max_running: int, largest_step: int, page_size: int) -> list[Shape]:
    """The steps to time on a runner of these bounds."""
    longest = min(max_context, kv_tokens)
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max_running]
    contexts = [n for n in (16, 64, 256, 1024, 4096, 16384) if n <= longest]
    totals = [n for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= largest_step]
    lengths = [n for n in totals if n <= longest]
    found = [Shape(decodes=n, context=context) for context in contexts for n in sizes]
    found += [Shape(n, cached) for cached in (0, *contexts[1:]) for n in lengths]
    # Several prompts: fewer pairs than one of so many tokens has, and larger steps than one prompt can be.
    found += [
        Shape(total // n, prompts=n)
        for n in (2, 4, 16, max_running)
        for total in totals
        if lengths[0] <= total // n <= lengths[-1]
    ]
    beside = [(n, context) for n in (1, *sizes[2::2]) for context in contexts[::2]]
    found += [Shape(n, cached, *decodes) for n in lengths[::3] for cached in (0, contexts[-1]) for decodes in beside]
    found += [Shape(n, 0, *decodes, prompts=4) for n in lengths[::3] for decodes in beside]
    return [
        shape
        for shape in dict.fromkeys(found)
        if shape.prompt + shape.cached <= longest
        and shape.decodes * shape.context <= MOST_TOKENS
        and len(shape.lens) <= max_running
        and sum(_pages(shape, page_size)) <= kv_tokens // page_size
        and shape.tokens <= largest_step
    ]


def _pages(shape: Shape, page_size: int) -> list[int]:
    return [-(-length // page_size) for length in shape.lens]


def step_of(shape: Shape, page_size: int, vocab: int) -> ModelWorkerBatch:
    """The shape as a batch of requests that begin in it, decodes and their cached tokens included: nobody reads what is in
    their KV. The prompts' tokens are all kinds of tokens, or a router would send all of them to the same experts."""
    lens, extends = shape.lens, shape.extends
    prompts, new = len(extends), sum(extends)
    first = np.concatenate(([0], np.cumsum(_pages(shape, page_size))))
    params = SamplingParams(1, temperature=0.0)
    nothing = np.zeros(0, np.int32)
    return ModelWorkerBatch(
        0,
        "mixed" if prompts and shape.decodes else "prefill" if prompts else "decode",
        np.arange(len(lens)),
        0,
        np.array(lens),
        np.array([*extends, *[1] * shape.decodes]),
        prompts,
        len(lens),
        new,
        shape.decodes,
        sum(lens),
        spread_ids(new, vocab) if prompts else None,
        None,
        tuple(NewRequest(row, str(row), length, nothing, params) for row, length in enumerate(lens)),
        None,
        None,
        tuple(PageWrite(row, 0, np.arange(*first[row : row + 2], dtype=np.int32)) for row in range(len(lens))),
        sum(lens),
        0,
        len(lens),
    )


def spread_ids(count: int, vocab: int) -> np.ndarray:
    """int32[count], token ids from all over the vocabulary."""
    return (np.arange(count) * 7919 % vocab).astype(np.int32)


def time_shape(
    run: Callable[[ModelWorkerBatch, np.ndarray], dict[str, float]],
    shape: Shape,
    page_size: int,
    vocab: int,
    most_repeats: int = MOST_REPEATS,
) -> dict[str, float]:
    """Median seconds of each operator over repetitions of the step; the first one, which warms up, does not count.

    ``run(batch, known)`` runs a step whose decodes continue the tokens ``known``, int64[decodes].
    """
    batch, known = step_of(shape, page_size, vocab), spread_ids(shape.decodes, vocab).astype(np.int64)
    run(batch, known)
    again = batch._replace(new_requests=(), page_writes=())
    seen: dict[str, list[float]] = defaultdict(list)
    repeats, took_s = 0, 0.0
    while repeats < LEAST_REPEATS or (took_s < ENOUGH_S and repeats < most_repeats):
        for name, seconds in run(again, known).items():
            seen[name].append(seconds)
        repeats += 1
        took_s += seen["step"][-1]
    return {name: float(np.median(values)) for name, values in seen.items()}


def shape_file(folder: Path, shape: Shape, visit: int) -> Path:
    """Return where a shape's measurement is kept in a folder of points."""
    return folder / FOLDER / f"{shape.name}.{visit}.json"


def write_shape(file: Path, shape: Shape, seconds: Mapping[str, float]) -> None:
    """Keep what a shape's operators took."""
    rounded = {name: round(value, 9) for name, value in seconds.items()}
    write_json(file, {"shape": asdict(shape), "seconds": rounded}, RecordError)


def read_shape(file: Path) -> tuple[Shape, dict[str, float]]:
    """Return what was kept. Raises RecordError."""
    content = read_json(file, RecordError)
    try:
        shape = Shape(**content["shape"])
        return shape, {str(name): float(value) for name, value in content["seconds"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{file}: not what a calibration writes ({type(error).__name__}: {error})") from None


def shape_files(folder: Path) -> list[Path]:
    """Every shape that was measured in a folder of points."""
    return sorted((folder / FOLDER).glob("*.json"))
