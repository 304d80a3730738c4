"""Everything that can be set about the scheduler, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Batching = Literal["prefill-first", "mixed"]
CacheKind = Literal["radix", "none"]
Eviction = Literal["lru", "lfu", "fifo"]


CHANGEABLE: dict[str, tuple[type, ...]] = {
    "chunk": (int, type(None)), "chunk_depth": (int, type(None)), "conservativeness": (int, float),
    "max_batch_tokens": (int,), "max_passed_over": (int, type(None)), "max_prefill_streak": (int, type(None)),
    "max_prefill_tokens": (int,), "max_running": (int,), "mixed_chunk": (bool,), "policy": (str,),
    "preempt_threshold": (int, type(None)), "share_in_batch_tokens": (int, type(None)),
}  # fmt: skip
"""Settings of :class:`SchedulerConfig` that a running scheduler takes, and their types: those that no memory is laid out for
and no request in the queue depends on."""


class ConfigError(ValueError):
    """A setting that cannot work, in one line that names it."""


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
    chunk: int | None = 8192
    """Most prompt tokens of one prefill batch (prefill-first); None computes prompts whole."""
    chunk_depth: int | None = None
    """Ours: the prefix, in tokens, after which a chunk is half as long as at the start of a prompt: attention to what
    came before then takes what fewer tokens save, so that chunks take the same time and pipeline stages stay even."""
    max_prefill_tokens: int = 16384
    """Prompt tokens after which a prefill batch takes no further request (prefill-first)."""
    mixed_chunk: bool = False
    """Prefill-first: running decodes join the prefill batch as rows of one token."""
    max_batch_tokens: int = 2048
    """Token budget of one step (mixed batching)."""
    cache: CacheKind = "radix"
    evict: Eviction = "lru"
    policy: str = "fcfs"
    """Order of the waiting queue: a name of ``policy.POLICIES`` or ``module:Class``."""
    preempt_threshold: int | None = None
    """Priority policy: a waiting request may take the KV of running ones whose priority is lower by at least this."""
    conservativeness: float = 1.0
    """Scales the share of their output bound that running requests are expected to use."""
    max_passed_over: int | None = 64
    """Ours: after this many prefill batches that admitted a later arrival instead, a request goes first."""
    max_prefill_streak: int | None = None
    """Ours: prefill batches in a row while decodes wait, after which a decode batch must run (prefill-first)."""
    share_in_batch_tokens: int | None = 32
    """Put a request off by one batch when at least this much of its prompt is being computed in this one."""
    queue_timeout_s: float | None = None
    """Abort a request that was not scheduled within this time of its arrival."""
    request_timeout_s: float | None = None
    """Abort a request that has not finished within this time of its arrival."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "max_context", "page_size", "max_running", "slots", "max_prefill_tokens",
                     "max_batch_tokens"):  # fmt: skip
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
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: {value} is not positive")
        if not self.conservativeness > 0:
            raise ConfigError(f"conservativeness: {self.conservativeness} is not positive")
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
        if self.preempt_threshold is not None and self.policy != "priority":
            raise ConfigError("preempt_threshold: needs policy 'priority'")

    def chunk_at(self, depth: int, most: int) -> int:
        """How much of a chunk of ``most`` tokens is computed after a prefix of ``depth``: a page of it at least."""
        if self.chunk_depth is None:
            return most
        return max(most * self.chunk_depth // (self.chunk_depth + depth), min(most, self.page_size))

    def changed(self, settings: Mapping[str, object], first: SchedulerConfig) -> SchedulerConfig:
        """This configuration with other values of :data:`CHANGEABLE`. ``first`` is what memory was laid out for.

        Raises :class:`ConfigError` for anything else, and for what does not fit that memory.
        """
        for name, value in settings.items():
            if name not in CHANGEABLE:
                raise ConfigError(f"{name}: cannot be changed while the scheduler runs; {', '.join(CHANGEABLE)} can")
            if not isinstance(value, CHANGEABLE[name]) or (isinstance(value, bool) and bool not in CHANGEABLE[name]):
                wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in CHANGEABLE[name])
                raise ConfigError(f"{name}: {value!r} is not {wanted}")
        found = replace(self, **settings)  # type: ignore[arg-type]
        if found.max_running > first.max_running:
            raise ConfigError(
                f"max_running: {found.max_running} is more than the {first.max_running} it was started with"
            )
        if found.largest_step > first.largest_step:
            raise ConfigError(
                f"a step of {found.largest_step} prompt tokens is more than the {first.largest_step} it was started with"
            )
        return found

    @property
    def largest_step(self) -> int:
        """Most prompt tokens a step may compute: what activations are sized for."""
        if self.batching == "mixed":
            return self.max_batch_tokens
        return self.chunk or self.max_prefill_tokens

    @property
    def max_running_per_slot(self) -> int:
        return max(self.max_running // self.slots, 1)

    @property
    def pages(self) -> int:
        """Pages of the KV pool."""
        return self.kv_tokens // self.page_size


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}: {value} is less than {least}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
