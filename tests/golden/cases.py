"""The golden commands: between them every loop, batching, policy, eviction, router, preset and kind of cost, and what makes
a scheduler work hard: retractions, preemptions, timeouts, chunks, sessions."""

from __future__ import annotations

from dataclasses import dataclass

RETRACTS = ("events.csv", "event == 'retracted'")
CHUNKS = ("requests.csv", "input_tokens - cached_tokens > 1000")
HITS = ("requests.csv", "cached_tokens > 0")
MIXES = ("iterations.csv", "mode == 'mixed'")
WAITS = ("iterations.csv", "waiting > 4")
LATER_TURNS = ("requests.csv", "turn > 1")


@dataclass(frozen=True)
class Case:
    """A command, run in the folder of `inputs.write_inputs`, and what must happen in it for it to be worth keeping."""

    name: str
    command: str
    """Without --out and --decisions."""
    shows: tuple[tuple[str, str], ...] = ()
    """(file, pandas query): in the record of some loop, some row of the file must be found by it."""


def _case(name: str, words: str, *shows: tuple[str, str]) -> Case:
    return Case(name, f"workbench {words}", shows)


THREE = "--loop normal,overlap,pipeline"
MOE = "--model Qwen/Qwen3-30B-A3B"

CASES = [
    # Loops and batchings
    _case("three-loops", f"simulate sample.jsonl --requests 60 {THREE} --tp 2", HITS, LATER_TURNS),
    _case("three-loops-mixed", f"simulate bursts.jsonl {THREE} --tp 2 --batching mixed --page-size 16", MIXES, WAITS),
    _case("three-loops-tiny-outputs", f"simulate tiny.jsonl {THREE} --tp 2 --max-running 16"),
    _case(
        "mixed-small-budget", "simulate prompts.jsonl --batching mixed --max-batch-tokens 512 --max-running 8", MIXES
    ),
    _case("mixed-chunk", "simulate bursts.jsonl --loop normal,overlap --mixed-chunk --chunk 512", MIXES, CHUNKS),
    _case("overlap-off", "simulate bursts.jsonl --no-overlap"),
    _case("overlap-no-two-prefills", "simulate bursts.jsonl --no-overlap-prefills --chunk 1024", CHUNKS),
    _case("steady-decodes", f"simulate steady.jsonl {THREE} --tp 2", ("itl.csv", "count > 1")),
    _case("steady-decodes-mixed", "simulate steady.jsonl --loop normal,overlap --batching mixed --page-size 16"),
    _case("steady-decodes-known", "simulate steady.jsonl --loop normal,overlap --ignore-eos --page-size 16"),
    _case("steady-decodes-closed", "simulate steady.jsonl --loop normal,overlap --concurrency 6 --ignore-eos"),
    # Policies
    _case("policy-fcfs", "simulate prefixes.jsonl --policy fcfs --max-running 4 --page-size 16", WAITS, HITS),
    _case("policy-lpm", "simulate prefixes.jsonl --policy lpm --max-running 4", WAITS, HITS),
    _case(
        "policy-lpm-aging",
        "simulate prefixes.jsonl --speedup 8 --policy lpm --max-prefill-tokens 1500 --max-passed-over 1",
        WAITS,
        HITS,
    ),
    _case(
        "policy-lpm-mixed",
        "simulate prefixes.jsonl --speedup 8 --policy lpm --batching mixed --max-batch-tokens 900 --max-passed-over 1",
        WAITS,
        HITS,
    ),
    _case("policy-dfs-weight", "simulate prefixes.jsonl --policy dfs-weight --max-running 4", WAITS, HITS),
    _case("policy-lof", "simulate bursts.jsonl --policy lof --max-running 6 --ignore-eos", WAITS),
    _case("policy-sjf", "simulate bursts.jsonl --policy sjf --max-running 6 --batching mixed", WAITS),
    _case(
        "policy-edf", "simulate ranked.jsonl --policy edf --max-running 6", WAITS, ("requests.csv", "slo_ttft_s > 0")
    ),
    _case(
        "policy-edf-flag", "simulate bursts.jsonl --policy edf --slo-ttft 0.5 --slo-tpot 0.02 --max-running 6", WAITS
    ),
    _case("policy-random", "simulate ranked.jsonl --policy random --seed 7 --max-running 6", WAITS),
    _case("policy-priority", "simulate ranked.jsonl --policy priority --batching mixed --max-running 6", WAITS),
    _case(
        "preemption",
        "simulate ranked.jsonl --policy priority --preempt-threshold 2 --max-running 6 --loop normal,overlap",
        RETRACTS,
    ),
    # Memory
    _case("cache-none", "simulate chats.jsonl --cache none --page-size 16"),
    _case("evict-lru", "simulate chats.jsonl --evict lru --kv-tokens 6000", HITS),
    _case("evict-lfu", "simulate chats.jsonl --evict lfu --kv-tokens 6000", HITS),
    _case("evict-fifo", "simulate chats.jsonl --evict fifo --kv-tokens 6000 --page-size 16", HITS),
    _case(
        "tight-kv",
        "simulate steady.jsonl --loop normal,overlap --kv-tokens 5000 --conservativeness 0.05 --ignore-eos",
        RETRACTS,
    ),
    _case(
        "tight-kv-unknown",
        "simulate steady.jsonl --loop normal,overlap --kv-tokens 2500 --conservativeness 0.01 "
        "--max-tokens 200 --page-size 16",
        RETRACTS,
    ),
    _case(
        "tight-kv-mixed",
        "simulate steady.jsonl --loop normal,overlap --batching mixed --kv-tokens 4800 --page-size 16",
        RETRACTS,
    ),
    _case(
        "tight-kv-pipeline",
        "simulate steady.jsonl --pp 2 --kv-tokens 2500 --conservativeness 0.05 --max-tokens 700",
        RETRACTS,
    ),
    # Requests wait for KV that others are expected to need yet.
    _case("expected-output", "simulate steady.jsonl --loop normal,overlap --kv-tokens 9000 --max-tokens 700", WAITS),
    _case(
        "expected-output-sessions",
        "simulate sample.jsonl --requests 100 --speedup 8 --kv-tokens 20000 --max-tokens 1000",
        WAITS,
    ),
    _case(
        "no-room",
        "simulate prompts.jsonl --max-context 20000 --kv-tokens 24000",
        ("requests.csv", "status.str.startswith('rejected')"),
    ),
    # Chunks and bounds
    _case("chunk-whole", "simulate prompts.jsonl --chunk 0 --max-prefill-tokens 40000"),
    _case("chunk-depth", "simulate prompts.jsonl --chunk 4096 --chunk-depth 8192 --loop normal,overlap"),
    _case("prefill-streak", "simulate bursts.jsonl --chunk 512 --max-prefill-streak 2 --loop normal,overlap", CHUNKS),
    _case("max-tokens", "simulate steady.jsonl --max-tokens 250", ("requests.csv", "output_tokens == 250")),
    _case(
        "queue-timeout",
        "simulate bursts.jsonl --queue-timeout 0.15 --max-running 5 --loop normal,overlap",
        ("requests.csv", "status.str.contains('timeout') and scheduled_s.isna()"),
    ),
    _case(
        "request-timeout",
        "simulate steady.jsonl --request-timeout 2.5 --loop normal,overlap",
        ("requests.csv", "status.str.contains('timeout') and scheduled_s.notna()"),
    ),
    # Arrivals
    _case("closed-loop", "simulate sample.jsonl --requests 60 --concurrency 12 --loop normal,overlap", LATER_TURNS),
    _case("sessions", "simulate chats.jsonl --page-size 16 --loop normal,overlap", LATER_TURNS, HITS),
    _case("agents", "simulate agents.jsonl --page-size 16 --chunk 512", LATER_TURNS, HITS),
    _case(
        "agents-spread", "simulate agents.jsonl --rate 4 --batching mixed --seed 3", ("requests.csv", "arrival_s > 0")
    ),
    _case("speedup", "simulate ranked.jsonl --speedup 3 --requests 50 --ignore-eos"),
    # Layouts
    _case("tp", "simulate steady.jsonl --tp 4 --model meta-llama/Llama-3.1-70B"),
    _case("pp-micro-batches", "simulate steady.jsonl --pp 2 --micro-batches 3", ("iterations.csv", "stage == 1")),
    _case("pp-mixed", "simulate bursts.jsonl --pp 4 --batching mixed --page-size 16", ("iterations.csv", "stage == 3")),
    _case("dp-round-robin", "simulate chats.jsonl --dp 3 --router round_robin", ("requests.csv", "instance == 2")),
    _case(
        "dp-least-requests", "simulate bursts.jsonl --dp 3 --router least_requests", ("requests.csv", "instance == 2")
    ),
    _case(
        "dp-least-tokens", "simulate chats.jsonl --dp 2 --tp 2 --router least_tokens", ("requests.csv", "instance == 1")
    ),
    _case("dp-cache-aware", "simulate chats.jsonl --dp 3 --router cache_aware --loop normal,overlap", HITS),
    _case("dp-cache-aware-branches", "simulate prefixes.jsonl --dp 4 --router cache_aware --speedup 4", HITS),
    _case(
        "dp-pipeline", "simulate bursts.jsonl --dp 2 --pp 2 --router least_requests", ("requests.csv", "instance == 1")
    ),
    _case("ep", f"simulate bursts.jsonl {MOE} --tp 2 --ep 2"),
    _case(
        "ep-lock-step",
        f"simulate bursts.jsonl {MOE} --dp 4 --ep 4 --loop normal,overlap",
        ("iterations.csv", "instance == 3"),
    ),
    _case(
        "ep-lock-step-mixed", f"simulate steady.jsonl {MOE} --dp 2 --tp 2 --ep 4 --batching mixed --router least_tokens"
    ),
    # Pairs of instances
    _case(
        "pairs",
        "simulate chats.jsonl --pool prefill:1,chunk=512 --pool decode:2 --loop normal,overlap --router least_tokens",
        ("requests.csv", "decode_admission_s > transfer_end_s"),
        HITS,
    ),
    _case(
        "pairs-tight-kv",
        "simulate steady.jsonl --pool prefill:1 --pool decode:1,kv-tokens=2500,reserved-decode-tokens=0 --page-size 16 "
        "--max-tokens 200 --loop normal,overlap",
        RETRACTS,
    ),
    _case(
        "pairs-through-prefill",
        "simulate steady.jsonl --pool prefill:1 --pool decode:1,kv-tokens=2500,reserved-decode-tokens=0 --max-tokens 200 "
        "--decode-retraction prefill",
        RETRACTS,
    ),
    _case(
        "pairs-layouts",
        "simulate prefixes.jsonl --pool prefill:2,pp=2 --pool decode:1,tp=2,gpu=h200 --decode-cache --kv-link 2GB/s "
        "--page-size 16 --router expected_ttft --first-token prefill",
        ("iterations.csv", "stage == 1"),
        HITS,
    ),
    # Presets and costs
    _case("engine-workbench", "simulate sample.jsonl --requests 60 --engine workbench", HITS),
    _case("engine-vllm", "simulate sample.jsonl --requests 80 --engine vllm-0.19", MIXES, HITS),
    _case("engine-sglang", "simulate sample.jsonl --requests 80 --engine sglang-0.5", HITS),
    _case(
        "small-gpu", "simulate tiny.jsonl --gpu l4 --model Qwen/Qwen3-1.7B --dtype fp8 --kv-dtype fp8 --no-cuda-graphs"
    ),
    _case("cost-profile", "simulate bursts.jsonl --cost profile:profile --loop normal,overlap"),
    _case("cost-profile-vllm", "simulate steady.jsonl --cost profile:profile --engine vllm-0.19", MIXES),
    _case(
        "cost-fitted", "simulate steady.jsonl --cost fitted:fitted.json --loop normal,overlap --batching mixed", MIXES
    ),
    # A search
    _case(
        "sweep",
        "sweep bursts.jsonl --requests 30 --vary max_running=8,32 --vary page_size=1,16 --jobs 1 --keep-records",
        ("results.csv", "status == 'finished'"),
    ),
]
