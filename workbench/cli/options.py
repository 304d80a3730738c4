"""The flags that several commands share: one vocabulary, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

RUN, SCHED, GPU, SHAPE = "Run", "Scheduler", "Model and hardware", "Trace"


def option(*names: str, help: str, panel: str) -> Any:
    """A flag in a panel of the help page; defaults are said in its text, for they may come from a file."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


Loop = Annotated[
    Optional[str],
    option(
        "--loop",
        help="normal, overlap, pipeline, or a comma list to compare. Default: pipeline if pp > 1, else overlap.",
        panel=RUN,
    ),
]
Config = Annotated[Optional[Path], option("--config", help="TOML file of settings; flags win.", panel=RUN)]
Like = Annotated[
    Optional[Path], option("--like", help="Run record whose settings to take; --config and flags win.", panel=RUN)
]
Engine = Annotated[
    Optional[str],
    option(
        "--engine",
        help="Preset of settings, graphs and CPU phases: workbench | vllm-0.19 | sglang-0.5. Flags win.",
        panel=SCHED,
    ),
]
Seed = Annotated[Optional[int], option("--seed", help="Seed of everything random. Default 0.", panel=RUN)]
Model = Annotated[
    Optional[str],
    option(
        "--model",
        help="Hugging Face id of the catalogue, folder, or config.json. Default meta-llama/Llama-3.1-8B.",
        panel=GPU,
    ),
]
Gpu = Annotated[Optional[str], option("--gpu", help="GPU of the catalogue or a TOML file. Default h100.", panel=GPU)]
Tp = Annotated[Optional[int], option("--tp", help="Tensor parallel GPUs. Default 1.", panel=GPU)]
Pp = Annotated[Optional[int], option("--pp", help="Pipeline stages. Default 1.", panel=GPU)]
MicroBatches = Annotated[
    Optional[int],
    option(
        "--micro-batches",
        help="Micro-batches that take turns in the pipeline; more than stages hide CPU phases and uneven stages. Default: as many as stages.",
        panel=GPU,
    ),
]
Ep = Annotated[
    Optional[int],
    option(
        "--ep",
        help="GPUs that experts are spread over: tp, or tp * dp (instances then step together). Default 1.",
        panel=GPU,
    ),
]
Dtype = Annotated[
    Optional[str],
    option(
        "--dtype",
        help="Weights: bf16 | fp16 | fp32 | fp8 | int8, int4 (simulated) | auto: as the checkpoint says. Default auto.",
        panel=GPU,
    ),
]
LoadFormat = Annotated[
    str,
    option("--load-format", help="Weights: auto | safetensors | gguf | dummy (random). Default auto.", panel=GPU),
]
KvDtype = Annotated[
    Optional[str],
    option("--kv-dtype", help="KV cache (simulated): bf16 | fp16 | fp32 | fp8. Default bf16.", panel=GPU),
]
MemFraction = Annotated[
    Optional[float], option("--mem-fraction", help="Share of GPU memory to use. Default 0.9.", panel=GPU)
]
KvTokens = Annotated[
    Optional[int], option("--kv-tokens", help="KV capacity in tokens. Default: found from memory.", panel=GPU)
]
MaxContext = Annotated[
    Optional[int], option("--max-context", help="Longest sequence. Default: the model's.", panel=GPU)
]
CudaGraphs = Annotated[
    Optional[bool], option("--cuda-graphs/--no-cuda-graphs", help="Decode in captured graphs. Default on.", panel=GPU)
]
Cost = Annotated[
    Optional[str],
    option("--cost", help="Cost model: roofline | profile:PATH | fitted:PATH. Default roofline.", panel=GPU),
]
Batching = Annotated[
    Optional[str], option("--batching", help="prefill-first | mixed. Default prefill-first.", panel=SCHED)
]
Policy = Annotated[
    Optional[str],
    option(
        "--policy",
        help="fcfs | lpm | dfs-weight | lof | sjf | edf | random | priority | module:Class. Default fcfs.",
        panel=SCHED,
    ),
]
PageSize = Annotated[Optional[int], option("--page-size", help="Tokens a KV page. Default 1.", panel=SCHED)]
Cache = Annotated[Optional[str], option("--cache", help="Prefix cache: radix | none. Default radix.", panel=SCHED)]
Evict = Annotated[Optional[str], option("--evict", help="lru | lfu | fifo. Default lru.", panel=SCHED)]
Chunk = Annotated[
    Optional[int],
    option(
        "--chunk",
        help="Prompt tokens of a prefill batch; 0: prompts whole. Default 8192; a real model on a CPU: 512.",
        panel=SCHED,
    ),
]
ChunkDepth = Annotated[
    Optional[int],
    option(
        "--chunk-depth",
        help="Prefix after which a chunk is half as long, so that deep chunks take no longer. Default: all alike.",
        panel=SCHED,
    ),
]
MaxPrefillTokens = Annotated[Optional[int], option("--max-prefill-tokens", help="Default 16384.", panel=SCHED)]
MaxBatchTokens = Annotated[
    Optional[int],
    option(
        "--max-batch-tokens",
        help="Token budget of a step (mixed). Default 2048; a real model on a CPU: 512.",
        panel=SCHED,
    ),
]
MaxRunning = Annotated[
    Optional[int], option("--max-running", help="Requests running at a time. Default 256.", panel=SCHED)
]
MixedChunk = Annotated[
    Optional[bool],
    option("--mixed-chunk/--no-mixed-chunk", help="Decodes join prefill batches (prefill-first).", panel=SCHED),
]
PreemptThreshold = Annotated[
    Optional[int],
    option(
        "--preempt-threshold",
        help="Priority difference that preempts (policy priority, prefill-first). Default: none does.",
        panel=SCHED,
    ),
]
Conservativeness = Annotated[
    Optional[float], option("--conservativeness", help="Scales the expected output share. Default 1.", panel=SCHED)
]
MaxPassedOver = Annotated[
    Optional[int], option("--max-passed-over", help="Aging bound, in prefill batches. Default 64.", panel=SCHED)
]
MaxPrefillStreak = Annotated[
    Optional[int],
    option("--max-prefill-streak", help="Prefills in a row while decodes wait. Default: no bound.", panel=SCHED),
]
QueueTimeout = Annotated[
    Optional[float], option("--queue-timeout", help="Seconds a request may wait unscheduled.", panel=SCHED)
]
RequestTimeout = Annotated[
    Optional[float], option("--request-timeout", help="Seconds a request may take.", panel=SCHED)
]
Overlap = Annotated[
    Optional[bool],
    option("--overlap/--no-overlap", help="Whether the loop chosen without --loop overlaps.", panel=SCHED),
]
OverlapPrefills = Annotated[
    Optional[bool],
    option("--overlap-prefills/--no-overlap-prefills", help="Overlap two prefills in a row. Default on.", panel=SCHED),
]
IgnoreEos = Annotated[
    Optional[bool],
    option("--ignore-eos/--no-ignore-eos", help="Output lengths are known to the scheduler.", panel=SHAPE),
]
MaxTokens = Annotated[
    Optional[int],
    option(
        "--max-tokens",
        help="Output bound of requests that have none. Default 4096, or what the trace says they write if that is more.",
        panel=SHAPE,
    ),
]

Out = Annotated[
    Optional[Path], option("--out", help="Output folder. Default: runs/<trace>, numbered if taken.", panel=RUN)
]
Force = Annotated[bool, option("--force", help="Replace an earlier run in the output folder.", panel=RUN)]
AsJson = Annotated[bool, option("--json", help="Print the numbers as JSON.", panel=RUN)]
Decisions = Annotated[bool, option("--decisions", help="Also write decisions.jsonl.", panel=RUN)]
Exact = Annotated[
    Optional[bool],
    option(
        "--exact/--no-exact",
        help="Simulate every decode step by itself, instead of many at once where they are decided: slower, same record.",
        panel=RUN,
    ),
]
SloTtft = Annotated[
    Optional[float], option("--slo-ttft", help="Seconds; goodput counts requests within it.", panel=RUN)
]
SloTpot = Annotated[
    Optional[float], option("--slo-tpot", help="Seconds a token; goodput counts requests within it.", panel=RUN)
]
Requests = Annotated[Optional[int], option("--requests", help="Only the first N requests.", panel=SHAPE)]
Rate = Annotated[Optional[float], option("--rate", help="Rescale arrivals to this mean rate, requests/s.", panel=SHAPE)]
Speedup = Annotated[Optional[float], option("--speedup", help="Divide arrival times by this.", panel=SHAPE)]
Concurrency = Annotated[
    Optional[int],
    option("--concurrency", help="Closed loop: so many at a time, arrivals ignored.", panel=SHAPE),
]
Executor = Annotated[str, option("--executor", help="Where runs go: local | ray. Default local.", panel=RUN)]
