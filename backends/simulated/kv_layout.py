"""Bytes of KV that go from one instance to another, by model, dtype and how both lay it out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from backends.checkpoint.layer_kinds import Attention, Latent
from backends.simulated.catalogue.model_specs import ModelSpec, layer_kv_bytes, layer_state_bytes


@dataclass(frozen=True)
class KVOnTheWire:
    """What a request's KV is when it is sent to instances of one layout.

    KV heads are split over the GPUs of an instance, and each head goes to every GPU that holds it: to several, where the
    receiver has more GPUs than there are heads. A latent is the same on all GPUs, and is sent once.
    """

    token_bytes: float
    """Of layers that keep every token."""
    window_bytes: tuple[tuple[int, float], ...]
    """(window in tokens, bytes a token) of layers that keep the last tokens alone."""
    state_bytes: float
    """Of recurrent layers, a request."""

    def pages_bytes(self, pages: int, page_size: int) -> float:
        """Return the bytes of so many pages; one that is partly filled is sent whole."""
        return pages * page_size * self.token_bytes

    def rest_bytes(self, tokens: int) -> float:
        """Return what goes with the last pages of a request of so many tokens: windows and states."""
        return self.state_bytes + sum(min(tokens, window) * each for window, each in self.window_bytes)


@cache
def kv_between(model: ModelSpec, kv_dtype: str, target_tp: int, keeps_windows: bool) -> KVOnTheWire:
    """The KV of a model for instances of ``target_tp`` GPUs a stage. ``keeps_windows``: layers with a window keep
    what is in it alone, else all."""
    token_bytes, states = 0.0, 0.0
    windows: dict[int, float] = {}
    for layer in model.stack:
        mixer = layer.mixer
        copies = max(target_tp / mixer.kv_heads, 1) if isinstance(mixer, Attention) else 1
        of_token = layer_kv_bytes(mixer, kv_dtype, 1) * copies
        window = mixer.window if isinstance(mixer, Attention | Latent) else None
        if window is None or not keeps_windows:
            token_bytes += of_token
        else:
            windows[window] = windows.get(window, 0.0) + of_token
        states += layer_state_bytes(mixer, 1)
    return KVOnTheWire(token_bytes, tuple(windows.items()), states)


def lanes(model: ModelSpec, tp: int, pp: int) -> int:
    """Count the GPUs of an instance that hold different parts of a request's KV, each with a link of its own."""
    heads = [min(tp, each.mixer.kv_heads) for each in model.stack if isinstance(each.mixer, Attention)]
    return pp * max(heads, default=1)
