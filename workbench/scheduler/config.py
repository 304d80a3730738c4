"""Everything that can be set about the scheduler, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

Batching = Literal["prefill-first", "mixed"]
CacheKind = Literal["radix", "none"]
Eviction = Literal["lru", "lfu", "fifo"]


CHANGEABLE = (
    "chunk",
    "chunk_depth",
    "conservativeness",
    "max_batch_tokens",
    "max_passed_over",
    "max_prefill_streak",
    "max_prefill_tokens",
    "max_running",
    "mixed_chunk",
    "policy",
    "preempt_threshold",
    "share_in_batch_tokens",
)
"""Settings of :class:`SchedulerConfig` that a running scheduler takes: no memory is laid out for them, and no request in the
queue depends on them."""


PREFIX_POLICIES = ("lpm", "dfs-weight")
"""Policies that go by the prefix cache alone: without one they are fcfs."""


class ConfigError(ValueError):
    """A setting that cannot work, in one line that names it."""


def acts_with(needs: str, default: Any, acts: Callable[[Any, str], bool]) -> Any:
    """A setting with a default that does nothing unless ``acts(settings, loop)``: ``needs`` says what it takes."""
    return field(default=default, metadata={"needs": needs, "acts": acts})


def _prefill_first(settings: Any, loop: str) -> bool:
    return bool(settings.batching == "prefill-first")


def _caches(settings: Any, loop: str) -> bool:
    return bool(settings.cache != "none")


PREFILL_FIRST = "prefill-first batching"
PREFIX_CACHE = "a prefix cache"


@dataclass(frozen=True)
class SchedulerConfig:
    """Settings of one scheduler. Lengths are tokens.

    Raises :class:`ConfigError` when a value is out of range or two settings contradict each other.
    """

    kv_tokens: int
    """Capacity of the KV pool; whole pages of it are used."""
    max_context: int
    """Longest sequence, prompt and output together."""
    page_size: int = 1
    max_running: int = 256
    """Requests that may hold KV at a time, over all slots."""
    slots: int = 1
    """Micro-batches that take turns (pipeline parallelism); each has its own running set."""
    batching: Batching = "prefill-first"
    chunk: int | None = acts_with(PREFILL_FIRST, 8192, _prefill_first)
    """Most prompt tokens of one prefill batch (prefill-first); None computes prompts whole."""
    chunk_depth: int | None = None
    """Ours: the prefix, in tokens, after which a chunk is half as long as at the start of a prompt: attention to what
    came before then takes what fewer tokens save, so that chunks take the same time and pipeline stages stay even."""
    max_prefill_tokens: int = acts_with(PREFILL_FIRST, 16384, _prefill_first)
    """Prompt tokens after which a prefill batch takes no further request (prefill-first)."""
    mixed_chunk: bool = acts_with(PREFILL_FIRST, False, _prefill_first)
    """Prefill-first: running decodes join the prefill batch as rows of one token."""
    max_batch_tokens: int = acts_with("mixed batching", 2048, lambda s, loop: s.batching == "mixed")
    """Token budget of one step (mixed batching)."""
    cache: CacheKind = "radix"
    evict: Eviction = acts_with(PREFIX_CACHE, "lru", _caches)
    policy: str = "fcfs"
    """Order of the waiting queue: a name of ``policy.POLICIES`` or ``module:Class``."""
    preempt_threshold: int | None = acts_with(
        "policy 'priority' and prefill-first batching",
        None,
        lambda s, loop: s.policy == "priority" and s.batching == "prefill-first",
    )
    """Priority policy, prefill-first: a waiting request may take the KV of running ones whose priority is lower by at least
    this."""
    conservativeness: float = acts_with(PREFILL_FIRST, 1.0, _prefill_first)
    """Scales the share of their output bound that running requests are expected to use."""
    max_passed_over: int | None = acts_with(
        "a prefix cache, or a policy that is not fcfs without one",
        64,
        lambda s, loop: s.cache != "none" or s.policy not in {"fcfs", *PREFIX_POLICIES},
    )
    """Ours: after this many prefill batches that admitted a later arrival instead, a request goes first."""
    max_prefill_streak: int | None = acts_with(PREFILL_FIRST, None, _prefill_first)
    """Ours: prefill batches in a row while decodes wait, after which a decode batch must run (prefill-first)."""
    share_in_batch_tokens: int | None = acts_with(PREFIX_CACHE, 32, _caches)
    """Put a request off by one batch when at least this much of its prompt is being computed in this one."""
    queue_timeout_s: float | None = None
    """Abort a request that was not scheduled within this time of its arrival."""
    request_timeout_s: float | None = None
    """Abort a request that has not finished within this time of its arrival."""
    seed: int = 0

    @property
    def room(self) -> Literal["max_context", "kv_tokens"]:
        """What bounds the length of a sequence: the context, or a KV pool that holds less."""
        return "kv_tokens" if self.max_context > self.kv_tokens else "max_context"

    def __post_init__(self) -> None:
        for name in (
            "kv_tokens",
            "max_context",
            "page_size",
            "max_running",
            "slots",
            "max_prefill_tokens",
            "max_batch_tokens",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in (
            "chunk",
            "chunk_depth",
            "max_passed_over",
            "max_prefill_streak",
            "share_in_batch_tokens",
            "preempt_threshold",
        ):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("queue_timeout_s", "request_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}: {value} is not positive and finite")
        if not 0 < self.conservativeness < float("inf"):
            raise ConfigError(f"conservativeness: {self.conservativeness} is not positive and finite")
        _one_of("batching", self.batching, ("prefill-first", "mixed"))
        _one_of("cache", self.cache, ("radix", "none"))
        _one_of("evict", self.evict, ("lru", "lfu", "fifo"))
        if self.kv_tokens < self.page_size:
            raise ConfigError(f"kv_tokens: {self.kv_tokens} holds no page of {self.page_size} tokens")
        if self.batching == "prefill-first" and self.chunk is not None and self.chunk < self.page_size:
            raise ConfigError(f"chunk: {self.chunk} is smaller than a page of {self.page_size} tokens")
        if self.batching == "mixed" and self.max_batch_tokens < self.max_running_per_slot:
            raise ConfigError(
                f"max_batch_tokens: {self.max_batch_tokens} cannot give each of {self.max_running_per_slot} running "
                "requests a token; raise it or lower max_running"
            )
        if self.batching == "mixed" and self.max_batch_tokens < self.page_size:
            raise ConfigError(f"max_batch_tokens: {self.max_batch_tokens} is smaller than a page of {self.page_size}")
        if self.chunk_depth is not None and self.batching == "prefill-first" and self.chunk is None:
            raise ConfigError("chunk_depth: needs a chunk size")
        if self.mixed_chunk and (self.batching == "mixed" or self.chunk is None):
            raise ConfigError("mixed_chunk: needs prefill-first batching with a chunk size")
        if self.mixed_chunk and self.chunk is not None and self.chunk < self.max_running_per_slot + self.page_size:
            raise ConfigError(
                f"chunk: {self.chunk} leaves no room for a prompt beside {self.max_running_per_slot} decodes (mixed_chunk)"
            )
        if self.preempt_threshold is not None:
            refuse_idle(self, "", ["preempt_threshold"])

    def chunk_at(self, depth: int, most: int) -> int:
        """How much of a chunk of ``most`` tokens is computed after a prefix of ``depth``: a page of it at least."""
        if self.chunk_depth is None:
            return most
        return max(most * self.chunk_depth // (self.chunk_depth + depth), min(most, self.page_size))

    def changed(self, settings: Mapping[str, object], first: SchedulerConfig) -> SchedulerConfig:
        """This configuration with other values of :data:`CHANGEABLE`. ``first`` is what memory was laid out for.

        Raises :class:`ConfigError` for anything else, and for what does not fit that memory.
        """
        annotations = {field.name: str(field.type) for field in fields(self)}
        for name, value in settings.items():
            if name not in CHANGEABLE:
                raise ConfigError(f"{name}: cannot be changed while the scheduler runs; {', '.join(CHANGEABLE)} can")
            if not fits(value, annotations[name]):
                raise ConfigError(f"{name}: {value!r} is not {annotations[name].replace('| None', 'or null')}")
        found = replace(self, **settings)  # type: ignore[arg-type]
        # Who posts back what the state said changes nothing by what is idle.
        refuse_idle(found, "", [name for name in settings if getattr(found, name) != getattr(self, name)])
        if found.max_running > first.max_running:
            raise ConfigError(
                f"max_running: {found.max_running} is more than the {first.max_running} it was started with"
            )
        step, first_step = largest_step(found), largest_step(first)
        if step > first_step:
            raise ConfigError(f"a step of {step} prompt tokens is more than the {first_step} it was started with")
        return found

    @property
    def max_running_per_slot(self) -> int:
        return max(self.max_running // self.slots, 1)

    @property
    def pages(self) -> int:
        """Pages of the KV pool."""
        return self.kv_tokens // self.page_size


class Budgets(Protocol):
    """Settings that bound a step."""

    @property
    def batching(self) -> str: ...
    @property
    def chunk(self) -> int | None: ...
    @property
    def max_prefill_tokens(self) -> int: ...
    @property
    def max_batch_tokens(self) -> int: ...


def largest_step(settings: Budgets) -> int:
    """Most prompt tokens a step may compute: what activations are sized for."""
    if settings.batching == "mixed":
        return settings.max_batch_tokens
    return settings.chunk or settings.max_prefill_tokens


def fits(value: Any, annotation: str) -> bool:
    """Whether a value is of a setting's type, as its dataclass writes it: ``float`` or ``int | None``, for example."""
    if value is None:
        return annotation.endswith("| None")
    kind = annotation.replace(" | None", "")
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    return isinstance(value, allowed[kind]) and (kind == "bool" or not isinstance(value, bool))


def needs_of(kind: type, name: str) -> tuple[str, Callable[[Any, str], bool]] | None:
    """What a setting of a dataclass takes to have an effect, in words and as a check; None: it always has one."""
    declared = kind.__dataclass_fields__.get(name)  # type: ignore[attr-defined]
    if declared is None or "acts" not in declared.metadata:
        return None
    return declared.metadata["needs"], declared.metadata["acts"]


def refuse_idle(settings: SchedulerConfig, loop: str, names: Iterable[str]) -> None:
    """Raise :class:`ConfigError` for the first of these settings that would have no effect."""
    for name in names:
        found = needs_of(SchedulerConfig, name)
        if found is not None and not found[1](settings, loop):
            raise ConfigError(f"{name}: has no effect here: it needs {found[0]}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}: {value} is less than {least}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
