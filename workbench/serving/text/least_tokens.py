"""Lower bounds on the tokens of a text, without encoding all of it.

Every piece that a tokenizer cuts a text into is a token of its vocabulary. Give each byte (or character) a weight so that no
token weighs more than 1: then a text has at least as many tokens as it weighs. The weight of a byte is 1 over the length of
the longest token that it occurs in, which satisfies that, and counting bytes takes some ten milliseconds a megabyte where
encoding takes a third of a second. What a tokenizer may drop, or swallow whole, weighs nothing.

That is a tenth of the tokens of ordinary text. So the stretches of a long text are then cut one by one into as few tokens of
the vocabulary as can be, which is hardly less than what they get, until there are too many.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, cast

import numpy as np

_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"})
"""Pre-tokenizers that drop nothing; Split and Punctuation unless they are told to."""
_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_CHARACTERS = 0x110000
_STRETCH_BYTES = 1 << 16
_CUT_FROM = 8
"""Bytes a token from which on a text is cut, since it hardly fits: below, encoding it costs no more than that."""
_ROUNDING = 1.0 - 1e-9
"""Sums of weights may come out a little too large."""


LeastTokens = Callable[[str, int], int]
"""From a text and a number that is too many already to one that the text's tokens are never fewer than."""


def least_tokens_of(serialised: str, byte_level_alphabet: list[str]) -> LeastTokens:
    """Return the bound for a ``tokenizer.json``; it is 0 where nothing can be said. ``byte_level_alphabet``: the character
    for each byte in a byte-level vocabulary."""
    spec: dict[str, Any] = json.loads(serialised)
    model: dict[str, Any] = spec["model"]
    steps, forms = _steps(spec.get("pre_tokenizer"), "pretokenizers"), _steps(spec.get("normalizer"), "normalizers")
    replaced = _replaced(steps, forms)
    if model.get("type") not in ("BPE", "Unigram") or replaced is None:
        return lambda text, enough: 0
    vocabulary = [token for token, *_ in model["vocab"]] if model["type"] == "Unigram" else list(model["vocab"])
    added = [token["content"] for token in spec.get("added_tokens", ())]
    stripping = any(token["lstrip"] or token["rstrip"] for token in spec.get("added_tokens", ()))
    if any(step["type"] == "ByteLevel" for step in steps):
        weights = _byte_weights(vocabulary, added, byte_level_alphabet)
    else:
        fallback = bool(model.get("byte_fallback")) and {f"<0x{i:02X}>" for i in range(256)} <= set(vocabulary)
        weights = _character_weights(vocabulary, added, replaced, fallback)
    normal_forms = [
        cast(Literal["NFC", "NFD", "NFKC", "NFKD"], step["type"]) for step in forms if step["type"] in _FORMS
    ]

    @cache
    def cutter() -> _Cutter:
        return _Cutter(vocabulary, added, byte_level_alphabet)

    def least_tokens(text: str, enough: int) -> int:
        if stripping:  # a special token takes the blanks beside it along
            text = "".join(text.split())
        whole = not stripping
        if not all(unicodedata.is_normalized(form, text) for form in normal_forms):
            text, whole = _inert(text), False
        by_bytes = len(weights) == 256
        data = text.encode("utf-8" if by_bytes else "utf-32-le", "surrogatepass")
        units = np.frombuffer(data, np.uint8 if by_bytes else np.uint32)
        least = int(np.bincount(units, minlength=len(weights)) @ weights * _ROUNDING)
        if least >= enough or len(data) < _CUT_FROM * enough or not (by_bytes and whole and weights.all()):
            return least
        return max(least, cutter().least_tokens(data, enough))

    return least_tokens


class _Cutter:
    """A cutter of bytes into as few tokens as can be: the likeliest cut where all tokens are equally likely."""

    def __init__(self, vocabulary: list[str], added: list[str], alphabet: list[str]) -> None:
        import tokenizers

        self._alphabet = dict(enumerate(alphabet))
        pieces = {*vocabulary, *("".join(alphabet[byte] for byte in token.encode()) for token in added)}
        self._tokenizer = tokenizers.Tokenizer(
            tokenizers.models.Unigram([(piece, -1.0) for piece in sorted(pieces)], 0)
        )
        # Tokens of the whole may lie across the ends of a stretch: at worst each byte of theirs is counted as a token.
        self._at_ends = 2 * max(map(len, pieces))

    def least_tokens(self, data: bytes, enough: int) -> int:
        """Tokens of as many stretches as it takes to have ``enough``, or of all."""
        least = 0
        for start in range(0, len(data), _STRETCH_BYTES):
            stretch = data[start : start + _STRETCH_BYTES].decode("latin-1").translate(self._alphabet)
            ids = self._tokenizer.encode(stretch, add_special_tokens=False).ids
            least += max(len(ids) - self._at_ends, 0)
            if least >= enough:
                break
        return least


def _steps(spec: dict[str, Any] | None, nested: str) -> list[dict[str, Any]]:
    """A step, or a sequence of them, one by one."""
    if spec is None:
        return []
    if spec["type"] != "Sequence":
        return [spec]
    return [step for part in spec[nested] for step in _steps(part, nested)]


def _replaced(steps: list[dict[str, Any]], forms: list[dict[str, Any]]) -> dict[str, str] | None:
    """Characters that are written as others before the vocabulary is looked at; None when a step may drop something."""
    replaced: dict[str, str] = {}
    for step in steps:
        kind = step["type"]
        if kind not in _KEEPING and not (kind in ("Split", "Punctuation") and step.get("behavior") != "Removed"):
            return None
        if kind == "Metaspace":
            replaced[" "] = step["replacement"]
    for form in forms:
        if form["type"] == "Replace":
            given = form["pattern"].get("String", "")
            if len(given) != 1 or len(form["content"]) != 1:
                return None
            replaced[given] = form["content"]
        elif form["type"] not in _FORMS | {"Prepend"}:
            return None
    return replaced


def _inert(text: str) -> str:
    """The ASCII characters that no normal form changes: those before another one."""
    units = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    ascii_ = units < 128
    kept = units[:-1][ascii_[:-1] & ascii_[1:]]
    return kept.astype(np.uint8).tobytes().decode("ascii")


def _byte_weights(vocabulary: list[str], added: list[str], alphabet: list[str]) -> np.ndarray:
    byte_of = {character: value for value, character in enumerate(alphabet)}
    spelled = [[byte_of[c] for c in token] for token in vocabulary if all(c in byte_of for c in token)]
    known = [token[0] for token in spelled if len(token) == 1]
    longest = _longest(256, [*spelled, *(list(token.encode()) for token in added)])
    return _weights(longest, known)


def _character_weights(vocabulary: list[str], added: list[str], replaced: dict[str, str], fallback: bool) -> np.ndarray:
    known = {ord(token) for token in vocabulary if len(token) == 1}
    known |= {ord(given) for given, written in replaced.items() if ord(written) in known}
    longest = _longest(_CHARACTERS, [[ord(c) for c in token] for token in (*vocabulary, *added)])
    for given, written in replaced.items():
        longest[ord(given)] = max(longest[ord(given)], longest[ord(written)])
    # What is not in the vocabulary has a token a byte, or may vanish.
    return _weights(longest, range(_CHARACTERS) if fallback else known)


def _longest(size: int, tokens: list[list[int]]) -> np.ndarray:
    """int64: for each unit, the length of the longest token that it occurs in."""
    longest = np.ones(size, np.int64)
    for token in sorted(tokens, key=len):
        longest[token] = len(token)
    return longest


def _weights(longest: np.ndarray, known: Iterable[int]) -> np.ndarray:
    """float64, one a unit. Units that are no tokens themselves may vanish in an unknown one, and weigh nothing."""
    weights = np.zeros(len(longest))
    held = np.fromiter(known, np.int64)
    weights[held] = 1.0 / longest[held]
    return weights
