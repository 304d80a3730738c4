"""The scheduler's own view of a batch: the requests in it and what is known about them while it is in flight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.request import Req
from workbench.scheduler.stops import StopIds

_NOBODY = np.empty(0, np.int64)


class ScheduleBatch:
    """A batch between launch and processing.

    ``reqs`` is aligned with ``worker.rows`` and may be shared with the running set: neither changes it in place.
    """

    __slots__ = (
        "dropped",
        "ends",
        "late",
        "length_stops",
        "prefill",
        "release",
        "release_rows",
        "reqs",
        "retracted",
        "slot",
        "stop_ids",
        "token_at",
        "worker",
    )

    def __init__(
        self,
        worker: ModelWorkerBatch,
        reqs: list[Req],
        slot: int,
        prefill: Sequence[PrefillRow],
        length_stops: Sequence[int],
        retracted: Sequence[Req],
        token_at: np.ndarray,
        stop_ids: StopIds,
        ends: np.ndarray = _NOBODY,
    ) -> None:
        self.worker = worker
        self.reqs = reqs
        self.slot = slot
        self.prefill = prefill
        self.length_stops = length_stops
        """Indices of requests known at launch to reach their output bound in this step."""
        self.retracted = retracted
        """Requests that lost their KV so that this batch could be formed."""
        self.token_at = token_at
        """int64[n], where each row's sample goes in the token table (flat); not used where steps bring runs of tokens."""
        self.ends = ends
        """int64[decodes], KV length at which each decode stops by length, where steps bring runs of tokens; else empty."""
        self.stop_ids = stop_ids
        """What samples end them."""
        self.dropped: set[int] | None = None
        """Indices of requests that ended while the batch was in flight: their result is not used."""
        self.late: dict[int, Req] | None = None
        """Requests retracted while the batch was in flight: they still get their token."""
        self.release: Sequence[tuple[Req, int, int]] = ()
        """(request, valid tokens, held tokens) whose KV and row are given back once this batch is processed."""
        self.release_rows: Sequence[int] = ()
        """Rows of retracted requests: their pages are gone already, the batch still reads the row."""

    def coming(self, index: int) -> int:
        """Most tokens that a row gets of this batch."""
        worker = self.worker
        if index >= worker.num_prefill:
            return int(worker.query_lens[index])
        return int(worker.unsampled is None or index not in worker.unsampled)

    def stand_for(self, reqs: list[Req], stop_ids: StopIds) -> None:
        """Become a decode of other requests, after being processed. ``worker`` and ``token_at`` are still to be set."""
        self.reqs, self.stop_ids = reqs, stop_ids
        self.prefill = self.length_stops = self.retracted = self.release = self.release_rows = ()
        self.dropped = self.late = None


class PrefillRow:
    """A request's part in a prefill: tokens ``start`` to ``end`` of ``req.tokens`` are computed."""

    __slots__ = ("cached", "end", "last", "req", "samples", "start")

    def __init__(self, req: Req, start: int, end: int, cached: int) -> None:
        self.req = req
        self.start = start
        self.end = end
        self.cached = cached
        """Tokens found in the prefix cache at this admission; 0 for a later chunk."""
        self.last = end == len(req.tokens)
        """The prompt is complete after it."""
        self.samples = self.last and req.max_new > 0
        """A token comes of it: the first one, or after a retraction the next."""
