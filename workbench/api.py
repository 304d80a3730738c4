"""Simulate and read runs from Python: what ``import workbench`` offers. docs/api.md has it with examples."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reports.metrics.refused import refused
from reports.record.out_folder import prepare_out
from reports.record.run_record import RunRecord, read_record, write_record
from traces import Trace, TraceError, TraceRequest, trace_of
from workbench.clients.trace_input import open_as, reshaped
from workbench.cluster.pools import renamed_in_gpus, resolve_pools
from workbench.cluster.simulate import simulate_loop
from workbench.scheduler.own_code import name_of
from workbench.scheduler.settings import ConfigError
from workbench.settings.idle import check_effects
from workbench.settings.loading import SETTINGS, checked_values, renamed, settings_from


def simulate(
    trace: str | Path | Trace | Iterable[TraceRequest], *, out: str | Path | None = None, **settings: Any
) -> RunRecord:
    """Simulate one run and return its record.

    ``trace`` is a file of any known format, an opened trace (``workbench.open_trace`` says how a file is to be read), or
    requests: arrivals in seconds, lengths in tokens. Its requests are not changed.

    ``settings`` are those of ``workbench simulate``, under the names of its flags with underscores; what is not given
    has the default of the command, and None stands for unset. Times are seconds, lengths tokens, rates requests a second.
    ``policy``, ``cost``, ``router`` and ``loop`` also take a class or function of one's own, or its ``module:Name``.
    ``pool`` is a list of pools, each as ``--pool`` takes it or a mapping of ``name``, ``role``, ``count`` and settings. One
    run has one loop.

    ``out`` is a new folder for the record (docs/run-record.md), written whole or not at all.

    Notes that the command would print, such as on requests that can never be served, are warnings (``UserWarning``).

    Raises ValueError with one line for whatever cannot be: ``ConfigError`` for settings, ``TraceError`` for a trace,
    ``CatalogueError`` for an unknown model or GPU, ``ModelDoesNotFit``, ``CostError`` or ``ProfileError`` for a cost model,
    ``RecordError`` for ``out``. KeyboardInterrupt ends it between two steps.
    """
    said = _plain(settings)
    given = checked_values(said)
    # For a setting that may be unset while its default is a number, None is a value; a command line writes it as 0.
    flags = {name: 0 if value is None and SETTINGS[name].zero_is_none else value for name, value in given.items()}
    chosen = settings_from(None, flags)
    if len(chosen.loops) > 1:
        raise ConfigError(f"loop: {chosen.loop!r} names several; a run has one")
    (loop,) = chosen.loops
    in_files = renamed_in_gpus(pool.settings.gpu for pool in chosen.pools(loop))
    for note in (*renamed(said), *check_effects(chosen, flags, None), *in_files):
        warnings.warn(note, stacklevel=2)
    pools = resolve_pools(chosen, loop)
    opened = _opened(trace, chosen.concurrency is None, chosen.seed)
    if out is not None:
        prepare_out(out, advice="give a new folder, or remove what is in it")
    try:
        record = simulate_loop(
            chosen,
            loop,
            reshaped(opened, chosen),
            trace_sha256=opened.sha256(),
            command=_call(opened.info.path, said, out),
            pools=pools,
        )
        if record.meta["interrupted"]:
            raise KeyboardInterrupt
        if out is not None:
            write_record(record, out)
    except BaseException:
        if out is not None:
            with contextlib.suppress(OSError):  # what was there before is no reason
                Path(out).rmdir()
        raise
    if (lost := refused(record)) is not None:
        warnings.warn(lost.sentence, stacklevel=2)
    return record


def load_record(folder: str | Path) -> RunRecord:
    """Read the record of a run, whoever made it: simulated, replayed, served, observed or imported.

    Raises RecordError, a ValueError of one line that names the file, the line and the column, for a folder that is no run
    and for a file that cannot be read.
    """
    return read_record(folder)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file has them: names for code of one's own, texts for paths, Python's numbers for NumPy's."""
    return {name: _plain_value(name, value) for name, value in settings.items()}


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, type) or inspect.isroutine(value):
        return name_of(name, value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):  # of pools
        return [_plain(each) if isinstance(each, Mapping) else each for each in value]
    return value


def _opened(trace: str | Path | Trace | Iterable[TraceRequest], ordered: bool, seed: int) -> Trace:
    if isinstance(trace, Trace):
        return trace
    if isinstance(trace, str | Path):
        return open_as(Path(trace), {}, ordered=ordered, seed=seed)
    if not isinstance(trace, Iterable):
        raise TraceError("trace", 0, "", f"is {str(trace)[:40]!r}, which is no file, no trace and no requests")
    return trace_of(tuple(trace), ordered=ordered)


def _call(trace: str, settings: Mapping[str, Any], out: str | Path | None) -> str:
    """The call, as a record says by what it was made."""
    more = {**settings, **({"out": str(out)} if out is not None else {})}
    return f"workbench.simulate({', '.join([repr(trace), *(f'{name}={value!r}' for name, value in more.items())])})"
