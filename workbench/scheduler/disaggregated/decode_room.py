"""Room on a decode instance: who may get pages before the KV that goes into them exists."""

from __future__ import annotations

from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.estimate import OUTPUT_ESTIMATE_LIMIT
from workbench.scheduler.parts import Parts
from workbench.scheduler.request import Req


class DecodeRoom:
    """KV that may be set aside, in tokens, so that whoever is here can go on for a while.

    Every request that is in transfer, has arrived or runs keeps ``reserved_decode_tokens`` free for what it will write. And
    if all others were retracted, each of those that run would have room to reach its output bound.
    """

    def __init__(self, config: SchedulerConfig, parts: Parts) -> None:
        self._reserved = config.reserved_decode_tokens
        self._kv, self._running = parts.kv, parts.slots[0].running
        self._page = config.page_size

    def left(self, aside: int) -> int:
        """Return what may be set aside now, with ``aside`` requests in transfer or arrived."""
        running, kv = self._running, self._kv
        reserved = self._reserved * (running.count + aside)
        if running.count:
            longest = max(req.input_len + min(req.max_new, OUTPUT_ESTIMATE_LIMIT) for req in running.reqs)
            reserved = max(reserved, longest - running.context_tokens)
        return kv.available_pages * self._page - reserved

    def need(self, tokens: int) -> int:
        """Return what a request takes whose KV has so many tokens."""
        return self._kv.pages_for(tokens) * self._page + self._reserved

    def least(self, req: Req, tokens: int) -> int:
        """Return what there has to be for a new request: what it takes, and no less than it needs to reach its output bound
        once all that run are retracted."""
        most = tokens + min(req.max_new, OUTPUT_ESTIMATE_LIMIT) - self._running.context_tokens
        return max(self.need(tokens), most)
