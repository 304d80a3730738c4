"""SGLang 0.5.10.post1's scheduler, with a worker that has no model and requests that come by step. See record_sglang.py.

Beside what sglang_0_5_23.py replaces: the groups of processes, of which there is one; the two kernels that deal out pages on
a GPU; and the prefix cache's clock, which counts looks at it where SGLang takes nanoseconds: the order is the same.

This version loses requests under priorities: preempt_to_schedule takes the victims out, and where the one that they made
room for is not admitted after all, _get_new_batch_prefill_raw returns without putting them back in the queue.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers import schedule_policy, scheduler
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache import radix_cache
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.server_args import PortArgs, ServerArgs, set_global_server_args_for_scheduler
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

NOT_RECORDED = ("priority", "priority-rows")
"""Cases in which requests never end."""


class Over(Exception):
    """All requests have ended. The loops have no other end."""


class PagesOnCpu(PagedTokenToKVPoolAllocator):
    """The allocator of pages, with its two kernels written out: the rest of a row's last page first, then free pages."""

    def alloc_extend(
        self,
        prefix_lens: Any,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: Any,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
    ) -> torch.Tensor | None:
        return self._deal(prefix_lens_cpu.tolist(), seq_lens_cpu.tolist(), last_loc.tolist())

    def alloc_decode(self, seq_lens: Any, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor) -> torch.Tensor | None:
        lengths = seq_lens_cpu.tolist()
        return self._deal([length - 1 for length in lengths], lengths, last_loc.tolist())

    def _deal(self, held: list[int], wanted: list[int], last: list[int]) -> torch.Tensor | None:
        pages = iter(self.free_pages.tolist())
        slots: list[int] = []
        used = 0
        for before, after, slot in zip(held, wanted, last, strict=True):
            for position in range(before, after):
                if position % self.page_size == 0:
                    page = next(pages, None)
                    if page is None:
                        return None
                    slot, used = page * self.page_size, used + 1
                else:
                    slot += 1
                slots.append(slot)
        self.free_pages = self.free_pages[used:]
        return torch.tensor(slots, dtype=torch.int64)


class Worker(PoolsOnCpu):
    """In place of TpModelWorker."""

    def __init__(self, args: ServerArgs, model_config: Any, case: Case) -> None:
        super().__init__(model_config, case, args.page_size, PagesOnCpu)
        self.args = args
        self.model_runner = types.SimpleNamespace(
            hybrid_gdn_config=None, mamba2_config=None, model_config=model_config, forward_stream=torch.cpu.Stream()
        )

    def get_worker_info(self) -> tuple[Any, ...]:
        return self.worker_info(self.args, self.model_runner.forward_stream)

    def forward_batch_generation(self, batch: Any, pp_proxy_tensors: Any = None) -> GenerationBatchResult:
        sampled = self.forward(batch, self.rows.req_to_token)
        nothing = LogitsProcessorOutput(next_token_logits=None)
        return GenerationBatchResult(logits_output=nothing, next_token_ids=sampled, can_run_cuda_graph=False)


class Recorder(scheduler.Scheduler):
    """SGLang's scheduler with requests that come by step, and a log of what it decides."""

    def __init__(
        self, model: str, case: str, page: int, loop: str, seed: int, conservativeness: float | None, trace: bool
    ) -> None:
        self.sizes, self.steps, self.loop, self.trace = CASES[case], Steps(case, seed), loop, trace
        self.ignore_eos, self.ending = conservativeness is None, False
        looks = itertools.count(1)
        radix_cache.time = types.SimpleNamespace(
            monotonic=lambda: next(looks), perf_counter=radix_cache.time.perf_counter
        )
        for name in (
            "get_tp_group",
            "get_attention_tp_group",
            "get_attention_cp_group",
            "get_pp_group",
            "get_world_group",
        ):
            setattr(
                scheduler,
                name,
                lambda: types.SimpleNamespace(cpu_group=None, world_size=1, is_first_rank=True, first_rank=0),
            )
        args = ServerArgs(**server_args(model, case, page, loop, conservativeness))
        set_global_server_args_for_scheduler(args)
        super().__init__(args, PortArgs.init_new(args), 0, 0, 0, 0, 0, 0, None)
        check_settings(self, self.sizes, page, loop)
        assert type(self.tree_cache) is radix_cache.RadixCache
        note_losses(ScheduleBatch, self.steps)
        schedule_policy.set = InOrder

    def run(self) -> None:
        self.schedule_stream = self.device_module.Stream(priority=0)
        self.schedule_stream.synchronize = lambda: None  # As run_event_loop does for a CPU.
        try:
            if self.loop == "normal":
                self.event_loop_normal()
            else:
                self.event_loop_overlap()
        except Over:
            pass

    def init_model_config(self) -> None:
        super().init_model_config()
        self.model_config.hf_eos_token_id = set()  # No token ends a request.

    def init_tp_model_worker(self) -> None:
        self.tp_worker = Worker(self.server_args, self.model_config, self.sizes)

    def init_ipc_channels(self, port_args: Any) -> None:
        nowhere = types.SimpleNamespace(send_output=lambda *_: None)
        self.idle_sleeper = self.recv_from_tokenizer = self.recv_from_rpc = None
        self.send_to_tokenizer = self.send_to_detokenizer = nowhere

    def recv_requests(self) -> list[Any]:
        """In place of the socket: the arrivals and then the aborts of this step, or the end."""
        if self.is_fully_idle():
            if self.ending:
                raise Over
            if self.steps.all_came:
                self.ending = True  # One more pass, with nothing to do.
                return []
            self.steps.wait()
        came = [self._tokenized(request) for request in self.steps.arrived()]
        return came + [AbortReq(rid=request_id) for request_id in self.steps.aborted()]

    def _tokenized(self, request: Request) -> TokenizedGenerateReqInput:
        return TokenizedGenerateReqInput(
            rid=request.id,
            input_text="",
            input_ids=list(request.prompt),
            mm_inputs=None,
            sampling_params=sampling_of(request, self.ignore_eos),
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=[],
            stream=False,
            priority=request.priority if self.sizes.policy == "priority" else None,
        )

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        self.steps.made.setdefault(req.rid, req)
        super()._add_request_to_queue(req, is_retracted)

    def get_next_batch_to_run(self) -> Any:
        if self.trace:
            root = self.tree_cache.root_node
            running, last = self.running_batch, self.last_batch
            print_state(self.steps, self, running, last, self.new_token_ratio, "kv_allocated_len", root)
        batch = super().get_next_batch_to_run()
        self.steps.decided(batch)
        if self.trace:
            print_decision(self.steps, batch)
        return batch
