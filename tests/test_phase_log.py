"""The one account of CPU phases and iterations that all backends keep."""

from __future__ import annotations

import typing
from dataclasses import dataclass

import numpy as np
import pytest

from reports.record.schema import ITERATION_COLUMNS, MODES, Kind
from workbench.backend import Phase
from workbench.phase_log import MODE_CODES, IterationRow, MeasuredPhases, PhaseLog
from workbench.scheduler.batch import ModelWorkerBatch, one_each


@dataclass
class Flight:
    """A batch of two stages that has been run."""

    batch: ModelWorkerBatch
    launch_s: float = 1.0
    starts_s: tuple[float, ...] = (2.0, 3.0)
    ends_s: tuple[float, ...] = (2.5, 3.5)
    cpu_s: tuple[float, float, float] = (0.0, 0.0, 0.0)


def batch(step: int) -> ModelWorkerBatch:
    lens = np.array([8, 9, 7])
    return ModelWorkerBatch(
        *(step, "mixed", np.arange(3), 0, lens, np.array([5, 1, 1]), 1, 3, 5, 2, 24),
        *(None, None, (), None, None, (), 30, 4, 6),
    )


def test_a_row_has_the_columns_of_the_record_and_a_mode_the_place_of_its_word_there() -> None:
    assert IterationRow._fields == tuple(ITERATION_COLUMNS)
    kinds = {int: {Kind.INT, Kind.MODE}, float: {Kind.TIME}}
    hints = typing.get_type_hints(IterationRow)
    assert all(ITERATION_COLUMNS[name] in kinds[hint] for name, hint in hints.items())
    assert {mode: MODES.index(mode) for mode in MODES} == MODE_CODES


def test_each_stage_of_a_batch_has_a_row_and_the_first_one_the_cpu_phases() -> None:
    rows: list[IterationRow] = []
    log: PhaseLog[Flight] = PhaseLog(rows.append, instance=7)
    log.receive_s += 0.1
    log.receive_s += 0.2  # a look at the inbox that brought no batch
    log.schedule_s += 0.3
    log.launched(Flight(batch(0)), 0.4)
    log.receive_s += 0.5
    log.launched(Flight(batch(1), 4.0, (5.0,), (6.0,)), 0.6)
    assert [one.batch.step for one in log.pending] == [0, 1] and not rows
    log.processed(log.pending.popleft(), 0.7)
    log.processed(log.pending.popleft(), 0.8)
    same = {
        "instance": 7,
        "mode": 2,
        "requests": 3,
        "prefill_tokens": 5,
        "decode_tokens": 2,
        "context_tokens": 24,
        "kv_used_tokens": 30,
        "waiting": 4,
        "running": 6,
    }
    none = {"receive_s": 0.0, "schedule_s": 0.0, "launch_host_s": 0.0, "process_s": 0.0}
    spent = {"receive_s": 0.1 + 0.2, "schedule_s": 0.3, "launch_host_s": 0.4, "process_s": 0.7}
    first = {"iteration": 0, "launch_s": 1.0, **same}
    assert [row._asdict() for row in rows] == [
        {"stage": 0, "start_s": 2.0, "end_s": 2.5, **first, **spent},
        {"stage": 1, "start_s": 3.0, "end_s": 3.5, **first, **none},
        {
            **{"iteration": 1, "stage": 0, "launch_s": 4.0, "start_s": 5.0, "end_s": 6.0, **same},
            **{"receive_s": 0.5, "schedule_s": 0.0, "launch_host_s": 0.6, "process_s": 0.8},
        },
    ]
    assert all(type(row) is IterationRow for row in rows)


def test_a_measured_phase_takes_the_time_since_the_note_or_the_wait_before_it() -> None:
    now_s = 10.0
    rows: list[IterationRow] = []
    log: MeasuredPhases[Flight] = MeasuredPhases(rows.append, clock=lambda: now_s)
    times: list[tuple[Phase | None, float]] = [
        ("receive", 11.0),  # took 1
        ("schedule", 13.0),
        ("launch", 16.0),
        (None, 50.0),  # a wait
        ("process", 54.0),
    ]
    log.launching = Flight(batch(0))
    for phase, now_s in times:  # noqa: B007  (the clock reads it)
        if phase is None:
            log.rested()
        else:
            log.note(phase)
    row = rows[0]
    assert (row.receive_s, row.schedule_s, row.launch_host_s, row.process_s) == (1.0, 2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="unknown CPU phase 'think'"):
        log.note("think")  # type: ignore[arg-type]


def test_plain_decoding_computes_one_token_a_row_in_an_array_that_nobody_can_change() -> None:
    ones = one_each(3)
    assert ones.tolist() == [1, 1, 1] and one_each(3) is ones
    with pytest.raises(ValueError, match="read-only"):
        ones[0] = 2
