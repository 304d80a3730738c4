"""Arrivals that a log has only to the tick of a coarse clock, spread over the tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from ground.errors import InputError
from traces.files.look_ahead import look_ahead
from traces.requests.trace_request import TraceRequest

AUTO, OFF = "auto", "off"
LEAST_STAMPS = 10
"""Fewer different arrivals show no tick."""
LEAST_TICK_S = 0.1
"""Equal arrivals on a finer clock are a burst."""
MOST_OFF = 0.01
"""Share of a tick by which a stamp may miss it: clocks jitter."""
SHARE_ON_TICK = 0.9
SHARE_TOGETHER = 0.5


def parse_spread(text: str) -> float | str:
    """Read `auto`, `off` or seconds.

    Raises InputError for anything else.
    """
    if text in (AUTO, OFF):
        return text
    try:
        tick_s = float(text)
    except ValueError:
        tick_s = -1.0
    if not 0 < tick_s < float("inf"):
        raise InputError(f"spread-ticks: '{text}' is not auto, off or a number of seconds")
    return tick_s


def spread_ticks(
    requests: Iterable[TraceRequest], spread: float | str, note: Callable[[str], None]
) -> Iterator[TraceRequest]:
    """Move requests with equal arrivals to even distances, up to the next arrival but at most one tick.

    `spread` is the tick in seconds, or `auto`: the one that the file shows, if it does. A tick's requests are held back
    until the next arrival shows how long it lasted.
    """
    if spread == OFF:
        yield from requests
        return
    stream = iter(requests)
    if spread == AUTO:
        first, stream = look_ahead(requests)
        tick_s = find_tick_s([request.arrival_s for request in first if request.arrival_s is not None])
        if tick_s is None:
            yield from stream
            return
        note(f"arrivals come in ticks of {tick_s:g} s: those of a tick are spread evenly over it (--spread-ticks off)")
    else:
        tick_s = float(spread)
        note(f"equal arrivals are spread evenly over {tick_s:g} s, or up to the next one")
    held: list[TraceRequest] = []
    arrivals, stamp_s = 0, 0.0
    for request in stream:
        if request.arrival_s is not None:
            if arrivals and request.arrival_s != stamp_s:
                yield from _spread(held, stamp_s, min(stamp_s + tick_s, request.arrival_s), arrivals)
                held, arrivals = [], 0
            stamp_s = request.arrival_s
            arrivals += 1
        held.append(request)
    yield from _spread(held, stamp_s, stamp_s + tick_s, arrivals)


def _spread(held: list[TraceRequest], start_s: float, end_s: float, arrivals: int) -> list[TraceRequest]:
    step_s = (end_s - start_s) / max(1, arrivals)
    place = 0
    for request in held:
        if request.arrival_s is not None:
            if place:
                # Rounded, it may leave a tick that is shorter than a microsecond.
                request.arrival_s = min(max(start_s, round(start_s + place * step_s, 6)), end_s)
            place += 1
    return held


def find_tick_s(arrivals_s: list[float]) -> float | None:
    """The tick of the clock that made these stamps; None where they show none.

    They show one if the different stamps are at least `LEAST_STAMPS`, nearly all are whole multiples of the commonest gap
    between them, counted from the first, at least half of the requests share theirs with others, and not every stamp with
    equally many, as in a load that was made up in batches.
    """
    counts = Counter(arrivals_s)
    stamps = sorted(counts)
    if len(stamps) < LEAST_STAMPS:
        return None
    together = sum(count for count in counts.values() if count > 1)
    # The last stamp may have been cut.
    if together < SHARE_TOGETHER * len(arrivals_s) or len({counts[stamp] for stamp in stamps[:-1]}) == 1:
        return None
    gaps = Counter(round(after - before, 2) for before, after in pairwise(stamps))
    for gap_s in sorted((gap_s for gap_s, _ in gaps.most_common(3)), reverse=True):
        if gap_s < LEAST_TICK_S:
            continue
        off = [abs((stamp - stamps[0]) / gap_s - round((stamp - stamps[0]) / gap_s)) for stamp in stamps]
        if sum(share <= MOST_OFF for share in off) >= SHARE_ON_TICK * len(stamps):
            return gap_s
    return None
