"""The trace of a run: opened as its flags say, and reshaped as its settings say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traces.reshape import reshape

if TYPE_CHECKING:
    from traces import Trace
    from workbench.settings.run_settings import LoadSettings


def open_trace(path: str | Path, format: object = "auto", tokenizer: str | Path | None = None, **how: Any) -> Trace:
    """Open a trace as :func:`traces.open_trace` does; ``format`` may also be a reader's class of one's own
    (:class:`traces.given.Reader`), or its ``module:Class``.

    Raises TraceError for a file that cannot be read, and ValueError for a reading that makes no sense.
    """
    from workbench.scheduler.own_code import name_of

    given = {**how, "format": name_of("format", format) if isinstance(format, type) else format, "tokenizer": tokenizer}
    places = {name: given.pop(name) for name in ("ordered", "seed") if name in given}
    return open_as(Path(path), given, **places)


def open_as(path: Path, reading: Mapping[str, Any], *, ordered: bool = True, seed: int = 0) -> Trace:
    """The trace, read as ``reading`` says: fields of :class:`traces.trace.ReadAs`, where ``format`` may also be the
    ``module:Class`` of a reader of one's own (:class:`traces.given.Reader`). Without ``ordered``, arrivals have no meaning
    and may go back; ``seed`` is that of drawn output lengths.

    Raises TraceError, and ValueError for a reading that makes no sense.
    """
    from traces import open_trace
    from workbench.scheduler.settings import is_own

    given = dict(reading)
    if is_own(spec := str(given.get("format", ""))):
        given["format"] = _own_format(spec)
    return open_trace(path, **given, ordered=ordered, seed=seed)


def reshaped(trace: Trace, settings: LoadSettings) -> Trace:
    """The trace as the settings want it: at another rate or speed, or only its beginning. Raises TraceError."""
    return reshape(trace, settings.rate, settings.speedup, settings.requests, settings.seed)


def _own_format(spec: str) -> Any:
    from traces import own_format
    from workbench.scheduler.own_code import make_own

    return own_format(spec, make_own("format", spec, {"read": ("reading",)}))
