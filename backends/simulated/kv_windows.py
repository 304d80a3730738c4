"""KV tokens that fit in memory where some layers keep less than every token: windows, chunks and recurrent states.

The scheduler has one pool of tokens, of which a request holds one for each of its tokens. Layers that keep fewer are
reserved for beside it, for as many requests as may run at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from backends.checkpoint.layer_kinds import Attention, Mixer
from backends.simulated.catalogue.model_specs import ModelSpec, layer_kv_bytes, layer_state_bytes

STATE_BLOCK = 16
"""Tokens to whose multiple vLLM brings the blocks of attention so that a state fits in one."""


@dataclass(frozen=True)
class KvRule:
    """What is reserved for layers that do not need every token. By default they keep every token, and running requests
    their states."""

    keeps: Literal["all", "needed"] = "all"
    """``needed``: the last tokens of a window for every request that may run, and its states."""
    group_ratio: float | None = None
    """vLLM: layers of a kind are cut in groups of one size, which all take blocks of one pool. The size is that of the
    kind with the fewest layers, or of that with the most where it has less than this many times as many; groups that are
    not full are paid for."""
    window_share: float | None = None
    """SGLang: layers with windows have a pool of their own, of this share of the tokens that the others have."""
    window_models: tuple[str, ...] = ()
    """The types of model for which it does so."""
    state_share: float | None = None
    """SGLang: memory of states, as a share of what is left for KV."""
    states_per_request: int = 1
    """SGLang: states that it counts for each running request: what the prefix cache keeps is beside it."""
    spare_states: int = 0
    """SGLang: states of its pool that no request has."""

    def keeps_windows(self, model: ModelSpec) -> bool:
        """Tell whether layers with a window keep the tokens in it alone."""
        if self.window_share is not None:
            return model.kind in self.window_models
        return self.keeps == "needed" or self.group_ratio is not None


ALL, NEEDED = KvRule(), KvRule("needed")


@dataclass(frozen=True)
class KvRoom:
    """What fits."""

    tokens: int
    reserved_bytes: float
    """Beside the pool of tokens."""
    running: int
    """How many requests may run at a time for their states; half of what is left goes to states where nothing says."""


@dataclass(frozen=True)
class _Kind:
    """Layers that keep the same."""

    layers: int
    token_bytes: float
    state_bytes: float
    window: int | None
    chunked: bool


def kv_room(
    model: ModelSpec,
    rule: KvRule,
    room_bytes: float,
    *,
    kv_dtype: str,
    tp: int,
    pp: int,
    stage: int,
    max_running: int,
    max_context: int,
    step_tokens: int,
    page_size: int,
) -> KvRoom:
    """Find how many tokens fit in ``room_bytes`` of one GPU of a stage.

    ``step_tokens`` is how many prompt tokens a step may compute: until it is done, windows hold them too.
    """
    kinds = _kinds([layer.mixer for layer in model.stage_stack(pp, stage)], kv_dtype, tp)
    if not kinds:
        return KvRoom(_whole(room_bytes, 0.0, max_running * max_context), 0.0, max_running)
    state_bytes = sum(kind.layers * kind.state_bytes for kind in kinds)
    if rule.group_ratio is not None:
        return _in_groups(kinds, rule.group_ratio, room_bytes, max_running, max_context, step_tokens, page_size)
    if rule.state_share is not None and state_bytes:
        share = room_bytes * rule.state_share / (1 + rule.state_share)
        running = max(int(share // state_bytes) - rule.spare_states, 0) // rule.states_per_request
        every = sum(kind.layers * kind.token_bytes for kind in kinds)
        return KvRoom(_whole(room_bytes - share, every, max_running * max_context), share, running)
    if rule.window_share is not None and model.kind in rule.window_models:
        return _in_pools(kinds, rule.window_share, room_bytes, max_running, step_tokens)
    bounded = rule.keeps == "needed"
    every = sum(kind.layers * kind.token_bytes for kind in kinds if not bounded or kind.window is None)
    windows = [(kind.layers * kind.token_bytes, max_running * kind.window) for kind in kinds if bounded and kind.window]
    return _beside(every, windows, state_bytes, room_bytes, max_running, max_context)


def _kinds(mixers: Sequence[Mixer | None], kv_dtype: str, tp: int) -> list[_Kind]:
    found: Counter[tuple[float, float, int | None, bool]] = Counter()
    for mixer in mixers:
        window, chunked = (mixer.window, mixer.chunked) if isinstance(mixer, Attention) else (None, False)
        token_bytes, state_bytes = layer_kv_bytes(mixer, kv_dtype, tp), layer_state_bytes(mixer, tp)
        if token_bytes or state_bytes:
            found[token_bytes, state_bytes, window, chunked] += 1
    return [_Kind(layers, *what) for what, layers in found.items()]


def _beside(
    every: float,
    windows: Sequence[tuple[float, float]],
    state_bytes: float,
    room_bytes: float,
    max_running: int,
    max_context: int,
) -> KvRoom:
    """The most tokens K for which ``every * K``, for each of ``windows`` (bytes a token, most tokens held) its bytes times
    the lesser of K and what it holds, and the states of all running requests fit."""
    reserved = max_running * state_bytes
    # Where there are none, nothing is too many.
    running = max_running if reserved <= room_bytes or not state_bytes else int(max(room_bytes, 0) / 2 // state_bytes)
    slope = every + sum(size for size, _ in windows)
    for size, held in sorted(windows, key=lambda each: each[1]):
        if (room_bytes - reserved) / slope <= held:
            break
        reserved += size * held
        slope -= size
        # What rounding leaves of a slope of nothing is nothing.
        slope = slope if slope > 1e-6 else 0.0
    return KvRoom(_whole(room_bytes - reserved, slope, max_running * max_context), reserved, running)


def _whole(room_bytes: float, token_bytes: float, most: int) -> int:
    """Tokens in so many bytes; all that running requests can have where a token takes none."""
    if not token_bytes:
        return most if room_bytes >= 0 else 0
    return max(int(room_bytes // token_bytes), 0)


def _in_groups(
    kinds: Sequence[_Kind],
    ratio: float,
    room_bytes: float,
    max_running: int,
    max_context: int,
    step_tokens: int,
    page_size: int,
) -> KvRoom:
    """As vLLM: every group of layers takes blocks for the tokens it holds, a group of recurrent layers one a request."""
    fewest, most = min(kind.layers for kind in kinds), max(kind.layers for kind in kinds)
    size = most if most < fewest * ratio else fewest
    if len({(kind.window, kind.chunked, bool(kind.state_bytes)) for kind in kinds}) == 1:
        size = 1  # Layers that hold the same tokens are one group, whatever their sizes.
    # A block holds a state: attention's, in tokens, are made as large as that takes.
    state = max(kind.state_bytes for kind in kinds)
    token = max(kind.token_bytes for kind in kinds)
    block = math.ceil(state / token / STATE_BLOCK) * STATE_BLOCK * token if state and token else state
    every, windows, states = 0.0, [], 0.0
    for kind in kinds:
        layers = math.ceil(kind.layers / size) * size
        if kind.state_bytes:
            states += layers * block
        elif kind.window is None:
            every += layers * kind.token_bytes
        else:
            # Blocks of which all tokens are out of the window go back to the pool, step by step.
            held = _pages(kind.window, page_size) if kind.chunked else _pages(kind.window - 1, page_size) + page_size
            windows.append((layers * kind.token_bytes, float(max_running * held + step_tokens)))
    return _beside(every, windows, states, room_bytes, max_running, max_context)


def _pages(tokens: int, page_size: int) -> int:
    return math.ceil(tokens / page_size) * page_size


def _in_pools(kinds: Sequence[_Kind], share: float, room_bytes: float, max_running: int, step_tokens: int) -> KvRoom:
    """As SGLang: one pool for layers with windows, one for the others, of sizes in a fixed proportion."""
    every = sum(kind.layers * kind.token_bytes for kind in kinds if kind.window is None)
    windowed = sum(kind.layers * kind.token_bytes for kind in kinds if kind.window is not None)
    if not every or not windowed:
        return KvRoom(_whole(room_bytes, every + windowed, 0), 0.0, max_running)
    tokens = _whole(room_bytes, every + share * windowed, 0)
    held = max(kind.window or 0 for kind in kinds) * max_running + step_tokens
    # Requests that are no longer than the window have all their tokens in both pools.
    usable = tokens if held <= share * tokens else int(share * tokens)
    return KvRoom(usable, share * tokens * windowed, max_running)
