"""Time vLLM's own scheduler on a CPU, a decode step at so many running requests.

    MODEL=VENV/model PYTHONPATH=.:VENV/engine VENV/bin/python benchmarks/recordings/time_vllm.py [RUNNING ...]

VENV is an environment that record.py made for a version of vLLM. Real are the scheduler (``AsyncScheduler``, one step in
flight), and what the engine does with a step's outputs: packing them for the front end. The worker is no part of it.

Prints, for each phase, the median CPU time of this thread over the steps of the middle half of a run, in microseconds, and
the straight line through them: so much a step and so much a running request.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import numpy as np  # noqa: E402
import record_vllm  # noqa: E402
import vllm  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.outputs import ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.serial_utils import MsgpackEncoder  # noqa: E402

from workbench.parity.scenarios import KV_BLOCK_TOKENS, Case  # noqa: E402

STEPS = 400
PROMPT = 64
NOTHING = {
    each.name: {} if each.name.endswith("_dict") else None
    for each in dataclasses.fields(ModelRunnerOutput)
    if each.name not in ("req_ids", "req_id_to_index", "sampled_token_ids")
    and each.default is each.default_factory is dataclasses.MISSING
}
"""What earlier versions have to be told that a step did not bring."""


def measure(running: int) -> dict[str, float]:
    """Median seconds of each phase of a decode step."""
    blocks = running * (PROMPT + STEPS + 20) // KV_BLOCK_TOKENS + 100
    scheduler = record_vllm.new_scheduler(Case(blocks, max(8192, running * PROMPT), running), True)
    hasher = get_request_block_hasher(KV_BLOCK_TOKENS, sha256)
    for n in range(running):
        scheduler.add_request(
            Request(
                **record_vllm.EOS_IN_REQUEST,
                request_id=f"cmpl-{n:032x}-0",
                prompt_token_ids=[2 + n % 400] * PROMPT,
                sampling_params=SamplingParams(max_tokens=STEPS, ignore_eos=True, output_kind=RequestOutputKind.DELTA),
                pooling_params=None,
                block_hasher=hasher,
            )
        )
    encoder = MsgpackEncoder()
    spent: dict[str, list[float]] = {"schedule": [], "process": [], "pack": []}
    flight: list[object] = []
    for _ in range(STEPS - 1):
        began = time.thread_time()
        output = scheduler.schedule()
        spent["schedule"].append(time.thread_time() - began)
        flight.append(output)
        if len(flight) < 2:
            continue
        due = flight.pop(0)
        ids = list(due.num_scheduled_tokens)  # type: ignore[attr-defined]
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={rid: row for row, rid in enumerate(ids)},
            sampled_token_ids=[[7] for _ in ids],
            **NOTHING,
        )
        began = time.thread_time()
        outputs = scheduler.update_from_output(due, result)  # type: ignore[arg-type]
        processed = time.thread_time()
        for each in outputs.values():
            encoder.encode(each)
        spent["process"].append(processed - began)
        spent["pack"].append(time.thread_time() - processed)
    middle = slice(STEPS // 4, 3 * STEPS // 4)
    return {phase: statistics.median(each[middle]) for phase, each in spent.items()}


def main() -> None:
    init_none_hash(sha256)
    counts = [int(word) for word in sys.argv[1:]] or [16, 64, 256]
    rows = [measure(count) for count in counts]
    print(f"vllm {vllm.__version__}, us of one core a decode step")
    for phase in rows[0]:
        times = [row[phase] * 1e6 for row in rows]
        line = np.polyfit(counts, times, 1) if len(counts) > 1 else (0.0, times[0])
        each = ", ".join(f"{time_us:.0f} at {count}" for time_us, count in zip(times, counts, strict=True))
        print(f"{phase:9} {each}: {line[1]:.0f} a step and {line[0]:.2f} a running request")


if __name__ == "__main__":
    main()
