"""The command that starts an engine with the settings of a run: ours, vLLM's and SGLang's.

Flags are those whose meaning is the same as the setting's; of what else is not as that engine does it anyway, the setting is
named. Ours are by the source of vLLM 0.33 (engine/arg_utils.py) and SGLang 0.5 (srt/server_args.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench.scheduler.settings import HARDWARE, RULES, SCHEDULER
from workbench.settings.engines import GPU_KEYS, load_engine
from workbench.settings.idle import acts
from workbench.settings.loading import SETTINGS
from workbench.settings.one_server import NOT_OF_A_SERVER
from workbench.settings.pool_spec import PoolSpec
from workbench.settings.real import TORCH_DTYPES
from workbench.settings.run_settings import RUN_WIDE, PoolSettings, RunSettings

MODEL_ONLY = frozenset({"model", "engine", "gpu", "machine", "cost", "front_end", "role", "expert_skew", "kv_windows"})
"""Settings that say what is simulated, not what an engine is told."""
RUNNER_HAS: dict[str, tuple[Any, ...]] = {"dtype": tuple(TORCH_DTYPES), "ep": (1,)}
"""Of settings that the simulator has more values of: those that our runner has, beside the default."""
LINKS = frozenset({"link", "link_latency", "node_link", "node_link_latency", "gpus_per_node"})
CLUSTER = frozenset({"dp", "pool", "router", "decode_router", "autoscale", "fail"})
PLAIN = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class Deployed:
    """A command line, and what it cannot say."""

    engine: str
    words: list[str]
    """Empty where the engine has nothing that does this."""
    without: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    """Settings that the words, or the engine itself, say."""
    pool: str = ""
    """Whose instances it starts, where the cluster has several pools."""

    @property
    def command(self) -> str:
        return shlex.join(self.words)

    def add(self, name: str, *words: object) -> None:
        """Say a setting."""
        self.words += map(str, words)
        self.said.add(name)

    def lacks(self, name: str, why: str) -> None:
        """Name a setting that there is no flag for."""
        self.without.append(f"{name}: {why}")
        self.said.add(name)

    def lacks_once(self, name: str, why: str) -> None:
        """Name a setting that there is no flag for, however many pools have it."""
        if f"{name}: {why}" not in self.without:
            self.lacks(name, why)

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON holds it."""
        pool = {"pool": self.pool} if self.pool else {}
        return {"engine": self.engine, **pool, "command": self.command, "without": self.without}


def deploy_commands(settings: RunSettings, loop: str, kv_tokens: int, experts: bool, pool: str = "") -> list[Deployed]:
    """The commands that start one instance, or all where the engine itself has several, with these settings: a run's, or
    those of the one of its pools that is called ``pool``: ours (:func:`our_command`) starts all pools at once.

    ``kv_tokens`` is the KV capacity that was found, ``experts`` whether the model has any.
    """
    found = [_vllm(settings, loop, experts), _sglang(settings, loop, kv_tokens)]
    if not pool:
        return [our_command([PoolSettings("both", settings.role, settings.dp, settings, loop)]), *found]
    for each in found:
        each.pool = pool
        if each.words:
            each.lacks("router", f"{settings.router}, one before all pools")
    return found


def our_command(pools: Sequence[PoolSettings]) -> Deployed:
    """The command of ours that starts these pools, and the router before them, at once."""
    if any(pool.settings.ep > pool.settings.tp for pool in pools):
        found = Deployed("workbench", [])
        found.lacks("ep", "instances that share their experts step together; those of our servers do not")
        return found
    found = Deployed("workbench", ["workbench", "serve", pools[0].settings.model])
    told = [_told(found, pool.settings, pool.loop) for pool in pools]
    if len({pool.loop for pool in pools}) > 1:
        # Several stages have their own loop; which of the others a pool has, overlap says.
        for own, pool in zip(told, pools, strict=True):
            own.pop("loop", None)
            if pool.loop in ("normal", "overlap"):
                own["overlap"] = pool.loop == "overlap"
    several = len(pools) > 1 or pools[0].role != "both"
    for name in dict.fromkeys(name for own in told for name in own):
        values = [own[name] for own in told if name in own]
        if name in RUN_WIDE or (len(values) == len(pools) and all(value == values[0] for value in values)):
            words = SETTINGS[name].written(values[0])
            found.add(name, *words) if words else found.lacks(name, "none, which no flag says")
            for own in told:
                own.pop(name, None)
    for own, pool in zip(told, pools, strict=True) if several else ():
        given = tuple((name, _as_key(value)) for name, value in own.items())
        found.add("pool", "--pool", PoolSpec(pool.name, pool.role, pool.count, given).text)
    if not several and pools[0].count > 1:
        found.add("dp", "--dp", pools[0].count)
    return found


def _told(found: Deployed, settings: RunSettings, loop: str) -> dict[str, Any]:
    """Settings of a pool that our server is to be told; what it cannot be goes to ``found``."""
    told: dict[str, Any] = {}
    if settings.engine != SETTINGS["engine"].default:
        told["engine"] = settings.engine
    usual = _implied(settings.engine)  # the loop, which is named where it is not the preset's, says overlap
    for name, declared in SETTINGS.items():
        value = loop if name == "loop" else getattr(settings, name)
        if (
            name in NOT_OF_A_SERVER | {"dp", "pool", "engine", "overlap"}
            or {"live", "served"} & declared.idle.keys()
            or not acts(settings, loop, name)
        ):
            continue
        if name in usual and value == usual[name]:
            continue
        if name in RUNNER_HAS and value not in (declared.default, *RUNNER_HAS[name]):
            found.lacks_once(name, f"{value}; our runner has {' or '.join(map(str, RUNNER_HAS[name]))}")
        elif "real" in declared.idle:
            if name not in MODEL_ONLY:
                found.lacks_once(name, declared.idle["real"])
        elif not (name in MODEL_ONLY or name in LINKS):
            told[name] = value
    if (settings.nodes or 1) > 1:
        found.lacks_once(
            "node_rank", f"start it on each of {settings.nodes} machines, with --node-rank and --rendezvous"
        )
    if told.get("first_token") == "prefill":
        found.lacks_once("first_token", "prefill; a live decode instance sends the first token")
        del told["first_token"]
    return told


def _as_key(value: object) -> str:
    """A value as a pool says it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _implied(engine: str) -> dict[str, Any]:
    """Settings that a server with the preset of ``engine`` has without being told, whatever its GPU."""
    preset = load_engine(engine)
    by_gpu = {name for case in preset.gpus for name in case.keys() - GPU_KEYS}
    said = {name: SETTINGS[name].meant(value) for name, value in preset.settings.items()}
    return {name: said.get(name, declared.default) for name, declared in SETTINGS.items() if name not in by_gpu}


def _instances(found: Deployed, settings: RunSettings) -> None:
    if settings.dp > 1:
        found.lacks("dp", f"start {settings.dp} of these, with a router before them")


def _vllm(settings: RunSettings, loop: str, experts: bool) -> Deployed:
    found = Deployed("vllm", ["vllm", "serve", settings.model])
    if settings.tp > 1:
        found.add("tp", "--tensor-parallel-size", settings.tp)
    if settings.pp > 1:
        found.add("pp", "--pipeline-parallel-size", settings.pp)
    if settings.ep > 1 and settings.ep == settings.tp * settings.dp:
        found.add("ep", "--enable-expert-parallel")
    elif settings.ep > 1:
        found.lacks("ep", "vLLM spreads experts over all tp x dp GPUs")
    if settings.role != "both":
        found.lacks("role", f"{settings.role}; --kv-transfer-config says it, with a connector of yours")
        _instances(found, settings)
    elif settings.dp > 1 and (not experts or settings.ep == settings.tp * settings.dp):
        found.add("dp", "--data-parallel-size", settings.dp)
    else:
        _instances(found, settings)
    found.add("max_running", "--max-num-seqs", settings.max_running)
    if settings.batching == "mixed":
        found.add("max_batch_tokens", "--max-num-batched-tokens", settings.max_batch_tokens)
        if settings.long_prefill_tokens is not None:
            found.add("long_prefill_tokens", "--long-prefill-token-threshold", settings.long_prefill_tokens)
    _dtype(found, settings, "--dtype")
    if settings.kv_tokens is not None:
        blocks = settings.kv_tokens // settings.page_size
        found.add("kv_tokens", "--num-gpu-blocks-override", blocks)
    found.add("mem_fraction", "--gpu-memory-utilization", settings.mem_fraction)
    _choice(found, settings, "page_size", "--block-size", "vllm")
    _choice(found, settings, "policy", "--scheduling-policy", "vllm")
    if settings.cache == "none":
        found.add("cache", "--no-enable-prefix-caching")
    if not settings.cuda_graphs:
        found.add("cuda_graphs", "--enforce-eager")
    if loop in ("normal", "overlap"):
        found.add("loop", "--async-scheduling" if loop == "overlap" else "--no-async-scheduling")
        found.said.add("overlap")
    if settings.max_context is not None:
        found.add("max_context", "--max-model-len", settings.max_context)
    return _named(found, settings, loop)


def _sglang(settings: RunSettings, loop: str, kv_tokens: int) -> Deployed:
    found = Deployed("sglang", ["python", "-m", "sglang.launch_server", "--model-path", settings.model])
    together = settings.ep > settings.tp  # attention on each rank, experts over all
    ways = settings.tp * settings.dp if together else settings.tp
    if ways > 1:
        found.add("tp", "--tp-size", ways)
    if settings.pp > 1:
        found.add("pp", "--pp-size", settings.pp)
    if settings.role != "both":
        found.add("role", "--disaggregation-mode", settings.role)
        _instances(found, settings)
    elif settings.dp > 1:
        found.add("dp", "--dp-size", settings.dp, *(["--enable-dp-attention"] if together else []))
    if settings.ep > 1:
        found.add("ep", "--ep-size", settings.ep)
    # Ranks of DP attention share it out among themselves.
    found.add("max_running", "--max-running-requests", settings.max_running * (settings.dp if together else 1))
    if settings.batching == "prefill-first":
        chunk = settings.chunk if settings.chunk is not None else -1
        found.add("chunk", "--chunked-prefill-size", chunk * (settings.dp if together and chunk > 0 else 1))
        found.add("max_prefill_tokens", "--max-prefill-tokens", settings.max_prefill_tokens)
        found.add("mixed_chunk", *(["--enable-mixed-chunk"] if settings.mixed_chunk else []))
        if acts(settings, loop, "conservativeness"):
            # With DP attention SGLang takes a share of what it is told.
            own = load_engine("sglang").shared["conservativeness"] if together else 1.0
            found.add("conservativeness", "--schedule-conservativeness", round(settings.conservativeness / own, 6))
    _dtype(found, settings, "--dtype")
    found.add("kv_tokens", "--max-total-tokens", kv_tokens)
    if settings.kv_tokens is None:
        found.lacks("mem_fraction", "SGLang's counts weights and KV alone; --max-total-tokens says how much KV it left")
    found.add("page_size", "--page-size", settings.page_size)
    _choice(found, settings, "policy", "--schedule-policy", "sglang")
    if settings.cache == "radix" and settings.evict in load_engine("sglang").offers["evict"]:
        found.add("evict", "--radix-eviction-policy", settings.evict)
    if settings.cache == "none":
        found.add("cache", "--disable-radix-cache")
    if not settings.cuda_graphs:
        found.add("cuda_graphs", "--disable-cuda-graph")
    if loop == "normal":
        found.add("loop", "--disable-overlap-schedule")
    if loop in ("normal", "overlap"):
        found.said |= {"loop", "overlap"}
    if settings.max_context is not None:
        found.add("max_context", "--context-length", settings.max_context)
    return _named(found, settings, loop)


def _dtype(found: Deployed, settings: RunSettings, flag: str) -> None:
    """What weights and KV are held in, which both engines say alike."""
    dtype, kv = settings.dtype, settings.kv_dtype
    if dtype in PLAIN:
        found.add("dtype", flag, PLAIN[dtype])
    elif dtype == "fp8":
        found.add("dtype", "--quantization", "fp8")
    elif dtype != "auto":
        found.lacks("dtype", f"{dtype} takes a checkpoint that is in it")
    found.said.add("dtype")
    if kv == "fp8":
        found.add("kv_dtype", "--kv-cache-dtype", "fp8_e4m3")
    elif kv == "auto" or kv == (dtype if dtype in PLAIN else "bf16"):
        found.said.add("kv_dtype")  # as the model, which is what auto means there
    else:
        found.lacks("kv_dtype", f"{kv} beside weights in {dtype}")


def _choice(found: Deployed, settings: RunSettings, name: str, flag: str, engine: str) -> None:
    value, offered = getattr(settings, name), load_engine(engine).offers[name]
    if value in offered:
        found.add(name, flag, value)
    else:
        found.lacks(name, f"{value}; {engine} has {', '.join(map(str, offered))}")


def _named(found: Deployed, settings: RunSettings, loop: str) -> Deployed:
    """Name what is neither said nor what the engine does anyway."""
    preset = load_engine(found.engine).settings
    for name in _of_an_instance():
        value = loop if name == "loop" else getattr(settings, name)
        usual = preset.get(name, SETTINGS[name].default)
        usual = None if usual == 0 and SETTINGS[name].zero_is_none else usual
        if name not in found.said and value != usual and acts(settings, loop, name):
            found.lacks(name, str(value) if value is not None else "none")
    return found


def _of_an_instance() -> Iterable[str]:
    groups = (SCHEDULER, RULES, HARDWARE)
    beside = MODEL_ONLY | LINKS | CLUSTER
    return [name for name, each in SETTINGS.items() if each.group in groups and name not in beside]
