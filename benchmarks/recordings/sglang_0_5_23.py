"""SGLang 0.5.23's scheduler, with a worker that has no model and requests that come by step. See record_sglang.py."""

from __future__ import annotations

import array
import os
import types
from typing import Any

import torch
from sglang.srt.managers import schedule_policy, scheduler
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import SpawnRanks, get_schedule, publish
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang_steps import (
    InOrder,
    PoolsOnCpu,
    Steps,
    check_settings,
    note_losses,
    print_decision,
    print_state,
    sampling_of,
    server_args,
)

from workbench.parity.scenarios import CASES, Case, Request

NOT_RECORDED: tuple[str, ...] = ()


class Worker(PoolsOnCpu):
    """In place of TpModelWorker."""

    weight_load_time = 0.0

    def __init__(self, model_config: Any, case: Case, page: int) -> None:
        super().__init__(model_config, case, page)
        self.graph_time_usage: dict[str, float] = {}
        self.model_runner = types.SimpleNamespace(
            model_config=model_config,
            device="cpu",
            token_to_kv_pool=self.kv,
            token_to_kv_pool_allocator=self.allocator,
            req_to_token_pool=self.rows,
            memory_pool_config=object(),
            mtp_draft_device_pools=(),
            mtp_draft_mamba_pools=(),
            attn_backend=None,
            forward_stream=torch.cpu.Stream(),
            canary_manager=None,
            ngram_embedding_manager=types.SimpleNamespace(prepare_for_forward=lambda batch, chunked_req: batch),
            prefill_aware_swa=False,
            prewarm_sampling=lambda: None,
        )

    def init_attention_backends(self) -> None:
        pass

    def init_cuda_graphs(self) -> None:
        pass

    def get_worker_info(self) -> tuple[Any, ...]:
        return self.worker_info(get_schedule(), self.model_runner.forward_stream)

    def forward_batch_generation(self, batch: Any, pp_proxy_tensors: Any = None) -> GenerationBatchResult:
        sampled = self.forward(batch, self.rows.req_to_token)
        return GenerationBatchResult(next_token_ids=sampled, can_run_cuda_graph=False)


class Recorder(scheduler.Scheduler):
    """SGLang's scheduler with requests that come by step, and a log of what it decides."""

    def __init__(
        self, model: str, case: str, page: int, loop: str, seed: int, conservativeness: float | None, trace: bool
    ) -> None:
        self.sizes, self.steps, self.loop, self.trace = CASES[case], Steps(case, seed), loop, trace
        self.ignore_eos = conservativeness is None
        if trace:
            os.environ["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] = "python"  # The same tree, and one to walk through.
        args = ServerArgs(**server_args(model, case, page, loop, conservativeness))
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        super().__init__(args, PortArgs.init_new(args))
        check_settings(self, self.sizes, page, loop)
        assert not self.disable_radix_cache
        tree = type(self.tree_cache.tree_core).__name__
        assert trace or tree == "RustUnifiedTreeCore", "the wheel's tree in Rust does not load here"
        self._war_barrier_enabled = False  # As run_event_loop sets it for a CPU.
        note_losses(ScheduleBatch, self.steps)
        schedule_policy.set = InOrder

    def run(self) -> None:
        if self.loop == "normal":
            self.event_loop_normal()
        else:
            self.event_loop_overlap()

    def init_model_config(self) -> None:
        super().init_model_config()
        self.model_config.hf_eos_token_id = set()  # No token ends a request.

    def init_tp_model_worker(self) -> None:
        self.tp_worker = Worker(self.model_config, self.sizes, get_schedule().page_size)

    def init_ipc_channels(self, port_args: Any) -> None:
        nowhere = types.SimpleNamespace(send_output=lambda *_: None)
        self.ipc_channels = types.SimpleNamespace(
            recv_from_tokenizer=None,
            recv_from_rpc=None,
            send_to_tokenizer=nowhere,
            send_to_detokenizer=nowhere,
            send_metrics_from_scheduler=None,
        )
        self.load_snapshot_writer = self.recv_from_tokenizer = None

    def ingest_requests(self, stop_at_pause: bool = False) -> None:
        """In place of the socket: the arrivals and then the aborts of this step, or the end."""
        if self.is_fully_idle():
            if self.steps.all_came:
                self.gracefully_exit = True  # The loop still makes one pass, with nothing to do.
                return
            self.steps.wait()
        for request in self.steps.arrived():
            self.process_input_requests([self._tokenized(request)])
        for request_id in self.steps.aborted():
            self.process_input_requests([AbortReq(rid=request_id)])

    def _tokenized(self, request: Request) -> TokenizedGenerateReqInput:
        return TokenizedGenerateReqInput(
            rid=request.id,
            input_text=None,
            input_ids=array.array("q", request.prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling_of(request, self.ignore_eos),
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
            priority=request.priority if self.sizes.policy == "priority" else None,
        )

    def _create_generation_req(self, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        self.steps.made[req.rid] = req
        return req

    def get_next_batch_to_run(self, running_batch: Any, last_batch: Any) -> Any:
        if self.trace:
            ratio, root = self.new_token_ratio_tracker.current, self.tree_cache.tree_core.root_node
            print_state(self.steps, self, running_batch, last_batch, ratio, "kv.kv_allocated_len", root)
        plan = super().get_next_batch_to_run(running_batch, last_batch)
        self.steps.decided(plan.batch_to_run)
        if self.trace:
            print_decision(self.steps, plan.batch_to_run)
        return plan
