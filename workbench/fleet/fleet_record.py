"""``--record`` of a fleet: one record, made of what each instance has left."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.record.meta import FleetSpan, HardwareMeta, PoolMeta, RunMeta, Totals, TraceMeta
from reports.record.run_record import RecordError, RunRecord, read_record, write_record
from reports.record.schema import INSTANCES_PARTIAL, PAGE_FILE, TRACE_FILE
from workbench.fleet.merged import merge_traces, merged, names
from workbench.fleet.planned import FleetSettings, Planned
from workbench.recording.meta_parts import settings_used
from workbench.recording.of_pools import common, gpus_in_words, settings_of_all
from workbench.recording.run_folder import run_folder
from workbench.serving.fleet_part import FleetPart

FOUND = (
    *("backend", "max_queue", "record_content", "loop", "dtype", "kv_dtype", "kv_tokens", "max_context", "max_running"),
    *("tp", "pp", "gpu", "cost", "time_scale", "simulated_output_tokens"),
)
"""Settings of an instance as it used them in the end, and those of a server's own."""
OF_POOL = ("weights", "kv_budget", "cost_notes")
"""Keys of meta.json that pools may differ in."""


class FleetRecord:
    """The record of a fleet, of which each instance leaves a part."""

    def __init__(self, settings: FleetSettings, planned: Sequence[Planned]) -> None:
        assert settings.record is not None
        self._settings = settings
        self._out = settings.record
        self._parts = self._out / INSTANCES_PARTIAL
        self._part = FleetPart(time.monotonic(), secrets.token_bytes(32))
        content = settings.server.get("record_content", True)
        self.planned = [self._leaving(each, content) for each in planned]
        """The instances, told to leave their parts."""

    def _leaving(self, planned: Planned, content: bool) -> Planned:
        settings = dataclasses.replace(
            planned.settings, record=self._parts / planned.name, record_content=content, part=self._part
        )
        return dataclasses.replace(planned, settings=settings)

    def discard(self) -> None:
        """Remove what instances have begun to leave."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def close(self, spans: Mapping[str, tuple[float, float]], lost: Mapping[str, str]) -> int:
        """Make the record of what there is, and return the exit code. ``spans`` say from when to when instances served, on
        the monotonic clock, and ``lost`` which did not end with the others, and why."""
        try:
            self._close(spans, lost)
        except RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    def _close(self, spans: Mapping[str, tuple[float, float]], lost: Mapping[str, str]) -> None:
        parts = {
            number: read_record(folder)
            for number, each in enumerate(self.planned)
            if (folder := run_folder(each.settings.record or self._parts, each.settings.loop)).is_dir()
        }
        missing = [each.name for number, each in enumerate(self.planned) if number not in parts]
        if not any(len(part.requests["request_id"]) for part in parts.values()):
            self.discard()
            print(f"record: no request came, so {self._out} stays empty", file=sys.stderr)
            return
        for pool in {each.pool for each in self.planned}:
            if not any(self.planned[number].pool == pool for number in parts):
                raise RecordError(
                    f"record: no instance of pool {pool} has left its part, so there is no whole one; what there is stays "
                    f"in {self._parts}"
                )
        roles = {number: each.role for number, each in enumerate(self.planned)}
        named = names(parts, roles)
        record = merged({"name": self._settings.loop, "settings": {}}, parts, roles, named)
        trace = self._out / TRACE_FILE
        requests = self._merge_traces(record, named, roles, trace)
        notes = [
            *(f"{self.planned[number].name}: {note}" for number, part in parts.items() for note in _notes(part)),
            *(f"{name} was lost ({lost[name]}) and left no part: its requests are missing" for name in missing),
            *(f"{name} was lost: {why}" for name, why in lost.items() if name not in missing),
        ]
        record.meta = self._meta(parts, record, trace, requests, notes, self._spans(spans) if lost else None).to_json()
        write_record(record, run_folder(self._out, self._settings.loop))
        if len(record.iterations["iteration"]):
            self._write_page(record)
        self.discard()
        for line in notes[len(notes) - len(missing) :] if missing else ():
            print(f"warning: record: {line}", file=sys.stderr)
        folder = run_folder(self._out, self._settings.loop)
        print(f"record: {folder}, {requests} requests in {trace}", file=sys.stderr)

    def _merge_traces(
        self, record: RunRecord, named: Mapping[int, Mapping[str, str]], roles: Mapping[int, str], trace: Path
    ) -> int:
        arrivals_s = dict(zip(record.requests["request_id"], record.requests["arrival_s"].tolist(), strict=True))
        traces = {
            number: self._parts / self.planned[number].name / TRACE_FILE
            for number in named
            if roles[number] != "prefill"
        }
        try:
            return merge_traces(traces, named, arrivals_s, trace)
        except OSError as error:
            raise RecordError(f"{trace}: cannot be written: {error.strerror or error}") from error

    def _write_page(self, record: RunRecord) -> None:
        from reports.page.report_page import write_report

        title = f"Live traffic: {record.meta['model']} on {record.meta['hardware']['gpu']}"
        run = self._settings.run
        page = self._out / PAGE_FILE
        write_report({record.name: record}, page, title, self._settings.command, run.slo_ttft, run.slo_tpot)

    def _spans(self, spans: Mapping[str, tuple[float, float]]) -> list[FleetSpan]:
        epoch_s = self._part.epoch_s
        numbers = {each.name: number for number, each in enumerate(self.planned)}
        return [
            FleetSpan(numbers[name], "up", round(begin_s - epoch_s, 9), round(end_s - epoch_s, 9))
            for name, (begin_s, end_s) in spans.items()
            if not math.isnan(end_s)
        ]

    def _meta(
        self,
        parts: Mapping[int, RunRecord],
        record: RunRecord,
        trace: Path,
        requests: int,
        notes: Sequence[str],
        fleet: Sequence[FleetSpan] | None,
    ) -> RunMeta:
        settings, metas = self._settings, {number: part.meta for number, part in parts.items()}
        first = next(iter(metas.values()))
        pools = self._pools(metas)
        given = [dict(pool.given) for pool in settings.run.pools(settings.loop)]
        one_of_each = [metas[self._one_of(pool.name, metas)] for pool in pools]
        found = [{name: meta["settings"][name] for name in FOUND if name in meta["settings"]} for meta in one_of_each]
        same = common([{name: meta.get(name) for name in OF_POOL} for meta in one_of_each])
        gpus: dict[str, int] = {}
        for each, meta in zip(pools, one_of_each, strict=True):
            gpu = meta["hardware"]["gpu"]
            gpus[gpu] = gpus.get(gpu, 0) + each.count * each.gpus
        return RunMeta(
            kind="served",
            name=settings.loop,
            command=settings.command,
            trace=TraceMeta("live traffic", "workbench", hashlib.sha256(trace.read_bytes()).hexdigest(), notes),
            model=first["model"],
            hardware=HardwareMeta(gpus_in_words(gpus), sum(gpus.values()), first["hardware"]["simulated"]),
            settings=settings_used(settings.run, **settings_of_all(found, given)),
            versions=first["versions"],
            interrupted=any(meta["interrupted"] for meta in metas.values()),
            totals=Totals(
                requests=len(record.requests["request_id"]),
                ended=sum(m["totals"]["ended"] for n, m in metas.items() if self.planned[n].role != "prefill"),
                iterations=sum(meta["totals"]["iterations"] for meta in metas.values()),
                traced=requests,
                wall_s=max(meta["totals"]["wall_s"] for meta in metas.values()),
            ),
            pools=pools,
            fleet=fleet,
            recorded_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **same,
        )

    def _one_of(self, pool: str, metas: Mapping[int, Any]) -> int:
        return next(number for number in metas if self.planned[number].pool == pool)

    def _pools(self, metas: Mapping[int, Mapping[str, Any]]) -> list[PoolMeta]:
        found: list[PoolMeta] = []
        of = self._settings.run.pools(self._settings.loop)
        same = common([{name: metas[self._one_of(pool.name, metas)].get(name) for name in OF_POOL} for pool in of])
        first = 0
        for pool in of:
            meta = metas[self._one_of(pool.name, metas)]
            used, (tp, pp) = meta["settings"], pool.settings.layout(pool.loop)
            found.append(
                PoolMeta(
                    name=pool.name,
                    role=pool.role,
                    count=pool.count,
                    first_instance=first,
                    gpu=meta["hardware"]["gpu"],
                    gpus=meta["hardware"]["gpus"],
                    loop=pool.loop,
                    tp=tp,
                    pp=pp,
                    dtype=used["dtype"],
                    kv_tokens=used["kv_tokens"],
                    max_context=used["max_context"],
                    settings=dict(pool.given),
                    **{name: meta.get(name) for name in OF_POOL if name not in same},
                )
            )
            first += pool.count
        return found


def _notes(part: RunRecord) -> list[str]:
    return list(part.meta["trace"].get("notes") or ())
