"""Who an instance is, as its peers have to know before any KV passes between them."""

from __future__ import annotations

import msgspec

VERSION = 1
"""Of what peers say to each other."""

SAID = {
    "version": "the protocol",
    "role": "the role",
    "page_size": "page_size",
    "kv_dtype": "kv_dtype",
    "layers": "the number of layers",
    "kv_heads": "the number of KV heads",
    "head_dim": "the size of a head",
    "model": "the model",
    "weights": "the weights",
}
"""What has to agree, what says most first, and how it is called."""


class Identity(msgspec.Struct, frozen=True):
    """What has to agree, and what it is called by."""

    version: int
    role: str
    """Has to be the other one of prefill and decode."""
    address: str
    """``host:port`` at which it takes its peers' connections: its name among them."""
    instance_id: str
    model: str
    """A hash of its configuration."""
    weights: str
    """A hash of samples of them."""
    page_size: int
    kv_dtype: str
    layers: int
    kv_heads: int
    head_dim: int

    def fault(self, other: Identity) -> str | None:
        """Return why no KV can pass to or from another, in one line, as this one says it; None where it can."""
        for name, said in SAID.items():
            own, others = getattr(self, name), getattr(other, name)
            if name == "role":
                if {own, others} != {"prefill", "decode"}:
                    return f"the role is {others} there and {own} here; KV goes from prefill to decode"
            elif own != others:
                if name in ("model", "weights"):
                    return f"{said} there and here differ; KV means something to the same ones alone"
                return f"{said} is {others} there and {own} here"
        return None
