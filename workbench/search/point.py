"""One run of a search: from a point of its space to settings, and from those to numbers."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports.metrics.refused import refused
from reports.metrics.summary import Summary
from reports.metrics.sweep_metrics import sweep_summary
from reports.record.run_record import write_record
from traces import Trace
from workbench.clients.trace_input import reshaped
from workbench.cluster.pools import gpus_of, renamed_in_gpus, resolve_pools
from workbench.cluster.simulate import simulate_loop
from workbench.search.prices import Prices, kept_with
from workbench.search.space import Dimension, Point, SpaceError, renamed_in_vary
from workbench.settings.idle import acts
from workbench.settings.loading import SETTINGS, read_settings_file, renamed_in, settings_from
from workbench.settings.pool_keys import check_names, pools_at, split_name
from workbench.settings.pool_spec import parse_pools
from workbench.settings.run_settings import RunSettings, check_loop_name

FINISHED, INCOMPLETE, INVALID, TIMED_OUT, FAILED = "finished", "incomplete", "invalid", "timed out", "failed"
STATUSES = (FINISHED, INCOMPLETE, INVALID, TIMED_OUT, FAILED)
"""Incomplete: it ran, but some requests could never be served, so its numbers are of an easier load."""


@dataclass(frozen=True)
class Base:
    """The settings that all points share: a file's, and flags over them."""

    config: Path | None
    flags: dict[str, Any]
    loops: tuple[str, ...] = ()
    """The loops that are compared, when the loop varies. As in `simulate`, compared loops get the same GPUs."""

    @classmethod
    def for_space(cls, config: Path | None, flags: dict[str, Any], space: list[Dimension]) -> Base:
        """Raises SpaceError for a setting that is both fixed and varied, and for several loops that do not vary; ConfigError
        for loops that do not exist and for a bad settings file."""
        loops: tuple[str, ...] = ()
        for dimension in space:
            if flags.get(dimension.name) is not None:
                raise SpaceError(f"{dimension.name}: both varied and set; give one of the two")
            if dimension.name == "loop":
                loops = dimension.values
                for loop in loops:
                    check_loop_name(loop)
        base = cls(config, {name: value for name, value in flags.items() if value is not None}, loops)
        check_names([dimension.name for dimension in space], base.given().get("pool") or ())
        named = str(base.given().get("loop", ""))
        if "," in named:
            raise SpaceError(f"loop: {named!r} names several; vary them with --vary loop={named}")
        return base

    def values_of(self, name: str, space: list[Dimension]) -> list[Any]:
        """List the values of a setting over all points: those that vary, else the one that is set, if any."""
        varied = [
            value
            for dimension in space
            if (split_name(dimension.name) or ("", dimension.name))[1] == name
            for value in dimension.values
        ]
        return varied or [value for value in [self.given().get(name)] if value is not None]

    def renamed(self, vary: list[str], space: list[Dimension]) -> list[str]:
        """Notes on what is called otherwise now: settings of the file and of ``vary``, keys in the files of GPUs."""
        pools = parse_pools(self.given().get("pool") or ())
        own = [value for pool in pools for name, value in pool.given if name == "gpu"]
        in_files = renamed_in_gpus([*self.values_of("gpu", space), *own])
        return [*renamed_in(self.config), *renamed_in_vary(vary), *in_files]

    @property
    def seed(self) -> int:
        """Seed of the search, and of every run whose seed does not vary. Raises ConfigError for a bad settings file."""
        return int(self.given().get("seed", RunSettings.seed))

    def given(self) -> dict[str, Any]:
        """Merge what the file and the flags say, with nothing filled in. Raises ConfigError for a bad settings file."""
        values: dict[str, Any] = {}
        if self.config is not None:
            values = read_settings_file(self.config)
        return values | self.flags

    def said(self, point: Point) -> dict[str, Any]:
        """What a point says of the settings of a run: what it says of a pool is in the pools. Raises ConfigError for a bad
        settings file."""
        own = {name: value for name, value in point.items() if split_name(name) is not None}
        rest = {name: value for name, value in point.items() if name not in own}
        return {**rest, "pool": pools_at(rest.get("pool") or self.given()["pool"], own)} if own else rest

    def settings(self, point: Point) -> tuple[RunSettings, str]:
        """(settings of a run, its loop). Raises ConfigError for a combination that cannot be."""
        given = {**self.flags, **self.said(point)}
        if self.loops:
            given["loop"] = ",".join(self.loops)
        unset: dict[str, Any] = {name: None for name in point if point[name] is None and split_name(name) is None}
        settings = settings_from(self.config, {name: value for name, value in given.items() if value is not None})
        if unset:
            settings = dataclasses.replace(settings, **unset)
        return settings, point.get("loop") or settings.loops[0]


@dataclass(frozen=True)
class Shared:
    """Everything that all runs of a search share. Made once, before the first process is forked."""

    base: Base
    trace: Trace
    """In memory."""
    trace_sha256: str
    prices: Prices | None = None
    records: Path | None = None
    """Where run records are kept, one folder a point."""
    trace_flags: str = ""
    """Of the command line, that say how the trace is to be read."""
    command: str = field(default_factory=lambda: " ".join(["workbench", *sys.argv[1:]]))

    def check(self, point: Point) -> None:
        """Check that a point can run, and fill the caches of models and GPUs. Raises a ValueError of one line."""
        settings, loop = self.base.settings(point)
        pools = resolve_pools(settings, loop)
        if self.prices is not None:
            self.prices.an_hour(gpus_of(pools))

    def command_for(self, point: Point, **changes: Any) -> str:
        """The `simulate` command that makes the run of a point, with other settings in its place where they are given.

        Raises ConfigError for a point that cannot run.
        """
        settings, loop = self.base.settings(point)
        tp, pp = settings.layout(loop)
        given = {**self.base.flags, **self.base.said(point), "loop": loop}
        # What does nothing at this point was given for others.
        given = {name: value for name, value in given.items() if acts(settings, loop, name)}
        if (tp, pp) != (settings.tp, settings.pp):
            given |= {"tp": tp, "pp": pp}
        given |= changes
        words = ["workbench", "simulate", self.trace.info.path, *shlex.split(self.trace_flags)]
        if self.base.config is not None:
            words += ["--config", str(self.base.config)]
        for name, value in given.items():
            words += SETTINGS[name].written(value)
        return shlex.join(words)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a point."""

    status: str
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every setting as it was used."""
    metrics: Summary = field(default_factory=dict)


def run_point(shared: Shared, task: tuple[int, Point]) -> Outcome:
    """Simulate one point, to its numbers; with `shared.records`, to a run record as well."""
    number, point = task
    try:
        settings, loop = shared.base.settings(point)
        pools = resolve_pools(settings, loop)
        prices = kept_with(shared.prices, gpus_of(pools)) if shared.prices is not None else None
        record = simulate_loop(
            settings,
            loop,
            reshaped(shared.trace, settings),
            trace_sha256=shared.trace_sha256,
            command=shared.command,
            pools=pools,
            prices=prices,
        )
        price = shared.prices.an_hour(gpus_of(pools)) if shared.prices is not None else None
    except ValueError as error:  # every error of bad input is one
        return Outcome(INVALID, str(error))
    if shared.records is not None:
        folder = shared.records / f"{number:04d}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it was noted as finished
        write_record(record, folder)
    metrics = sweep_summary(record, settings.slo_ttft, settings.slo_tpot, price)
    used = {**dataclasses.asdict(settings), "loop": loop}
    lost = refused(record)
    return Outcome(INCOMPLETE if lost else FINISHED, lost.sentence if lost else "", used, metrics)
