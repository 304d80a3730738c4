"""Rules in which engines differ where this project's own way is one of several: settings, each with a name and a meaning.

A preset of an engine (``workbench/settings/engines.toml``) is these rules together, so that it decides as the engine does,
batch by batch (``workbench/parity``). No code asks which engine it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workbench.scheduler.settings import RULES, setting


def caches(settings: Any, loop: str) -> bool:
    """Tell whether there is a prefix cache."""
    return bool(settings.cache != "none")


PREFIX_CACHE = "a prefix cache"


@dataclass(frozen=True, kw_only=True)
class EngineRules:
    """Rules of an engine, of which the defaults are this project's own way. Lengths are tokens."""

    share_in_batch_tokens: int | None = setting(
        32,
        least=1,
        zero_is_none=True,
        live=True,
        group=RULES,
        help="Put a request off by one batch when at least this much of its prompt is being computed in this one; 0: never. "
        "Default {default}.",
        needs=PREFIX_CACHE,
        acts=caches,
    )
    """Ours and SGLang's for policies that go by the prefix cache: what is computed once need not be computed twice."""
    reserved_pages: int = setting(
        0,
        least=0,
        group=RULES,
        help="KV pages that the engine keeps for itself. Default {default}.",
    )
    """vLLM's null block."""
