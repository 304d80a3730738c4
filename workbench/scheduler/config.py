"""Everything that can be set about the scheduler, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

from workbench.scheduler.handover_settings import HandoverSettings
from workbench.scheduler.rules import (
    MIXED,
    PREFILL_FIRST,
    RADIX_CACHE,
    EngineRules,
    mixed,
    prefill_first,
    radix,
)
from workbench.scheduler.settings import RUN, check_settings, setting, settings_of
from workbench.scheduler.settings import ConfigError as ConfigError

Batching = Literal["prefill-first", "mixed"]
Role = Literal["both", "prefill", "decode"]
"""What an instance may be there for: whole requests, their prompts, or what follows them."""
CacheKind = Literal["radix", "blocks", "none"]
Eviction = Literal["lru", "lfu", "fifo"]

DEFAULT_MAX_NEW_TOKENS = 4096
"""The output bound where nobody says one."""
MOST_PAGES = 2**31 - 1
"""What the numbers of KV pages reach to: they are int32."""
PREFIX_POLICIES = ("lpm", "dfs-weight")
"""Policies that go by the prefix cache alone: without one they are fcfs."""


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """Seed for whoever draws at random. Raises :class:`ConfigError` when a setting is out of bounds."""

    seed: int = setting(0, group=RUN, help="Seed of everything random. Default {default}.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)  # only what inherits it is ever made
class SchedulerSettings(EngineRules, HandoverSettings, Seeded):
    """Settings of the scheduler, each declared here and nowhere else. Lengths are tokens.

    A field that is added is a flag of every command that schedules, a name in settings files, records and sweeps, and, if it
    is ``live``, in ``POST /settings``. Raises :class:`ConfigError` when a value is out of bounds.
    """

    batching: Batching = setting("prefill-first", help="{choices}. Default {default}.")
    policy: str = setting(
        "fcfs",
        live=True,
        help="fcfs | lpm | dfs-weight | lof | sjf | edf | random | priority | module:Class. Default {default}.",
    )
    """Order of the waiting queue: a name of ``policy.POLICIES`` or ``module:Class``."""
    page_size: int = setting(1, least=1, help="Tokens a KV page. Default {default}.")
    cache: CacheKind = setting("radix", help="Prefix cache: {choices}. Default {default}.")
    evict: Eviction = setting("lru", help="{choices}. Default {default}.", needs=RADIX_CACHE, acts=radix)
    chunk: int | None = setting(
        8192,
        least=1,
        zero_is_none=True,
        live=True,
        help="Prompt tokens of a prefill batch; 0: prompts whole. Default {default}; a real model on a CPU: 512.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    """Most prompt tokens of one prefill batch (prefill-first); None computes prompts whole."""
    chunk_depth: int | None = setting(
        None,
        least=1,
        live=True,
        help="Prefix after which a chunk is half as long, so that deep chunks take no longer. Default: all alike.",
    )
    """Ours: the prefix, in tokens, after which a chunk is half as long as at the start of a prompt: attention to what
    came before then takes what fewer tokens save, so that chunks take the same time and pipeline stages stay even."""
    max_prefill_tokens: int = setting(
        16384,
        least=1,
        live=True,
        help="Prompt tokens after which a prefill batch takes no further request. Default {default}.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    max_batch_tokens: int = setting(
        2048,
        least=1,
        live=True,
        help="Token budget of a step (mixed). Default {default}; a real model on a CPU: 512.",
        needs=MIXED,
        acts=mixed,
    )
    max_running: int = setting(256, least=1, live=True, help="Requests running at a time. Default {default}.")
    """Requests that may hold KV at a time, over all slots."""
    mixed_chunk: bool = setting(
        False,
        live=True,
        help="Decodes join prefill batches (prefill-first).",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    """Prefill-first: running decodes join the prefill batch as rows of one token."""
    preempt_threshold: int | None = setting(
        None,
        least=1,
        live=True,
        help="Priority difference that preempts (policy priority, prefill-first). Default: none does.",
        needs="policy 'priority' and prefill-first batching",
        acts=lambda s, loop: s.policy == "priority" and s.batching == "prefill-first",
    )
    """Priority policy, prefill-first: a waiting request may take the KV of running ones whose priority is lower by at least
    this."""
    conservativeness: float = setting(
        1.0,
        above=0,
        live=True,
        help="Scales the expected output share. Default {default}.",
        needs=f"{PREFILL_FIRST} and reserve 'estimate'",
        acts=lambda s, loop: s.batching == "prefill-first" and s.reserve == "estimate",
    )
    """Scales the share of their output bound that running requests are expected to use."""
    max_passed_over: int | None = setting(
        64,
        least=1,
        zero_is_none=True,
        live=True,
        help="Aging bound, in prefill batches; 0: none. Default {default}.",
        needs="a prefix cache, or a policy that is not fcfs without one",
        acts=lambda s, loop: s.cache != "none" or s.policy not in {"fcfs", *PREFIX_POLICIES},
    )
    """Ours: after this many prefill batches that admitted a later arrival instead, a request goes first."""
    max_prefill_streak: int | None = setting(
        None,
        least=1,
        live=True,
        help="Prefills in a row while decodes wait. Default: no bound.",
        needs=PREFILL_FIRST,
        acts=prefill_first,
    )
    """Ours: prefill batches in a row while decodes wait, after which a decode batch must run (prefill-first)."""
    queue_timeout: float | None = setting(None, above=0, help="Seconds a request may wait unscheduled.")
    """Abort a request that was not scheduled within this time, in seconds, of its arrival."""
    request_timeout: float | None = setting(None, above=0, help="Seconds a request may take.")
    """Abort a request that has not finished within this time, in seconds, of its arrival."""

    def running_per_slot(self, slots: int) -> int:
        """Requests that may run in one of several slots."""
        return max(self.max_running // slots, 1)

    def table_rows(self, slots: int) -> int:
        """Rows of the table of requests. One that a batch in flight reads is nobody else's: where its request has given up
        its claim to it (``give_back``), who comes gets one of as many more."""
        return self.running_per_slot(slots) * slots * (1 if self.give_back == "landed" else 2)

    def rows_of(self, role: Role, slots: int) -> int:
        """Rows of the table of requests of an instance of a role: on one that decodes alone, also for those whose KV is on
        its way."""
        spare = 0
        if role == "decode":
            spare = min(2 * self.max_running, 64) if self.spare_rows is None else self.spare_rows
        return self.table_rows(slots) + spare

    def scheduler(self, kv_tokens: int, max_context: int, slots: int) -> SchedulerConfig:
        """The configuration of a scheduler with these settings, for a KV pool of that many tokens. Raises ConfigError."""
        own = {declared.name: getattr(self, declared.name) for declared in fields(SchedulerSettings)}
        return SchedulerConfig(kv_tokens, min(max_context, kv_tokens + 1), slots, **own)


@dataclass(frozen=True)
class SchedulerConfig(SchedulerSettings):
    """Settings of one scheduler, and what there is room for. Lengths are tokens.

    Raises :class:`ConfigError` when a value is out of bounds or two settings contradict each other.
    """

    kv_tokens: int
    """Capacity of the KV pool; whole pages of it are used."""
    max_context: int
    """Longest sequence, prompt and output together."""
    slots: int = 1
    """Micro-batches that take turns (pipeline parallelism); each has its own running set."""
    draft_tokens: int = 0
    """Tokens drafted for each running request and verified in one step, which brings from 1 token to one more than these.
    0: plain decoding."""
    role: Role = "both"
    """What the scheduler is there for (:meth:`for_role`)."""

    def for_role(self, role: Role) -> SchedulerConfig:
        """This configuration for a scheduler of a role, without what works only where requests are served whole. Raises
        ConfigError."""
        if role == "both":
            return self
        if role == "prefill":
            # Nothing decodes. Prompts are shared batch by batch, in their order: whoever is given pages that the prefix
            # cache had already has them of a batch that was computed before its own, so that they can be sent.
            return replace(
                self,
                role=role,
                stops_known="launch",
                leaves="ended",
                share_prompts="launch",
                share_chunks=True,
                mixed_chunk=False,
                request_timeout=None,
            )
        cache = self.cache if self.decode_cache else "none"
        return replace(self, role=role, cache=cache, leaves="ended", mixed_chunk=False, queue_timeout=None)

    @property
    def room(self) -> Literal["max_context", "kv_tokens"]:
        """Bound on the length of a sequence: the context, or a KV pool that holds less."""
        return "kv_tokens" if self.max_context > self.kv_tokens else "max_context"

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "max_context", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is less than 1")
        if self.draft_tokens and self.role != "both":
            raise ConfigError(f"draft_tokens: instances of role {self.role} do not draft yet")
        if self.draft_tokens < 0:
            raise ConfigError(f"draft_tokens: {self.draft_tokens} is less than 0")
        super().__post_init__()
        step_tokens = self.max_running_per_slot * (1 + self.draft_tokens)
        each = f"{1 + self.draft_tokens} tokens" if self.draft_tokens else "a token"
        if self.pages < 1:
            kept = f" beside {self.reserved_pages} of the engine's own" if self.reserved_pages else ""
            raise ConfigError(f"kv_tokens: {self.kv_tokens} holds no page of {self.page_size} tokens{kept}")
        if self.pages > MOST_PAGES:
            raise ConfigError(f"kv_tokens: {self.kv_tokens} are more than {MOST_PAGES} pages")
        if self.batching == "prefill-first" and self.chunk is not None and self.chunk < self.chunk_unit:
            raise ConfigError(f"chunk: {self.chunk} is smaller than a page of {self.page_size} tokens")
        if self.batching == "mixed" and self.max_batch_tokens < step_tokens:
            raise ConfigError(
                f"max_batch_tokens: {self.max_batch_tokens} cannot give each of {self.max_running_per_slot} running "
                f"requests {each}; raise it or lower max_running"
            )
        if self.batching == "mixed" and self.max_batch_tokens < self.page_size:
            raise ConfigError(f"max_batch_tokens: {self.max_batch_tokens} is smaller than a page of {self.page_size}")
        if self.chunk_depth is not None and self.batching == "prefill-first" and self.chunk is None:
            raise ConfigError("chunk_depth: needs a chunk size")
        if self.mixed_chunk and (self.batching == "mixed" or self.chunk is None):
            raise ConfigError("mixed_chunk: needs prefill-first batching with a chunk size")
        if self.mixed_chunk and self.chunk is not None and self.chunk < step_tokens + self.page_size:
            raise ConfigError(
                f"chunk: {self.chunk} leaves no room for a prompt beside {self.max_running_per_slot} decodes (mixed_chunk)"
            )
        if self.preempt_threshold is not None:
            refuse_idle(self, "", ["preempt_threshold"])
        if self.cache == "blocks":
            if self.policy == "dfs-weight":
                raise ConfigError("policy: dfs-weight goes by a tree of prefixes; it needs cache radix, not blocks")
            if self.preempt_threshold is not None:
                raise ConfigError("preempt_threshold: needs cache radix or none, not blocks")

    def chunk_at(self, depth: int, most: int) -> int:
        """Return how much of a chunk of ``most`` tokens is computed after a prefix of ``depth``: a page of it at least."""
        if self.chunk_depth is None:
            return most
        return max(most * self.chunk_depth // (self.chunk_depth + depth), min(most, self.page_size))

    def changed(self, settings: Mapping[str, object], first: SchedulerConfig) -> SchedulerConfig:
        """This configuration with other values of :data:`CHANGEABLE`. ``first`` is what memory was laid out for.

        Raises :class:`ConfigError` for anything else, and for what does not fit that memory.
        """
        declared = settings_of(SchedulerConfig)
        for name, value in settings.items():
            if name not in CHANGEABLE:
                raise ConfigError(f"{name}: cannot be changed while the scheduler runs; {', '.join(CHANGEABLE)} can")
            if not declared[name].fits(value):
                raise ConfigError(f"{name}: {value!r} is not {declared[name].type_name}")
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
        return self.running_per_slot(self.slots)

    @property
    def rows(self) -> int:
        """Rows of the table of requests."""
        return self.rows_of(self.role, self.slots)

    @property
    def lingers(self) -> bool:
        """Who has ended takes a place until the next decode."""
        return self.leaves == "decode" and self.batching == "prefill-first"

    @property
    def evicts_ahead(self) -> bool:
        """More is freed than a step takes: a page a row. Where a page holds one token, a decode takes that many anyway."""
        return self.evict_for == "batch-ahead" and self.page_size > 1 and self.batching == "prefill-first"

    @property
    def overrun(self) -> int:
        """Steps that a request is launched for after its last one. Where steps bring runs of tokens, none goes too far."""
        return int(self.stops_known == "result" and not self.draft_tokens)

    @property
    def chunk_unit(self) -> int:
        """Tokens of which a chunk that is not the last of its prompt has a multiple."""
        return 1 if self.chunk_cut == "tokens" and self.charge == "tokens" else self.page_size

    @property
    def pages(self) -> int:
        """Pages of the KV pool that requests may have."""
        return self.kv_tokens // self.page_size - self.reserved_pages


CHANGEABLE = tuple(sorted(name for name, declared in settings_of(SchedulerConfig).items() if declared.live))
"""Settings that a running scheduler takes."""


class Budgets(Protocol):
    """Settings that bound a step."""

    @property
    def role(self) -> Role: ...
    @property
    def batching(self) -> str: ...
    @property
    def max_running(self) -> int: ...
    @property
    def chunk(self) -> int | None: ...
    @property
    def max_prefill_tokens(self) -> int: ...
    @property
    def max_batch_tokens(self) -> int: ...


def largest_step(settings: Budgets) -> int:
    """Most tokens a step may compute: what activations are sized for. Where nothing is prefilled, chunks do not count."""
    if settings.batching == "mixed":
        return settings.max_batch_tokens
    if settings.role == "decode":
        return settings.max_running
    return settings.chunk or settings.max_prefill_tokens


def refuse_idle(settings: SchedulerConfig, loop: str, names: Iterable[str]) -> None:
    """Raise :class:`ConfigError` for the first of these settings that would have no effect."""
    for name in names:
        declared = settings_of(SchedulerConfig)[name]
        if not declared.acts(settings, loop):
            raise ConfigError(f"{name}: has no effect here: it needs {declared.needs}")
