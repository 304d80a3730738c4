"""What one kind of layer does with the tokens before, out of measurements: attention of every sort, and recurrences.

Prompts and decodes were measured apart and run one after the other. Every time is of one layer on one GPU. Beyond the
measured range, times go on in proportion to the pairs, tokens or requests that there are more; a note says so once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from backends.simulated.cost.models.layer_times import MixerTimes
from backends.simulated.cost.models.operator_tables import Curve, Grid

Beyond = Callable[[str, int, int], None]
"""Takes what is beyond the measured range, its value, and the end of the range."""


@dataclass(frozen=True)
class Seen:
    """How many tokens a token sees: all before it, those in a window, or those back to the beginning of a chunk."""

    window: int | None = None
    chunked: bool = False

    def pairs(self, length: float) -> float:
        """Pairs of query and key in a prompt of a length."""
        window = self.window
        if window is None or length <= window:
            return length * (length + 1) / 2
        if self.chunked:
            whole, rest = divmod(length, window)
            return whole * window * (window + 1) / 2 + rest * (rest + 1) / 2
        return window * (window + 1) / 2 + (length - window) * window


@dataclass
class MeasuredPrompts:
    """Prompts of one kind of layer.

    Prompts of several lengths are looked up as so many equal ones with as many tokens and pairs. A cached prefix was
    measured too (``grid`` has a third axis), or is charged by the pairs it adds.
    """

    grid: Grid
    """(prompts, tokens of each), and perhaps (tokens before each)."""
    seen: Seen = field(default_factory=Seen)
    pair_s: float = 0.0
    """Seconds for a pair of query and key more, of long prompts."""
    token_s: float = 0.0
    """Seconds for a token more, beyond the longest prompts."""
    longest: float = np.inf
    """Tokens up to which the table is of prompts whose tokens see what these do; from there on pairs count."""
    of_context: Curve | None = None
    """Products that run over all tokens of prompts and of what is before them."""

    def __post_init__(self) -> None:
        self._longest = min(self.longest, self.grid.ends[1])
        self.with_prefixes = len(self.grid.ends) > 2
        # A clock waits for plain numbers, not for numpy's.
        self.pair_s, self.token_s = float(self.pair_s), float(self.token_s)

    def seconds(self, new: np.ndarray, context: np.ndarray, beyond: Beyond) -> float:
        """Prompts with ``new`` tokens, at the end of as much context."""
        tokens = squares = more = before = 0.0
        pairs = self.seen.pairs
        # Prompts are few: numpy would take longer.
        for count, end in zip(new.tolist(), context.tolist(), strict=True):
            tokens += count
            squares += count * count
            if end > count:
                before += count * (end - count)
                more += pairs(end) - pairs(end - count) - pairs(count)
        prompts, each, longest = tokens * tokens / squares, squares / tokens, self._longest
        where: tuple[float, ...] = (prompts, each)
        if self.with_prefixes:
            prefix = before / tokens
            where, more = (*where, prefix), 0.0
            if prefix > (end := self.grid.ends[2]):
                beyond("tokens before a prompt", int(prefix), int(end))
                more = tokens * (prefix - end)
        seconds = self.grid.at(*where) if each <= longest else self.grid.at(prompts, longest, *where[2:])
        if each > longest:
            if longest < self.longest:
                beyond("tokens of a prompt", int(each), int(longest))
            more += prompts * (pairs(each) - pairs(longest))
            seconds += prompts * (each - longest) * self.token_s
        if prompts > (most := self.grid.ends[0]):
            beyond("prompts a step", int(prompts), int(most))
            seconds *= prompts / most
        if self.of_context is not None:
            read = float(context.sum())
            seconds += self.of_context.at(read) * max(read / self.of_context.most, 1.0)
        return seconds + more * self.pair_s


@dataclass
class MeasuredDecodes:
    """Decodes of one kind of layer."""

    grid: Grid
    """(requests, context tokens of each); or (requests,), of recurrences."""
    seen: Seen = field(default_factory=Seen)
    clip: float = np.inf
    """Tokens of a context beyond which time no longer grows."""
    always: bool = False
    """The table is of decodes that see everything: what is beyond ``clip`` is never looked up."""
    of_requests: Curve | None = None
    """Products that run over the decodes beside attention."""

    def seconds(self, context: np.ndarray, total: float, beyond: Beyond) -> float:
        """Decodes at these contexts, ``total`` in all."""
        count, ends = len(context), self.grid.ends
        if len(ends) == 1:
            where: tuple[float, ...] = (count,)
        elif self.seen.chunked:
            assert self.seen.window is not None
            where = (count, float(((context - 1) % self.seen.window).sum()) / count + 1)
        elif self.clip < np.inf and (self.always or context.min() < self.clip):
            where = (count, float(context.clip(max=self.clip).sum()) / count)
        else:
            where = (count, total / count)
        seconds = self.grid.at(*where)
        for name, value, end in zip(("decodes", "context tokens of a decode"), where, ends):  # noqa: B905
            if value > end:
                beyond(name, int(value), int(end))
                seconds *= value / end
        if self.of_requests is not None:
            seconds += self.of_requests.at(count) * max(count / self.of_requests.most, 1.0)
        return seconds


def _untold(what: str, value: int, most: int) -> None:
    """Tell nobody what is beyond the measured range."""


@dataclass
class MeasuredMixer:
    """One kind of layer, with the roofline in place of what was not measured of it."""

    prompts: MeasuredPrompts | None
    decodes: MeasuredDecodes | None
    shape: MixerTimes
    whole: bool = False
    """The products around are in these times."""
    _beyond: Beyond = field(default=_untold, init=False)

    def tell(self, beyond: Beyond) -> None:
        """Have ``beyond`` told what is beyond the measured range."""
        self._beyond = beyond

    @property
    def grids(self) -> dict[str, Grid]:
        """What was measured, of prompts and of decodes."""
        both = {"prompts": self.prompts, "decodes": self.decodes}
        return {name: times.grid for name, times in both.items() if times is not None}

    def prompts_s(self, new: np.ndarray, context: np.ndarray) -> float:
        """Prompts with ``new`` tokens, at the end of as much context."""
        if self.prompts is None:
            return self.shape.prompts_s(new, context) + self.shape.prompt_overhead_s
        seconds = self.prompts.seconds(new, context, self._beyond)
        if self.decodes is not None and not self.prompts.with_prefixes and not self.whole:
            cached = context[context > new]
            if len(cached):
                # Few tokens after many: as long as it takes to read these.
                seconds = max(seconds, self.decodes.seconds(cached, float(cached.sum()), self._beyond))
        return seconds

    def decodes_s(self, context: np.ndarray, total: float) -> float:
        """Decodes at these contexts, ``total`` in all."""
        if self.decodes is None:
            return self.shape.decodes_s(context, total) + self.shape.overhead_s
        return self.decodes.seconds(context, total, self._beyond)
