"""Batches that wait for masks before they sample, and batches with KV copies: worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from backends.simulated.backend import SimulatedBackend
from backends.simulated.clock import Clock
from backends.simulated.copies import CopyEngine
from backends.simulated.host import FREE_HOST
from backends.simulated.lockstep import LockStepBackend, LockStepGroup
from backends.simulated.realtime import RealtimeBackend
from tests.constrained import constrain
from tests.world import Job, LinearCost, simulate
from traces import TraceRequest
from workbench.clients.messages import ClientRequest, Wording
from workbench.clients.unchecked import Unchecked
from workbench.phase_log import IterationRow
from workbench.scheduler.batch import KVCopy, ModelWorkerBatch, NewRequest, StepOutput
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import SamplingParams


class ConstrainedJob(Job):
    def message(self) -> Generate:
        return replace(super().message(), grammar=Unchecked())


LOOPS = ["normal", "overlap", "pipeline"]


@dataclass
class CostWithSampler(LinearCost):
    """10 ms a step, the last 2 of them the sampler's."""

    prefill_token_s: float = 0.0

    def sampling_s(self, batch: ModelWorkerBatch) -> float:
        return 0.002


def milliseconds(moments_s) -> list[float]:
    return [round(moment_s * 1e3, 6) for moment_s in moments_s]


# -- masks -------------------------------------------------------------------------------------------------------------


def jobs() -> list[Job]:
    return [Job(f"r{i}", list(range(100 * i, 100 * i + 20 + 9 * i)), 5 + i, arrival_s=0.012 * i) for i in range(4)]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("mixed", [False, True])
def test_every_masked_batch_is_sampled_once_in_time_and_with_the_last_results_known(monkeypatch, loop, mixed):
    settings = {"slots": 2 if loop == "pipeline" else 1, "chunk": 16}
    settings |= {"batching": "mixed", "max_batch_tokens": 16, "max_running": 8} if mixed else {}
    plain = simulate(jobs(), loop, **settings)
    launched: list[object] = []
    sampled: list[object] = []
    launch, sample, done = SimulatedBackend.launch, SimulatedBackend.sample, SimulatedBackend.done

    def checked_launch(self, batch):
        assert all(one in sampled for one in launched if one.batch.masked is not None), "launched before a sample"
        launched.append(launch(self, batch))
        return launched[-1]

    def checked_sample(self, forward, masks=None):
        assert forward is launched[-1] and forward not in sampled and forward.batch.masked is not None
        assert masks.dtype == np.int32 and masks.shape == (len(forward.batch.masked), 4)
        sampled.append(forward)
        sample(self, forward, masks)

    def checked_done(self, forward):
        assert forward.batch.masked is None or forward in sampled, "waited for before a sample"
        return done(self, forward)

    for name, method in (("launch", checked_launch), ("sample", checked_sample), ("done", checked_done)):
        monkeypatch.setattr(SimulatedBackend, name, method)
    found = constrain(monkeypatch, {"r1", "r3"}, vocab=100)
    run = simulate(jobs(), loop, **settings)
    assert sampled == [one for one in launched if one.batch.masked is not None]
    assert 0 < len(sampled) < len(launched), "both kinds of batch are wanted here"
    assert [(step, [step]) for step, _ in found.asked] == found.asked, "an older batch of the slot was not processed"
    assert run.outputs == plain.outputs, "a mask constrains nothing that a sampler by script knows"
    assert run.rows == plain.rows, "masks that are there in time, and a sampler that takes no time, change nothing"


@pytest.mark.parametrize(
    "loop, process_s, ends_ms",
    [
        # Alone: mask and launch at once, the CPU processes in between.
        ("normal", 0.005, [10, 25, 40, 55]),
        # The mask of a step comes with the result before it, 5 ms into a step whose logits take 8.
        ("overlap", 0.005, [10, 20, 30, 40]),
        # It comes 9 ms into it, and the sampler takes its 2 ms from there: 10 + 9 + 2, 21 + 9 + 2, ...
        ("overlap", 0.009, [10, 21, 32, 43]),
        # One slot: as the normal loop.
        ("pipeline", 0.005, [10, 25, 40, 55]),
    ],
)
def test_the_end_of_a_step_waits_for_its_mask(monkeypatch, loop, process_s, ends_ms):
    host = replace(FREE_HOST, process_s=process_s)
    constrain(monkeypatch, {"r"}, vocab=100)
    run = simulate([Job("r", [1, 2, 3], 4, eos=False)], loop, cost=CostWithSampler(), host=host)
    assert milliseconds(row.end_s for row in run.rows) == ends_ms


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_steps_that_wait_for_a_mask_are_not_skipped(monkeypatch, loop):
    alone = [Job("r", [1, 2, 3], 40)]
    plain = simulate(alone, loop, skip=True)
    assert plain.skipped_s
    found = constrain(monkeypatch, {"r"}, vocab=100)
    run = simulate(alone, loop, skip=True)
    assert not run.skipped_s and len(found.asked) == len(run.rows)
    assert run.rows == plain.rows and run.end_s == plain.end_s


def test_steps_before_and_after_those_of_a_constrained_request_are_skipped_to_the_same_end():
    jobs = [
        Job("r", [1, 2, 3], 300),
        ConstrainedJob("c", [4, 5], 5, arrival_s=1.0),
        ConstrainedJob("d", [6], 3, arrival_s=3.5),
    ]
    skipped, stepped = simulate(jobs, "overlap", skip=True), simulate(jobs, "overlap")
    assert skipped.skipped_s and skipped.rows == stepped.rows and skipped.end_s == stepped.end_s


# -- batches by hand ---------------------------------------------------------------------------------------------------


def decode(step: int, *copies: KVCopy, masked: bool = False) -> ModelWorkerBatch:
    """Two rows that decode; they start in batch 0."""
    params = SamplingParams(100)
    new = tuple(NewRequest(row, f"r{row}", 5, np.arange(5, dtype=np.int32), params) for row in range(2))
    return ModelWorkerBatch(
        *(step, "decode", np.arange(2), 0, np.array([6, 6]) + step, np.ones(2, np.int64), 0, 2, 0, 2, 12 + 2 * step),
        *(None, None, () if step else new, None, None, (), 0, 0, 2),
        kv_copies=copies,
        masked=np.array([1]) if masked else None,
    )


def copy(direction: str, pages: int) -> KVCopy:
    return KVCopy(direction, np.arange(pages, dtype=np.int32))  # type: ignore[arg-type]


class Zeros:
    def load(self, batch: ModelWorkerBatch) -> None:
        pass

    def sample(self, batch: ModelWorkerBatch) -> StepOutput:
        return StepOutput(np.zeros(len(batch.rows), np.int32))


def engine() -> CopyEngine:
    """A page in 1 ms from or to the host, in 2 ms from or to another instance."""
    return CopyEngine(page_bytes=1e6, host_bytes_s=1e9, peer_bytes_s=0.5e9)


BATCHES = [
    decode(0, copy("load", 3), copy("store", 2)),
    decode(1, copy("load", 4), copy("send", 1)),
    decode(2, copy("receive", 20), copy("store", 1)),
    decode(3),
    decode(4, copy("store", 12)),
    decode(5, copy("store", 1), copy("send", 1)),
]
"""Six steps of 10 ms, launched together at 0."""
STARTS_MS = [
    3,  # three pages are loaded
    13,  # its four pages are there at 7, but the GPU is busy
    40,  # twenty pages are received, on a link that nobody else uses
    50,
    60,
    70,
]
COPIED_MS = [
    15,  # two pages stored from its end at 13 on
    25,  # sent from 23 on
    51,
    None,
    82,  # stored from 70 on
    83,  # a page sent from 80 to 82, and one stored once the twelve before it are
]


def test_a_batch_starts_when_its_pages_are_there_and_gives_pages_away_when_it_ends():
    env = Clock()
    rows: list[IterationRow] = []
    backend = SimulatedBackend(env, LinearCost(), FREE_HOST, Zeros(), rows.append, copies=engine())  # type: ignore[arg-type]
    forwards = [backend.launch(batch) for batch in BATCHES]
    assert milliseconds(one.starts_s[0] for one in forwards) == STARTS_MS
    assert milliseconds(one.end_s for one in forwards) == [start + 10 for start in STARTS_MS]
    waits = [backend.copied(one) for one in forwards]
    assert milliseconds(waits) == [moment or 0 for moment in COPIED_MS], "without copies there is nothing to wait for"
    for one in forwards:
        backend.host("process", one.batch)
    assert milliseconds(row.start_s for row in rows) == STARTS_MS


def test_stages_wait_for_loaded_pages_alike_and_a_masked_batch_stores_after_its_sample():
    env = Clock()
    cost = CostWithSampler(link_s=0.001)
    backend = SimulatedBackend(env, cost, FREE_HOST, Zeros(), lambda row: None, stages=2, copies=engine())  # type: ignore[arg-type]
    forward = backend.launch(decode(0, copy("load", 3), copy("store", 2), masked=True))
    backend._debt_s = 0.030  # the CPU is at it until then
    backend.sample(forward)
    assert milliseconds(forward.starts_s) == [3, 14]
    assert milliseconds(forward.ends_s) == [13, 32], "the mask came 8 ms after the logits"
    assert milliseconds([backend.copied(forward)]) == [34]


def test_in_real_time_copies_and_masks_take_as_long():
    now = SimpleNamespace(s=0.0)
    backend = RealtimeBackend(CostWithSampler(), Zeros(), lambda row: None, lambda: now.s, copies=engine())  # type: ignore[arg-type]
    forwards = [backend.launch(batch) for batch in BATCHES]
    assert milliseconds(one.starts_s[0] for one in forwards) == STARTS_MS
    assert [(one.batch.kv_copies and round(one.copied_s * 1e3, 6)) or None for one in forwards] == COPIED_MS
    assert backend.copied(forwards[3]) is None
    masked = backend.launch(decode(6, masked=True))
    with pytest.raises(AssertionError, match="second phase"):
        masked.output()
    now.s = 0.0885  # half a millisecond after the logits
    backend.sample(masked)
    assert milliseconds([masked.end_s]) == [90.5]
    assert masked.output().tokens.tolist() == [0, 0]


@pytest.mark.parametrize("other_first", [True, False])
def test_ranks_in_lock_step_wait_for_the_one_that_samples_last(other_first):
    class Cost:
        def group_forward(self, batches):
            return 0.010

        def sampling_s(self, batch):
            return 0.002

    env, cost = Clock(), Cost()
    group = LockStepGroup(env, cost, 2)
    ranks = [
        LockStepBackend(env, group, cost, FREE_HOST, Zeros(), lambda row: None, rank, copies=engine())  # type: ignore[arg-type]
        for rank in range(2)
    ]
    if other_first:
        other = ranks[1].launch(decode(0))
    forward = ranks[0].launch(decode(0, copy("load", 3), copy("store", 1), masked=True))
    ranks[0]._debt_s = 0.020
    ranks[0].sample(forward)
    if not other_first:
        other = ranks[1].launch(decode(0))
    assert milliseconds([*forward.starts_s, *forward.ends_s]) == [3, 22]
    assert milliseconds([*other.starts_s, *other.ends_s]) == [3, 13]
    assert milliseconds([ranks[0].copied(forward)]) == [23]
    ranks[0]._debt_s = 0.0
    following = [rank.launch(decode(1)) for rank in ranks]
    assert [milliseconds(one.starts_s) for one in following] == [[22], [22]]


def test_copies_without_a_way_to_make_them_are_refused():
    backend = SimulatedBackend(Clock(), LinearCost(), FREE_HOST, Zeros(), lambda row: None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="kv_copies: batch 0 has copies, and this instance was given no way to make them"
    ):
        backend.launch(decode(0, copy("store", 1)))


@pytest.mark.parametrize(
    "loop, mask_s, ends_ms",
    [
        # Alone: the mask is made after the launch, while the GPU computes the 8 ms up to its logits ...
        ("normal", 0.003, [10, 20, 30, 40]),
        # ... and holds the sampler up where it takes longer.
        ("normal", 0.009, [11, 22, 33, 44]),
        # Behind the processing of the step before: 5 ms, and 4 for the mask, 1 more than there are.
        ("overlap", 0.009, [11, 22, 33, 44]),
    ],
)
def test_the_trace_says_who_is_constrained_and_its_masks_take_the_time_that_the_host_model_says(loop, mask_s, ends_ms):
    trace = TraceRequest("r", 0.0, 3, 4, constrained=True)
    assert isinstance(Wording(1000).message(ClientRequest(trace), 0.0).grammar, Unchecked)
    host = replace(FREE_HOST, mask_s=mask_s)
    run = simulate([ConstrainedJob("r", [1, 2, 3], 4, eos=False)], loop, cost=CostWithSampler(), host=host)
    assert milliseconds(row.end_s for row in run.rows) == ends_ms
    plain = simulate([Job("r", [1, 2, 3], 4, eos=False)], loop, cost=CostWithSampler(), host=host)
    assert milliseconds(row.end_s for row in plain.rows) == [10, 20, 30, 40], "no grammar, no cost"
