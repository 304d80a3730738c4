"""How many tokens each rank computes in a step that ranks take together: its own, padded as the engine does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from workbench.scheduler.batch import ModelWorkerBatch

_NONE, _PIECES, _WHOLE = range(3)
"""What of a step a rank could replay from a graph: nothing, all but attention, everything."""


def group_tokens(
    batches: Sequence[ModelWorkerBatch | None],
    decode_sizes: Sequence[int],
    mixed_sizes: Sequence[int],
    pads: str,
) -> list[int]:
    """Tokens of each rank; None is one with nothing to run, which takes part with one token.

    ``decode_sizes`` and ``mixed_sizes`` are those of captured graphs, ``pads`` as in ``ExchangeRule``.
    """
    counts = [1 if batch is None else batch.prefill_tokens + batch.decode_tokens for batch in batches]
    prompts = [batch is not None and batch.num_prefill > 0 for batch in batches]
    able = [_able(*each, decode_sizes, mixed_sizes) for each in zip(counts, prompts, strict=True)]
    own = [_pad(count, mixed_sizes if has else decode_sizes) for count, has in zip(counts, prompts, strict=True)]
    together = min(able)
    if pads == "always" or together == _WHOLE:
        return [max(own)] * len(own)
    if pads == "own":
        return own
    if together == _NONE:
        return counts
    return [max(_pad(count, mixed_sizes) for count in counts)] * len(counts)


def _able(count: int, prompts: bool, decode_sizes: Sequence[int], mixed_sizes: Sequence[int]) -> int:
    if not prompts and decode_sizes and count <= decode_sizes[-1]:
        return _WHOLE
    return _PIECES if mixed_sizes and count <= mixed_sizes[-1] else _NONE


def _pad(count: int, sizes: Sequence[int]) -> int:
    return sizes[bisect_left(sizes, count)] if sizes and count <= sizes[-1] else count
