"""Record what vLLM's own scheduler decides, on CPU and without a model: ``record.py vllm VERSION OUT.json.gz``.

Runs in an environment that holds the Python files of vLLM's wheel, a torch, and light dependencies; record.py makes it.
$MODEL is a folder with the config.json of a small Llama.

Real: ``Scheduler`` and ``AsyncScheduler`` with their queues, block pool and prefix cache, and the configuration classes with
their defaults but for the sizes of the case. In place of the model: each row that computes up to the end of what its
request has writes ``token(id, position)``.

Mode sync gives each step's result before the next step is chosen; async chooses step n + 1 before the result of n is
given, as vLLM's engine does with asynchronous scheduling. A step is a call of ``schedule()``.
"""

from __future__ import annotations

import argparse
import inspect
import os
from typing import Any, NamedTuple

import torch
import vllm
from recording import add_arguments, check_written, chosen_cases, write
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from workbench.parity.scenarios import CASES, CONTEXT_TOKENS, KV_BLOCK_TOKENS, RETRACTED, Case, scenario, token

MODES = ("sync", "async")
EOS_IN_REQUEST = {"eos_token_id": None} if "eos_token_id" in inspect.signature(Request).parameters else {}
"""Earlier versions are told with each request what ends it, later ones with its sampling parameters. Nothing does here."""
MOST_STEPS = 20_000


class Launched(NamedTuple):
    """A step whose result is not given yet."""

    output: Any
    sampled: dict[str, list[int]]
    """What each of its rows writes."""


def scheduler_config(case: Case, asynchronous: bool) -> SchedulerConfig:
    """Give the case's sizes to vLLM, and nothing else.

    Not ``case.partial_prefills``: the versions that have max_num_partial_prefills refuse it in a server, and their
    scheduler does not look at it. Prompts in part are as many as fit; the threshold alone bounds each.
    """
    values: dict[str, Any] = {
        "max_num_seqs": case.running,
        "max_num_batched_tokens": case.budget,
        "max_model_len": CONTEXT_TOKENS,
        "is_encoder_decoder": False,
        "async_scheduling": asynchronous,
    }
    if case.policy == "priority":
        values["policy"] = "priority"
    if case.long_prefill:
        values["long_prefill_token_threshold"] = case.long_prefill
    return SchedulerConfig(**values)


def new_scheduler(case: Case, asynchronous: bool) -> Scheduler:
    model = ModelConfig(model=os.environ["MODEL"], skip_tokenizer_init=True, dtype="bfloat16", seed=0)
    cache = CacheConfig(block_size=KV_BLOCK_TOKENS, enable_prefix_caching=True)
    config = VllmConfig(
        model_config=model,
        scheduler_config=scheduler_config(case, asynchronous),
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
    )
    cache.num_gpu_blocks = case.blocks
    spec = FullAttentionSpec(block_size=KV_BLOCK_TOKENS, num_kv_heads=2, head_size=16, dtype=torch.bfloat16)
    kv = KVCacheConfig(case.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    kind = AsyncScheduler if asynchronous else Scheduler
    return kind(
        vllm_config=config,
        kv_cache_config=kv,
        structured_output_manager=StructuredOutputManager(config),
        block_size=KV_BLOCK_TOKENS,
        log_stats=False,
    )


def run(name: str, mode: str, seed: int) -> list[dict[str, Any]]:
    """Give the steps that had a batch. AssertionError when a request does not get just its tokens."""
    scheduler = new_scheduler(CASES[name], mode == "async")
    hasher = get_request_block_hasher(KV_BLOCK_TOKENS, sha256)
    todo = scenario(name, seed)
    aborts = [(request.abort_step, request.id) for request in todo if request.abort_step is not None]
    requests: dict[str, Request] = {}
    steps: list[dict[str, Any]] = []
    flight: list[Launched] = []
    step = 0
    while todo or scheduler.has_unfinished_requests() or flight:
        if not scheduler.has_unfinished_requests() and not flight:
            step = max(step, todo[0].step)
        while todo and todo[0].step <= step:
            coming = todo.pop(0)
            requests[coming.id] = Request(
                **EOS_IN_REQUEST,
                request_id=coming.id,
                prompt_token_ids=coming.prompt,
                sampling_params=SamplingParams(max_tokens=coming.output, ignore_eos=True),
                pooling_params=None,
                block_hasher=hasher,
                # vLLM serves the lowest number first. Ties go by arrival: each has a time of its own, as on a clock.
                priority=-coming.priority,
                arrival_time=float(len(requests)),
            )
            scheduler.add_request(requests[coming.id])
        due = {id for when, id in aborts if when <= step}
        aborts = [(when, id) for when, id in aborts if when > step]
        scheduler.finish_requests(sorted(due & scheduler.requests.keys()), RequestStatus.FINISHED_ABORTED)
        running = {request.request_id for request in scheduler.running}
        output = scheduler.schedule()
        if output.total_num_scheduled_tokens:
            entry = {id: int(tokens) for id, tokens in sorted(output.num_scheduled_tokens.items())}
            if lost := sorted(running - {request.request_id for request in scheduler.running}):
                entry[RETRACTED] = lost
            steps.append(entry)
            flight.append(Launched(output, {id: sampled(requests[id]) for id in output.num_scheduled_tokens}))
        if flight and (mode == "sync" or len(flight) > 1 or not output.total_num_scheduled_tokens):
            give_result(scheduler, flight.pop(0))
        step += 1
        assert step < MOST_STEPS, f"{name}/{mode}/{seed} does not end"
    tokens = {q.id: [token(q.id, position) for position in range(q.output)] for q in scenario(name, seed)}
    check_written(name, seed, {id: list(request.output_token_ids) for id, request in requests.items()}, tokens)
    return steps


def sampled(request: Request) -> list[int]:
    """Give what a row of the step just chosen writes: a token, if it computes up to the end of what its request has.

    ``num_computed_tokens`` has this step's in it already. ``num_output_placeholders`` are the tokens that steps in flight
    write, this one's with them if it writes one.
    """
    position = request.num_computed_tokens - request.num_prompt_tokens
    known = request.num_output_tokens + max(request.num_output_placeholders - 1, 0)
    return [token(request.request_id, position)] if position >= known else []


def give_result(scheduler: Scheduler, launched: Launched) -> None:
    ids = list(launched.sampled)
    scheduler.update_from_output(
        launched.output,
        ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={id: row for row, id in enumerate(ids)},
            sampled_token_ids=[launched.sampled[id] for id in ids],
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Record vLLM's decisions.")
    add_arguments(parser)
    asked = parser.parse_args()
    init_none_hash(sha256)
    record: dict[str, Any] = {"engine": f"vllm {vllm.__version__}", "recorder": os.path.basename(__file__)}
    for name in chosen_cases("vllm", asked.cases):
        for mode in MODES:
            for seed in asked.seeds:
                record[f"{name}/{mode}/{seed}"] = run(name, mode, seed)
    write(asked.out, record)


if __name__ == "__main__":
    main()
