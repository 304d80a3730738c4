"""What the recorders of SGLang's versions share: requests that come by step, the worker's pools, the log, checks, the trace.

Of SGLang only what all recorded versions have is imported here. A version's own Scheduler and what its worker has beside are
in sglang_0_5_23.py and sglang_0_5_10.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from recording import check_written
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams

from workbench.parity.scenarios import CASES, CONTEXT_TOKENS, KV_BLOCK_TOKENS, RETRACTED, Case, Request, scenario, token


def server_args(model: str, case: str, page: int, loop: str, conservativeness: float | None) -> dict[str, Any]:
    """Everything that is not a server's default."""
    sizes = CASES[case]
    args: dict[str, Any] = {
        "model_path": model,
        "device": "cpu",
        "attention_backend": "torch_native",
        "skip_tokenizer_init": True,
        "context_length": CONTEXT_TOKENS - 1,
        "page_size": page,
        "chunked_prefill_size": sizes.budget,
        "max_running_requests": sizes.running,
        "disable_overlap_schedule": loop == "normal",
        "enable_mixed_chunk": sizes.mixed,
    }
    if conservativeness is not None:
        args["schedule_conservativeness"] = conservativeness
    if sizes.policy == "priority":
        # By default one goes before another only from 11 priorities on; here from 1 on.
        args |= {"enable_priority_scheduling": True, "priority_scheduling_preemption_threshold": 0}
    elif sizes.policy == "lpm":
        args["schedule_policy"] = "lpm"
    return args


def check_settings(scheduler: Any, case: Case, page: int, loop: str) -> None:
    """Raise AssertionError unless a scheduler has taken what :func:`server_args` asked for."""
    assert (scheduler.enable_overlap, scheduler.page_size) == (loop == "overlap", page)
    assert (scheduler.chunked_prefill_size, scheduler.max_prefill_tokens) == (case.budget, 16384)
    assert scheduler.max_running_requests == case.running
    assert scheduler.schedule_policy == ("lpm" if case.policy == "lpm" else "fcfs")
    assert scheduler.enable_priority_preemption == (case.policy == "priority")
    assert scheduler.is_mixed_chunk == case.mixed


def sampling_of(request: Request, ignore_eos: bool) -> SamplingParams:
    """What a request says of its output."""
    params = SamplingParams(max_new_tokens=request.output, ignore_eos=ignore_eos, temperature=0)
    params.normalize(None)
    return params


class Forward:
    """The forward pass, as far as a scheduler can tell: it fills KV slots with tokens and samples scenarios.token."""

    def __init__(self, slots: int) -> None:
        self.slots = torch.zeros(slots, dtype=torch.int64)
        """The token whose KV each slot holds."""
        self.sequences: dict[str, torch.Tensor] = {}
        """By request id: its prompt and all that it may write."""

    def __call__(self, batch: Any, row_slots: torch.Tensor) -> torch.Tensor:
        """The token that each row samples. ``row_slots``: (rows of the pool, positions), the KV slots of each row."""
        self.slots[batch.out_cache_loc] = batch.input_ids
        sampled = []
        rows, lengths = batch.req_pool_indices.tolist(), batch.seq_lens.tolist()
        for req, row, length in zip(batch.reqs, rows, lengths, strict=True):
            sequence = self._sequence(req)
            held = self.slots[row_slots[row, :length].long()]
            assert torch.equal(held, sequence[:length]), (req.rid, "holds another token's KV")
            sampled.append(sequence[length])
        return torch.stack(sampled)

    def _sequence(self, req: Any) -> torch.Tensor:
        if req.rid not in self.sequences:
            written = [token(req.rid, position) for position in range(req.sampling_params.max_new_tokens + 1)]
            self.sequences[req.rid] = torch.tensor(list(req.origin_input_ids) + written)
        return self.sequences[req.rid]


class PoolsOnCpu:
    """In place of TpModelWorker: pools and forward pass.

    With what a version adds it holds only what that version's scheduler asks of it: anything else is an AttributeError.
    """

    is_hybrid_swa = False

    def __init__(
        self, model_config: Any, case: Case, page: int, paged: type[Any] = PagedTokenToKVPoolAllocator
    ) -> None:
        """``paged``: the allocator of pages of several tokens."""
        kv_tokens = case.blocks * KV_BLOCK_TOKENS
        self.kv = MHATokenToKVPool(
            kv_tokens,
            page,
            torch.float32,
            head_num=1,
            head_dim=2,
            layer_num=1,
            device="cpu",
            enable_memory_saver=False,
        )
        same: dict[str, Any] = {"dtype": self.kv.dtype, "device": "cpu", "kvcache": self.kv, "need_sort": False}
        self.allocator: Any = TokenToKVPoolAllocator(kv_tokens, **same) if page == 1 else paged(kv_tokens, page, **same)
        self.rows = ReqToTokenPool(case.running, CONTEXT_TOKENS, "cpu", enable_memory_saver=False)
        self.model_config = model_config
        self.forward = Forward(kv_tokens + page)

    def get_memory_pool(self) -> tuple[Any, Any]:
        return self.rows, self.allocator

    def get_pad_input_ids_func(self) -> None:
        return None

    def worker_info(self, limits: Any, stream: Any) -> tuple[Any, ...]:
        """What get_worker_info gives. ``limits`` has the server's arguments of scheduling."""
        kv_tokens = self.allocator.size
        longest = min(CONTEXT_TOKENS - 1, kv_tokens) - 1
        return (
            kv_tokens,
            limits.max_prefill_tokens,
            limits.max_running_requests,
            limits.max_queued_requests,
            longest,
            longest - 5,
            0,
            "cpu",
            stream,
            self.rows.size,
            CONTEXT_TOKENS,
            kv_tokens,
        )


class Steps:
    """A scenario as it is played to a scheduler, step by step, and what that decides."""

    def __init__(self, case: str, seed: int) -> None:
        self.case, self.seed = case, seed
        self.requests = scenario(case, seed)
        self._arrivals = list(self.requests)
        aborts = ((request.abort_step, request.id) for request in self.requests if request.abort_step is not None)
        self._aborts = sorted(aborts)
        self.at = 0
        self.log: list[dict[str, Any]] = []
        self.lost: list[str] = []
        """Requests that lost their KV since the last batch."""
        self.made: dict[str, Any] = {}
        """SGLang's requests, by id."""

    @property
    def all_came(self) -> bool:
        return not self._arrivals

    def wait(self) -> None:
        """Let the steps pass in which there is nothing to do."""
        self.at = max(self.at, self._arrivals[0].step)

    def arrived(self) -> list[Request]:
        due = [request for request in self._arrivals if request.step <= self.at]
        del self._arrivals[: len(due)]
        return due

    def aborted(self) -> list[str]:
        due = [request_id for step, request_id in self._aborts if step <= self.at]
        del self._aborts[: len(due)]
        return due

    def decided(self, batch: Any) -> None:
        """Note what a step chose, which may be nothing."""
        if batch:
            tokens = batch.extend_lens if batch.forward_mode.is_extend() else [1] * len(batch.reqs)
            chosen: dict[str, Any] = dict(sorted((req.rid, n) for req, n in zip(batch.reqs, tokens, strict=True)))
            if self.lost:
                chosen[RETRACTED] = sorted(self.lost)
                self.lost.clear()
            self.log.append(chosen)
        self.at += 1
        assert self.at < 20000, "this does not end"

    def check_outputs(self) -> None:
        assert not self.lost
        tokens = {each.id: [token(each.id, position) for position in range(each.output)] for each in self.requests}
        check_written(self.case, self.seed, {rid: list(req.output_ids) for rid, req in self.made.items()}, tokens)


def note_losses(batches: type[Any], steps: Steps) -> None:
    """Note who loses its KV. Both retraction and preemption give it back by a batch's release_req."""
    release = batches.release_req

    def release_req(batch: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        steps.lost.append(batch.reqs[index].rid)
        return release(batch, index, *args, **kwargs)

    batches.release_req = release_req


class InOrder(dict[Any, None]):
    """A set that keeps the order in which things were put in.

    Preemption puts the requests that it chose into a set of objects and hands them back to the queue in the set's order,
    which is that of their addresses. With this as its module's ``set`` a recording can be repeated.
    """

    def __init__(self, things: Iterable[Any] = ()) -> None:
        super().__init__(dict.fromkeys(things))

    def add(self, thing: Any) -> None:
        self[thing] = None


def print_state(steps: Steps, scheduler: Any, running: Any, last: Any, ratio: float, allocated: str, root: Any) -> None:
    """Print the state before a step's choice to stderr. Lengths are tokens; under overlap the last result is not in yet.

    ``allocated`` is how to come from a request to the tokens of KV it holds; ``root`` the prefix cache's first node. The
    cache is printed leaf by leaf, least recently used first.
    """

    def listed(reqs: list[Any]) -> str:
        return " ".join(f"{req.rid}({described(req, allocated)})" for req in reqs) or "none"

    cache = scheduler.tree_cache
    say(
        f"step {steps.at}, batch {len(steps.log)}: free {scheduler.token_to_kv_pool_allocator.available_size()}, "
        f"evictable {cache.evictable_size()}, protected {cache.protected_size()}, "
        f"new token ratio {ratio:.6f}, batch_is_full {running.batch_is_full}"
    )
    say(f"  waiting: {listed(scheduler.waiting_queue)}")
    say(f"  running: {listed(running.reqs)}")
    if last is not None:
        say(f"  last batch ({'prompts' if last.forward_mode.is_extend() else 'decodes'}): {listed(last.reqs)}")
    if scheduler.chunked_req is not None:
        say(f"  in chunks: {listed([scheduler.chunked_req])}")
    sequences = {rid: [*req.origin_input_ids, *req.output_ids] for rid, req in steps.made.items()}
    say("  cache: " + (" ".join(line for _, line in sorted(leaves(root, sequences))) or "empty"))


def print_decision(steps: Steps, batch: Any) -> None:
    say(f"  -> {json.dumps(steps.log[-1]) if batch else 'nothing'}")


def described(req: Any, allocated: str) -> str:
    """A request's prompt, what it has written as far as is known, its allotted output, and the KV that it holds."""
    prompt, wrote, most = len(req.origin_input_ids), len(req.output_ids), req.sampling_params.max_new_tokens
    held = req
    for name in allocated.split("."):
        held = getattr(held, name)
    return f"prompt {prompt}, wrote {wrote} of {most}, KV {held}{', finished' if req.finished() else ''}"


def leaves(root: Any, sequences: dict[str, list[int]]) -> Iterator[tuple[float, str]]:
    """Each leaf of the prefix cache: when it was used, by the tree's count, and what to print.

    That is a request whose tokens it holds, the tokens before the leaf + the leaf's own, and whether it is in use.
    """
    todo: list[tuple[Any, list[int]]] = [(root, [])]
    while todo:
        node, path = todo.pop()
        above = len(path)
        path = path + (list(node.key.token_ids) if node.key is not None else [])
        todo += [(child, path) for child in node.children.values()]
        if not node.children and path:
            owner = next((rid for rid, tokens in sequences.items() if tokens[: len(path)] == path), "?")
            locks = node.component_data[0].lock_ref if hasattr(node, "component_data") else node.lock_ref
            at = float(node.last_access_time)
            yield at, f"[{owner} {above}+{len(path) - above}{' in use' if locks else ''} @{at:g}]"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
