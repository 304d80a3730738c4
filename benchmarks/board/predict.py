"""The run that predicts a published row: a closed loop at its concurrency, measured once it has settled."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

import workbench
from backends.simulated.catalogue.gpu_specs import gpu_names, load_gpu, same_gpu
from backends.simulated.cost.cost_request import CostRequest
from backends.simulated.cost.models.operator_tables import OperatorTables
from backends.simulated.cost.tables import measured_operators
from backends.simulated.cost.tables.measured_operators import ALWAYS, BY_ROOFLINE
from backends.simulated.kv_memory import ModelDoesNotFit
from benchmarks.board.launched import ROUNDS as ALL_ROUNDS
from benchmarks.board.launched import distinct_prompts, first_chunk_tokens, is_inferencemax, steps_unseen, told
from benchmarks.board.silicon import LARGEST_NODE, Row, Side, numbers_of
from reports.record.run_record import RunRecord
from traces import TraceRequest
from traces.requests.content import unique
from workbench.settings.engines import engine_names

COSTS = ("roofline", "measured")
"""Cost models that are scored."""
ROUNDS, ROUNDS_IN_LOCK_STEP = 5, 3
"""Requests of a run, in multiples of the concurrency; fewer of ranks that step together, each step of which is taken. The
first round comes all at once and the last one runs empty: each counts as the one of ``launched.ROUNDS`` that it is, where
clients counted them, and else they are left out."""
MOST_MEMORY = 0.96
"""Share of the memory for rows whose models do not fit what the preset takes."""
FRONT_ENDS = ("vllm", "sglang")
"""Engines whose front end is modelled: rows are what clients saw."""
WITHOUT_PRESET = {"batching": "mixed", "loop": "overlap", "page_size": 16}
"""Settings for an engine that has no preset."""
CATALOGUE = {
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-ai/DeepSeek-R1",
    "nvidia/DeepSeek-V3.1-NVFP4": "deepseek-ai/DeepSeek-V3",
    "nvidia/Qwen3-32B-NVFP4": "Qwen/Qwen3-32B",
    "zhipuai/GLM-5": "zai-org/GLM-5",
}
"""Models of the catalogue by other names of rows: the precision stands in a column of its own."""
DTYPES = {"fp8": "fp8", "fp8_block": "fp8", "int4_wo": "int4", "nvfp4": "nvfp4", "": "auto"}
"""``--dtype`` for a row's precision of products."""
AS_SAVED = {
    "deepseek-ai/DeepSeek-R1": "fp8",
    "deepseek-ai/DeepSeek-V3": "fp8",
    "MiniMaxAI/MiniMax-M2.5": "fp8",
    "Qwen/Qwen3-235B-A22B-FP8": "fp8",
}
"""Checkpoints that are in this precision as they are, with what that leaves out and the scales of its blocks."""


@dataclass(frozen=True)
class Predicted:
    """One row and what a simulation says of it. Seconds."""

    row: Row
    ttft_s: float
    tpot_s: float
    lacking: tuple[str, ...] = ()
    """Operators that no table was read for, where the cost is ``measured``; those that never have one aside."""

    @property
    def ttft_error(self) -> float:
        """Signed, as a share of the measurement."""
        return self.ttft_s / self.row.ttft_s - 1

    @property
    def tpot_error(self) -> float:
        """Signed, as a share of the measurement."""
        return self.tpot_s / self.row.tpot_s - 1


def settings_of(row: Row) -> dict[str, Any]:
    """Settings of ``workbench.simulate`` for a row. Raises ValueError with the reason for one that none stand for."""
    gpu = next((name for name in gpu_names() if same_gpu(name, row.system)), None)
    if gpu is None:
        raise ValueError(f"GPU {row.system} is not in the catalogue")
    if row.mode == "agg" and row.tp > LARGEST_NODE and row.dp == row.ep == 1:
        raise ValueError("GPUs of all pools of a disaggregated run stand as one tensor-parallel group")
    dtype = DTYPES.get(row.precision)
    if dtype is None:
        raise ValueError(f"precision {row.precision}")
    # gpt-oss has one checkpoint, in MXFP4, whatever the column calls its products.
    if "gpt-oss" in row.model or AS_SAVED.get(row.model) == dtype:
        dtype = "auto"
    preset = nearest_preset(row.engine, row.version if numbers_of(row.version) else row.taken_for)
    return {
        **({"engine": preset} if preset else WITHOUT_PRESET),
        **(_pools(row.prefill, row.decode, gpu, row.concurrency) if row.prefill and row.decode else _layout(row)),
        **told(row),
        "model": catalogue_name(row.model),
        "gpu": gpu,
        "dtype": dtype,
        "concurrency": row.concurrency,
        "ignore_eos": True,
        "max_context": row.input_tokens + row.output_tokens + 1,
    }


def _layout(row: Row) -> dict[str, Any]:
    """Settings of instances that both prefill and decode."""
    return {
        "tp": row.tp,
        "dp": row.dp,
        **_experts(row.tp, row.dp, row.ep),
        **({"front_end": row.engine} if row.engine in FRONT_ENDS else {}),
        "max_running": max(row.concurrency // row.dp, 1),
    }


def _pools(prefill: Side, decode: Side, gpu: str, concurrency: int) -> dict[str, Any]:
    """Settings of a disaggregated row: workers whose ranks step together are a pool each, others are one pool together.

    KV goes over what joins the nodes of the machine: NVLink in a rack, else an adapter for each GPU. What an instance would
    have admitted is not known, so that each may have all requests, as far as they fit.
    """
    pools: list[dict[str, Any]] = []
    for role, side in (("prefill", prefill), ("decode", decode)):
        shared = side.dp > 1
        one = {
            "role": role,
            "count": side.dp if shared else side.instances,
            "tp": side.tp,
            **({"pp": side.pp} if side.pp > 1 else {}),
            **_experts(side.tp, side.dp, side.ep),
        }
        pools += [one] * (side.instances if shared else 1)
    return {
        "pool": pools,
        "kv_link": f"{load_gpu(gpu).node_link_bandwidth / 1e9:g}GB/s",
        "max_running": concurrency,
    }


def _experts(tp: int, dp: int, ep: int) -> dict[str, int]:
    """Where the experts are. Raises ValueError for ranks of attention that share experts which none of them has whole."""
    if ep > 1:
        return {"ep": tp * dp}
    if dp > 1:
        raise ValueError("data parallel attention without expert parallelism")
    return {}


def catalogue_name(model: str) -> str:
    """A row's model as the catalogue knows it, where it does."""
    return CATALOGUE.get(model, model)


def predict(row: Row, **more: Any) -> Predicted:
    """Simulate one row, under these settings beside its own. Raises ValueError with the reason for one that cannot be."""
    draw = random.Random(row.id)
    sides = [side for side in (row, row.prefill, row.decode) if side is not None]
    rounds = ROUNDS if all(side.dp == 1 for side in sides) else ROUNDS_IN_LOCK_STEP
    if row.generated:
        rounds = ALL_ROUNDS  # of one length: who comes together parts from round to round
    count = rounds * row.concurrency
    inputs, outputs = _lengths(draw, row.input_tokens, row, count), _lengths(draw, row.output_tokens, row, count)
    prompts = distinct_prompts(row) or count
    requests = [
        TraceRequest(f"r{number}", 0.0, inputs[number], outputs[number], content=unique(f"r{number % prompts}"))
        for number in range(count)
    ]
    settings = {**settings_of(row), **more}
    with warnings.catch_warnings(), _tables_read_once():
        warnings.simplefilter("ignore")
        try:
            record = workbench.simulate(requests, **settings)
        except ModelDoesNotFit as problem:
            # It fitted whoever measured it: with more of the memory, or with fewer at a time, as engines do by themselves.
            room = re.search(r"--max-running (\d+) fits", str(problem))
            settings |= {"max_running": int(room[1])} if room else {"mem_fraction": MOST_MEMORY}
            record = workbench.simulate(requests, **settings)
    return Predicted(row, *_seen(row, record, rounds), _lacking(record.meta.get("cost_notes", ())))


def _seen(row: Row, record: RunRecord, rounds: int) -> tuple[float, float]:
    """Mean TTFT and TPOT as the row's clients count them, in seconds."""
    frame = record.requests
    order = np.argsort(np.asarray(frame["arrival_s"]), kind="stable")
    counted, weights = order, np.ones(len(order))
    if is_inferencemax(row) or row.generated:
        weights[row.concurrency : -row.concurrency] = (ALL_ROUNDS - 2) / (rounds - 2)
    else:
        counted = order[row.concurrency : -row.concurrency]
        weights = weights[: len(counted)]
    arrival, first, last = (np.asarray(frame[name])[counted] for name in ("arrival_s", "first_token_s", "finish_s"))
    between = np.maximum(np.asarray(frame["output_tokens"])[counted] - 1, 1)
    step = (last - first) / between
    seen = np.minimum(first + first_chunk_tokens(row) * step, last)
    ttft, tpot = seen - arrival + steps_unseen(row) * step, (last - seen) / between
    return float(np.average(ttft, weights=weights)), float(np.average(tpot, weights=weights))


@contextmanager
def _tables_read_once() -> Iterator[None]:
    """Let neighbouring rows, which are of the same model on the same GPU, share what is read of tables."""
    usual = measured_operators.read_measured

    def shared(want: CostRequest) -> OperatorTables:
        return _read(replace(want, capture_sizes=(), mixed_capture_sizes=(), step_s=0.0, request_s=0.0))

    measured_operators.read_measured = shared  # type: ignore[assignment]
    try:
        yield
    finally:
        measured_operators.read_measured = usual


_read = lru_cache(maxsize=4)(measured_operators.read_measured)


def _lacking(notes: Iterable[str]) -> tuple[str, ...]:
    """Operators that a note of ``--cost measured`` names as the roofline's, but for those that always are."""
    named = (note.removeprefix(BY_ROOFLINE).split("; ") for note in notes if note.startswith(BY_ROOFLINE))
    return tuple(what for what in next(named, []) if what not in ALWAYS)


def _lengths(draw: random.Random, most: int, row: Row, count: int) -> list[int]:
    return [draw.randint(max(round(most * row.shortest), 1), most) for _ in range(count)]


def nearest_preset(engine: str, version: str) -> str | None:
    """The preset of an engine whose version is the newest that is not newer, else the oldest; None without one."""
    own = sorted((numbers_of(name), name) for name in engine_names() if re.match(rf"{engine}-\d", name))
    if not own:
        return None
    wanted = numbers_of(version) or own[-1][0]  # unknown: the newest
    older = [name for numbers, name in own if numbers <= wanted]
    return older[-1] if older else own[0][1]
