"""The share of their output bound that running requests are expected to use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.flights import Flights
from workbench.scheduler.request import Req
from workbench.scheduler.running import RunningSet
from workbench.scheduler.slots import Slots

OUTPUT_ESTIMATE_LIMIT = 4096
"""Admission expects no request to write more than this many tokens, whatever its bound."""
RETRACT_LOOKAHEAD = 20
"""Decode steps that the estimate after a retraction should last for."""
RATIO_DECAY_STEPS = 600


class OutputEstimate:
    """``new_token_ratio``: the share of what requests may still write that admission sets KV aside for.

    It falls in equal steps with every decode step without a retraction, jumps with a retraction, and starts afresh at rest.
    Where nothing is estimated (``reserve``) it is 1: admission counts on all that they may write, or on none of it.
    """

    def __init__(self, config: SchedulerConfig, slots: Slots, flights: Flights) -> None:
        self.new_token_ratio = 0.0
        self._slots, self._flights = slots, flights
        self._estimates = config.reserve == "estimate"
        self._most = {"estimate": OUTPUT_ESTIMATE_LIMIT, "full": config.max_context, "none": 0}[config.reserve]
        self._limit = np.array(self._most)
        by_running = config.page_rest == "running"
        self._unit = 1 if by_running else config.page_size
        """What the need of a waiting request is rounded up to."""
        self._page_rest = config.page_size - 1 if by_running else 0
        """Tokens of its last page that each running request is counted with."""
        self._whole = config.reserve_ignore_eos
        self._round = config.round_reserve
        self._at_result = config.outputs_counted == "result"
        alike = self._round and not self._whole and not self._at_result
        some = self._reserved_and_rest if self._page_rest else self._reserved_alike
        self.reserved_tokens = some if alike else self._reserved_each
        """KV that the running requests are expected to need yet."""
        self.scale(config.conservativeness)

    def scale(self, conservativeness: float) -> None:
        """Start afresh under another ``conservativeness``, the factor on what it starts from."""
        self.conservativeness = conservativeness
        self._least = 0.14 * self.initial if self._estimates else 1.0
        self._step = (self.initial - self._least) / RATIO_DECAY_STEPS
        self.reset()

    @property
    def initial(self) -> float:
        return min(0.7 * self.conservativeness, 1.0) if self._estimates else 1.0

    def reset(self) -> None:
        self.new_token_ratio = self.initial

    def decay(self, steps: int = 1) -> None:
        """After decode steps without retraction: fall in equal steps towards 14 % of the initial value."""
        while steps and self.new_token_ratio != self._least:
            self.new_token_ratio = max(self.new_token_ratio - self._step, self._least)
            steps -= 1

    def retracted(self, running: RunningSet) -> None:
        """After a retraction: expect of the requests that are left what they have shown, plus a few steps."""
        if not self._estimates:
            return
        bound = sum(req.max_new for req in running.reqs)
        generated = bound - int(running.remaining.sum())
        if self._at_result:
            sampled = self._flights.sampled()
            generated -= sum(id(req) in sampled for req in running.reqs)
        ratio = (generated + RETRACT_LOOKAHEAD * running.count) / (bound + 1)
        self.new_token_ratio = min(1.0, ratio)

    def outputs(self, running: RunningSet) -> np.ndarray:
        """int64[n], tokens that each has written, as they are counted; all of them one less where none is in doubt."""
        outputs: np.ndarray = running.confirmed - [req.input_len for req in running.reqs]
        if self._at_result:
            sampled = self._flights.sampled()
            outputs = outputs - [id(req) in sampled for req in running.reqs]
        return outputs

    def expected_of(self, running: RunningSet) -> dict[Req, float]:
        """What each is expected to write yet; where it counts only with its result, of those too that end in flight."""
        sampled = self._flights.sampled() if self._at_result else ()
        ratio, whole = self.new_token_ratio, self._whole
        left = {
            req: self.most(left + (id(req) in sampled))
            for req, left in zip(running.reqs, running.remaining.tolist(), strict=True)
        }
        if self._at_result:
            left |= dict.fromkeys(self._flights.ending(), 1)
            left |= {req: self.most(req.max_new - req.output_len) for req in self._lingering()}
        rest = self._page_rest
        return {req: most * (1.0 if whole and req.params.ignore_eos else ratio) + rest for req, most in left.items()}

    def _lingering(self) -> list[Req]:
        return [req for slot in self._slots for req in slot.lingering]

    def _reserved_each(self, running: Sequence[RunningSet]) -> float:
        expected = 0.0
        # One after the other: a sum of floats depends on it, and what is compared with it exactly on the last bit.
        for one in running:
            for tokens in self.expected_of(one).values():
                expected += tokens
        return math.ceil(expected) if self._round else expected

    def _reserved_and_rest(self, running: Sequence[RunningSet]) -> float:
        return self._reserved_alike(running) + self._page_rest * sum(one.count for one in running)

    def _reserved_alike(self, running: Sequence[RunningSet]) -> float:
        expected = sum(sum(np.minimum(one.remaining, self._limit).tolist()) for one in running if one.count)
        return math.ceil(expected * self.new_token_ratio)

    def share(self, remaining: int) -> int:
        """KV that a running request which may write so many tokens more is counted with."""
        return int(self.most(remaining) * self.new_token_ratio) + self._page_rest

    def need(self, req: Req, extend: int) -> int:
        """KV that a waiting request is let in for, of whose tokens ``extend`` are to be computed."""
        return self.rounded(extend + self.most_output(req))

    def rounded(self, tokens: int) -> int:
        """KV that so many tokens of a waiting request are counted as."""
        return -(-tokens // self._unit) * self._unit

    def most_output(self, req: Req) -> int:
        """Tokens admission expects a request still to write, at most."""
        return self.most(req.max_new - req.output_len)

    def most(self, output: int) -> int:
        """Tokens it expects of ``output`` that a request may write."""
        return min(output, self._most)
