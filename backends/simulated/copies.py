"""Copies of KV pages beside the computation."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.scheduler.batch import KVCopy


class CopyEngine:
    """A GPU's copies: a queue for each direction, because links carry both ways at once. A copy takes bytes / bandwidth.

    What a batch saves, loads or receives has to be copied before it starts; what it stores or sends is final once it has
    ended.
    """

    def __init__(self, page_bytes: float, host_bytes_s: float, peer_bytes_s: float) -> None:
        """``page_bytes``: of one page on one GPU; ``host_bytes_s``: between it and the host's memory, each way;
        ``peer_bytes_s``: between it and its counterpart of another instance, each way."""
        self._page_s = {
            "load": page_bytes / host_bytes_s,
            "store": page_bytes / host_bytes_s,
            "send": page_bytes / peer_bytes_s,
            "receive": page_bytes / peer_bytes_s,
        }
        self._free_s = dict.fromkeys(self._page_s, 0.0)

    def before(self, copies: Sequence[KVCopy], at_s: float, written_s: float = 0.0) -> float:
        """Find when what a batch reads is there, if its copies may begin at ``at_s``; pages that are saved hold what they
        are to hold from ``written_s`` on."""
        saves = [copy for copy in copies if copy.direction == "save"]
        saved_s = self._make(saves, max(at_s, written_s)) if saves else at_s
        return max(self._make([copy for copy in copies if copy.direction in ("load", "receive")], at_s), saved_s)

    def after(self, copies: Sequence[KVCopy], at_s: float) -> float:
        """Find when what a batch gives away has been copied, if it ends at ``at_s``."""
        return self._make([copy for copy in copies if copy.direction in ("store", "send")], at_s)

    def _make(self, copies: Sequence[KVCopy], at_s: float) -> float:
        end_s = at_s
        for direction, pages, *_ in copies:
            direction = "store" if direction == "save" else direction  # the same way over the same link
            begin_s = max(self._free_s[direction], at_s)
            self._free_s[direction] = begin_s + len(pages) * self._page_s[direction]
            end_s = max(end_s, self._free_s[direction])
        return end_s
