"""The fitted cost model: a step's time as a few coefficients, found from the iterations of a run record.

    step = c0 + c1 tokens + c2 max(tokens - knee, 0) + c3 decodes + c4 context of decodes
         + (steps with prompts only) c5 + c6 prompt tokens x their mean context

The terms are a roofline's: weights are read whatever the batch (c0), arithmetic shows beyond a knee (c1, c2), attention
reads the context of decodes (c4) and multiplies prompts with theirs (c6). Coefficients are not negative, so the model
never predicts that more work takes less time, also outside the range that the record covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.simulated.catalogue.gpu_specs import GPU
from backends.simulated.catalogue.model_specs import ModelSpec
from backends.simulated.cost.models.communication import next_stage_s
from backends.simulated.cost.models.least_squares import relative_least_squares
from ground.errors import InputError
from workbench.scheduler.batch import ModelWorkerBatch

TERMS = ("step_s", "token_s", "token_beyond_knee_s", "decode_s", "decode_context_s", "prompt_step_s", "prompt_pair_s")
KNEES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
LEAST_STEPS = 20


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one pipeline stage."""

    values: tuple[float, ...]
    """Seconds, one for each of :data:`TERMS`."""
    knee_tokens: int

    def seconds(self, prompt: float, decodes: float, context: float, pairs: float) -> float:
        """A step of ``prompt`` prompt tokens and ``decodes`` decodes at ``context`` context tokens in all; ``pairs`` is
        the prompt tokens times the mean context they attend to."""
        v = self.values
        tokens = prompt + decodes
        seconds = v[0] + v[1] * tokens + v[3] * decodes + v[4] * context
        if tokens > self.knee_tokens:
            seconds += v[2] * (tokens - self.knee_tokens)
        if prompt:
            seconds += v[5] + v[6] * pairs
        return seconds


@dataclass(frozen=True)
class Fit:
    """Coefficients and how well they describe what they were fitted to."""

    coefficients: Coefficients
    steps: int
    mean_error: float
    """Mean over steps of the absolute relative error."""
    total_error: float
    """Relative error of the sum of all steps."""


def fit_steps(
    prompt: np.ndarray,
    decodes: np.ndarray,
    context: np.ndarray,
    prompts: np.ndarray,
    seconds: np.ndarray,
    pairs: np.ndarray | None = None,
    decode_context: np.ndarray | None = None,
) -> Fit:
    """Fit coefficients to measured steps: ``prompt`` tokens in ``prompts`` prompts, ``decodes``, ``context`` tokens of
    all requests after the step, and ``seconds``. The errors that are made small are relative ones. ``pairs`` (prompt tokens
    times the mean context they attend to) and ``decode_context`` are guessed where they are not given.

    Raises ``InputError`` for too few steps.
    """
    if len(seconds) < LEAST_STEPS:
        raise InputError(f"{len(seconds)} steps are too few to fit {len(TERMS)} coefficients; {LEAST_STEPS} are needed")
    # How the context divides between prompts and decodes is not recorded: prompts are taken to have no cached prefix.
    of_prompts = np.minimum(prompt, context)
    of_decodes = np.where(decodes > 0, context - of_prompts, 0) if decode_context is None else decode_context
    if pairs is None:
        pairs = prompt * np.where(prompts > 0, of_prompts / np.maximum(prompts, 1), 0) / 2
    tokens = prompt + decodes
    best: tuple[float, np.ndarray, int] | None = None
    for knee in KNEES:
        if knee and knee >= tokens.max():
            break
        rows = np.stack(
            (
                np.ones(len(seconds)),
                tokens,
                np.maximum(tokens - knee, 0) if knee else np.zeros(len(seconds)),
                decodes,
                of_decodes,
                prompt > 0,
                pairs,
            ),
            axis=1,
        ).astype(np.float64)
        values = relative_least_squares(rows, seconds)
        error = float(abs(rows @ values / seconds - 1).mean())
        if best is None or error < best[0]:
            best = error, values, knee
    assert best is not None
    error, values, knee = best
    found = Coefficients(tuple(float(v) for v in values), knee)
    predicted = sum(found.seconds(*at) for at in zip(prompt, decodes, of_decodes, pairs, strict=True))
    return Fit(found, len(seconds), error, float(predicted / seconds.sum() - 1))


class FittedCost:
    """Step times by coefficients, one set a pipeline stage."""

    def __init__(self, stages: list[Coefficients], model: ModelSpec, gpu: GPU, tp: int = 1) -> None:
        self._stages, self._model, self._gpu, self._tp = stages, model, gpu, tp
        self.notes: list[str] = []

    def forward(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds of GPU time of one stage."""
        prompts = batch.num_prefill
        if not prompts:
            return self._stages[stage].seconds(0, batch.decode_tokens, batch.context_tokens, 0.0)
        new = batch.query_lens[:prompts]
        lens = batch.seq_lens[:prompts]
        pairs = float((new * (lens - new / 2)).sum())
        context = batch.context_tokens - float(lens.sum())
        return self._stages[stage].seconds(batch.prefill_tokens, batch.decode_tokens, context, pairs)

    def transfer_s(self, batch: ModelWorkerBatch, stage: int = 0) -> float:
        """Seconds to send hidden states and residuals to the next stage."""
        tokens = batch.prefill_tokens + batch.decode_tokens
        return next_stage_s(tokens, self._model.hidden, self._tp, self._gpu, stage)
