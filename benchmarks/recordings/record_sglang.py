"""Record what SGLang's own scheduler decides, on CPU and without a model.

    record_sglang.py OUT.json.gz --seeds 0,1 [--cases tight,mixed] [--conservativeness 0.05]
    record_sglang.py --trace tight/16/overlap/0 [--conservativeness 0.05]

Run it in an environment of its own (record.py makes one) with the repository's root and the files of a wheel of sglang on
PYTHONPATH. Written for 0.5.23.

What is SGLang's: the whole Scheduler with its event loops, the policy and the adder of prompts, batches and requests,
retraction and preemption, the prefix cache, the pools and allocators of rows and KV slots, the processing of results,
and the leak checks of its idle pass. All settings are a server's defaults but for the sizes of the case, the page size,
the loop and what the case asks for (server_args below).

What is not: the worker with the model (Worker: it samples scenarios.token), sockets and tokenizer, and when requests and
aborts come: by step, not by time. A step is a call of get_next_batch_to_run; where there is nothing to do the step jumps to
the next arrival. A forward is done when it is launched; the overlap loop takes its result one step later all the same.

A recording holds for every "case/page/loop/seed" the steps with a batch: {request id: tokens computed for it, the extend
length of a prompt and 1 of a decode}, and under "!" the ids that lost their KV since the batch before, by retraction or
preemption.

Requests say ignore_eos, and their whole output is then counted on when others are admitted: nothing is ever retracted. With
--conservativeness they do not say so (and stop by length all the same), and --schedule-conservativeness has this value.

Checked in every run: before each forward the KV slots of every row hold exactly its tokens; each request writes exactly its
output, an aborted one the start of it; in idle passes and at the end no slot and no row is lost.
"""

from __future__ import annotations

import argparse
import array
import gzip
import importlib.machinery
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")
if "--trace" in sys.argv:
    os.environ["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] = "python"  # The same tree, and one that can be walked.
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers.utils.import_utils as transformers_imports  # noqa: E402

from workbench.parity.scenarios import CASES, KV_BLOCK_TOKENS, scenario, token  # noqa: E402


class Unused:
    """Stands in for packages that SGLang imports and scheduling never calls."""

    packages = ("torchvision",)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock()

        module.__getattr__ = attribute


transformers_imports.is_torchvision_available()  # It remembers that there is none, before the stand-in is there.
sys.meta_path.append(Unused())  # type: ignore[arg-type]

import sglang  # noqa: E402
from sglang.srt.managers import schedule_policy, scheduler  # noqa: E402
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput  # noqa: E402
from sglang.srt.managers.schedule_batch import ScheduleBatch  # noqa: E402
from sglang.srt.managers.utils import GenerationBatchResult  # noqa: E402
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, get_schedule, publish  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import PortArgs, ServerArgs  # noqa: E402

CONTEXT = 8192
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 512,
    "max_position_embeddings": CONTEXT,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def server_args(model: str, case: str, page: int, loop: str, conservativeness: float | None) -> ServerArgs:
    """Everything that is not a server's default."""
    sizes = CASES[case]
    asked: dict[str, Any] = {}
    if sizes.policy == "priority":
        # By default one goes before another only from 11 priorities on; here from 1 on.
        asked = {"enable_priority_scheduling": True, "priority_scheduling_preemption_threshold": 0}
    elif sizes.policy == "lpm":
        asked = {"schedule_policy": "lpm"}
    if sizes.mixed:
        asked["enable_mixed_chunk"] = True
    return ServerArgs(
        model_path=model,
        device="cpu",
        attention_backend="torch_native",
        skip_tokenizer_init=True,
        context_length=CONTEXT - 1,
        page_size=page,
        chunked_prefill_size=sizes.budget,
        max_running_requests=sizes.running,
        disable_overlap_schedule=loop == "normal",
        schedule_conservativeness=1.0 if conservativeness is None else conservativeness,
        **asked,
    )


class Worker:
    """In place of TpModelWorker. It holds only what the scheduler asks of it: anything else is an AttributeError."""

    is_hybrid_swa = False
    weight_load_time = 0.0
    graph_time_usage: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, model_config: Any, kv_tokens: int, page: int, running: int) -> None:
        kv = MHATokenToKVPool(
            kv_tokens,
            page,
            torch.float32,
            head_num=1,
            head_dim=2,
            layer_num=1,
            device="cpu",
            enable_memory_saver=False,
        )
        same: dict[str, Any] = {"dtype": kv.dtype, "device": "cpu", "kvcache": kv, "need_sort": False}
        self.allocator: Any = (
            TokenToKVPoolAllocator(kv_tokens, **same)
            if page == 1
            else PagedTokenToKVPoolAllocator(kv_tokens, page, **same)
        )
        self.rows = ReqToTokenPool(running, CONTEXT, "cpu", enable_memory_saver=False)
        self.model_config = model_config
        self.slots = torch.zeros(kv_tokens + page, dtype=torch.int64)
        """The token whose KV each slot holds."""
        self.sequences: dict[str, torch.Tensor] = {}
        """By request id: its prompt and all that it may write."""
        self.model_runner = types.SimpleNamespace(
            model_config=model_config,
            device="cpu",
            token_to_kv_pool=kv,
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

    def get_memory_pool(self) -> tuple[Any, Any]:
        return self.rows, self.allocator

    def init_attention_backends(self) -> None:
        pass

    def init_cuda_graphs(self) -> None:
        pass

    def get_pad_input_ids_func(self) -> None:
        return None

    def get_worker_info(self) -> tuple[Any, ...]:
        kv_tokens, schedule = self.allocator.size, get_schedule()
        longest = min(CONTEXT - 1, kv_tokens) - 1
        return (
            kv_tokens,
            schedule.max_prefill_tokens,
            schedule.max_running_requests,
            schedule.max_queued_requests,
            longest,
            longest - 5,
            0,
            "cpu",
            self.model_runner.forward_stream,
            self.rows.size,
            CONTEXT,
            kv_tokens,
        )

    def forward_batch_generation(self, batch: Any, pp_proxy_tensors: Any = None) -> GenerationBatchResult:
        self.slots[batch.out_cache_loc] = batch.input_ids
        sampled = []
        for req, row, length in zip(batch.reqs, batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True):
            sequence = self._sequence(req)
            held = self.slots[self.rows.req_to_token[row, :length].long()]
            assert torch.equal(held, sequence[:length]), (req.rid, "holds another token's KV")
            sampled.append(sequence[length])
        return GenerationBatchResult(next_token_ids=torch.tensor(sampled), can_run_cuda_graph=False)

    def _sequence(self, req: Any) -> torch.Tensor:
        if req.rid not in self.sequences:
            written = [token(req.rid, position) for position in range(req.sampling_params.max_new_tokens + 1)]
            self.sequences[req.rid] = torch.tensor(list(req.origin_input_ids) + written)
        return self.sequences[req.rid]


class Recorder(scheduler.Scheduler):  # type: ignore[misc]
    """SGLang's scheduler with requests that come by step, and a log of what it decides."""

    def __init__(self, model: str, case: str, page: int, loop: str, seed: int, conservativeness: float | None) -> None:
        self.sizes = CASES[case]
        self.ignore_eos = conservativeness is None
        self.requests = scenario(case, seed)
        self.arrivals = list(self.requests)
        self.aborts = sorted(
            (request.abort_step, request.id) for request in self.requests if request.abort_step is not None
        )
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.lost: list[str] = []
        """Requests that lost their KV since the last batch."""
        self.made: dict[str, Any] = {}
        self.trace = False
        args = server_args(model, case, page, loop, conservativeness)
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        super().__init__(args, PortArgs.init_new(args))
        assert (self.enable_overlap, self.page_size) == (loop == "overlap", page)
        assert (self.chunked_prefill_size, self.max_prefill_tokens) == (self.sizes.budget, 16384)
        assert self.max_running_requests == self.sizes.running
        assert self.schedule_policy == ("lpm" if self.sizes.policy == "lpm" else "fcfs")
        assert self.enable_priority_preemption == (self.sizes.policy == "priority")
        assert self.is_mixed_chunk == self.sizes.mixed
        assert not self.disable_radix_cache
        core = type(self.tree_cache.tree_core).__name__
        assert core == "RustUnifiedTreeCore" or "--trace" in sys.argv, "the wheel's tree in Rust does not load here"
        self._war_barrier_enabled = False  # As run_event_loop sets it for a CPU.
        self._note_what_loses_its_kv()

    def init_model_config(self) -> None:
        super().init_model_config()
        self.model_config.hf_eos_token_id = set()  # No token ends a request.

    def init_tp_model_worker(self) -> None:
        kv_tokens = self.sizes.blocks * KV_BLOCK_TOKENS
        self.tp_worker = Worker(self.model_config, kv_tokens, get_schedule().page_size, self.sizes.running)

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

    def _note_what_loses_its_kv(self) -> None:
        """Both retraction and preemption give a running request's KV back by release_req.

        Preemption puts the requests that it chose into a set of objects and hands them back to the queue in the set's order,
        which is that of their addresses. Here it is the order in which they were chosen: a recording can be repeated.
        """
        lost, release = self.lost, ScheduleBatch.release_req

        def release_req(batch: Any, index: int, *args: Any, **kwargs: Any) -> Any:
            lost.append(batch.reqs[index].rid)
            return release(batch, index, *args, **kwargs)

        ScheduleBatch.release_req = release_req
        schedule_policy.set = lambda chosen=(): dict.fromkeys(chosen)

    def ingest_requests(self, stop_at_pause: bool = False) -> None:
        """In place of the socket: the arrivals and then the aborts of this step, or the end."""
        if self.is_fully_idle():
            if not self.arrivals:
                self.gracefully_exit = True  # The loop still makes one pass, with nothing to do.
                return
            self.step = max(self.step, self.arrivals[0].step)
        while self.arrivals and self.arrivals[0].step <= self.step:
            self.process_input_requests([self._arrival(self.arrivals.pop(0))])
        while self.aborts and self.aborts[0][0] <= self.step:
            self.process_input_requests([AbortReq(rid=self.aborts.pop(0)[1])])

    def _arrival(self, request: Any) -> TokenizedGenerateReqInput:
        params = SamplingParams(max_new_tokens=request.output, ignore_eos=self.ignore_eos, temperature=0)
        params.normalize(None)
        return TokenizedGenerateReqInput(
            rid=request.id,
            input_text=None,
            input_ids=array.array("q", request.prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
            priority=request.priority if self.sizes.policy == "priority" else None,
        )

    def _create_generation_req(self, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        self.made[req.rid] = req
        return req

    def get_next_batch_to_run(self, running_batch: Any, last_batch: Any) -> Any:
        if self.trace:
            self._print_state(running_batch, last_batch)
        plan = super().get_next_batch_to_run(running_batch, last_batch)
        batch = plan.batch_to_run
        if batch:
            tokens = batch.extend_lens if batch.forward_mode.is_extend() else [1] * len(batch.reqs)
            decided: dict[str, Any] = dict(sorted((req.rid, n) for req, n in zip(batch.reqs, tokens, strict=True)))
            if self.lost:
                decided["!"] = sorted(self.lost)
                self.lost.clear()
            self.log.append(decided)
        if self.trace:
            say(f"  -> {json.dumps(self.log[-1]) if batch else 'nothing'}")
        self.step += 1
        assert self.step < 20000
        return plan

    def check_outputs(self) -> None:
        assert not self.lost and len(self.made) == len(self.requests)
        for request in self.requests:
            wrote = list(self.made[request.id].output_ids)
            expected = [token(request.id, position) for position in range(request.output)]
            assert wrote == expected[: len(wrote)], request.id
            assert len(wrote) == request.output or request.abort_step is not None, request.id

    def _print_state(self, running: Any, last: Any) -> None:
        """The state before a step's choice. Lengths are tokens; under overlap the last batch's result is not in it yet.

        The cache is printed leaf by leaf, least recently used first.
        """
        cache = self.tree_cache
        say(
            f"step {self.step}, batch {len(self.log)}: free {self.token_to_kv_pool_allocator.available_size()}, "
            f"evictable {cache.evictable_size()}, protected {cache.protected_size()}, "
            f"new token ratio {self.new_token_ratio_tracker.current:.6f}, batch_is_full {running.batch_is_full}"
        )
        say("  waiting: " + (" ".join(f"{req.rid}({describe(req)})" for req in self.waiting_queue) or "none"))
        say("  running: " + (" ".join(f"{req.rid}({describe(req)})" for req in running.reqs) or "none"))
        if last is not None:
            mode = "prompts" if last.forward_mode.is_extend() else "decodes"
            say(f"  last batch ({mode}): " + " ".join(f"{req.rid}({describe(req)})" for req in last.reqs))
        if self.chunked_req is not None:
            say(f"  in chunks: {self.chunked_req.rid}({describe(self.chunked_req)})")
        say("  cache: " + (" ".join(line for _, line in sorted(self._leaves())) or "empty"))

    def _leaves(self) -> Iterator[tuple[float, str]]:
        """Each leaf of the prefix cache: when it was used, by the tree's count, and what to print.

        That is a request whose tokens it holds, the tokens before the leaf + the leaf's own, and whether it is in use.
        """
        sequences = {rid: [*req.origin_input_ids, *req.output_ids] for rid, req in self.made.items()}
        todo: list[tuple[Any, list[int]]] = [(self.tree_cache.tree_core.root_node, [])]
        while todo:
            node, path = todo.pop()
            above = len(path)
            path = path + (list(node.key.token_ids) if node.key is not None else [])
            todo += [(child, path) for child in node.children.values()]
            if not node.children and path:
                owner = next((rid for rid, tokens in sequences.items() if tokens[: len(path)] == path), "?")
                used = " in use" if node.component_data[0].lock_ref else ""
                at = float(node.last_access_time)
                yield at, f"[{owner} {above}+{len(path) - above}{used} @{at:g}]"


def describe(req: Any) -> str:
    """Its prompt, what it has written as far as is known, its allotted output, and the KV that it holds."""
    prompt, wrote, most = len(req.origin_input_ids), len(req.output_ids), req.sampling_params.max_new_tokens
    end = ", finished" if req.finished() else ""
    return f"prompt {prompt}, wrote {wrote} of {most}, KV {req.kv.kv_allocated_len}{end}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(
    case: str, page: int, loop: str, seed: int, conservativeness: float | None, trace: bool = False
) -> tuple[str, list[dict[str, Any]]]:
    """One scenario, in a process that makes no other scheduler."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(MODEL))
        recorder = Recorder(model, case, page, loop, seed, conservativeness)
    recorder.trace = trace
    if loop == "normal":
        recorder.event_loop_normal()
    else:
        recorder.event_loop_overlap()
    recorder.check_outputs()
    return f"{case}/{page}/{loop}/{seed}", recorder.log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", help="the recording, .json.gz")
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    parser.add_argument("--cases", help="comma-separated; default: all that SGLang has")
    parser.add_argument("--conservativeness", type=float, help="requests may then stop, and it has this value")
    parser.add_argument(
        "--trace", metavar="KEY", help="run this case/page/loop/seed and print each step's state to stderr"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.trace:
        case, page, loop, seed = args.trace.split("/")
        run(case, int(page), loop, int(seed), args.conservativeness, trace=True)
        return
    if args.out is None:
        parser.error("say where the recording goes, or --trace KEY")
    cases = args.cases.split(",") if args.cases else [name for name, case in CASES.items() if "sglang" in case.engines]
    todo = [
        (case, page, loop, int(seed), args.conservativeness)
        for case in cases
        for page in (1, 16)
        for loop in ("normal", "overlap")
        for seed in args.seeds.split(",")
    ]
    engine = f"sglang {sglang.__version__}"
    if args.conservativeness is not None:
        engine += f", conservativeness {args.conservativeness}"
    # A process holds one scheduler: each run has its own.
    with multiprocessing.get_context("fork").Pool(args.processes, maxtasksperchild=1) as pool:
        record = {"engine": engine} | dict(pool.starmap(run, todo, chunksize=1))
    Path(args.out).write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
    for key, steps in record.items():
        if key != "engine":
            print(f"{key}: {len(steps)} batches, {sum(len(step.get('!', ())) for step in steps)} lost their KV")


if __name__ == "__main__":
    main()
