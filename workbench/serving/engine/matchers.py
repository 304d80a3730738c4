"""Grammars of requests in the scheduler process: compiled in a thread of their own, kept, and followed token by token."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np
import zmq

from workbench.scheduler.grammar import Grammar
from workbench.serving.engine.grammar_costs import Spent
from workbench.serving.structured.byte_vocabulary import ByteVocabulary
from workbench.serving.wire import Addresses, Compiled, encode, push_socket

MOST_KEPT = 64
"""Compiled grammars that are kept for the next request with the same: each may have some 100 MiB."""
NO_END = "<|the end of a sequence, to grammars alone|>"
"""Of a model that has none."""
STACK_BYTES = 64 << 20
"""Of the thread that compiles, which recurses as deep as a grammar does: more than those have that passed it before."""


class Matcher:
    """How far one request has got in its grammar."""

    __slots__ = ("_dead", "_matcher", "_pool", "_spent", "_vocab", "_width", "words")

    def __init__(self, matcher: Any, width: int, vocab: int, pool: Any, spent: Spent) -> None:
        """``width``: words of a mask over the tokenizer's vocabulary; ``vocab``: the model's, which may be larger, or
        smaller by an end that it cannot write."""
        self._matcher, self._width, self._vocab, self._pool, self._spent = matcher, width, vocab, pool, spent
        self.words = -(-vocab // 32)
        self._dead = False

    def accept(self, token: int) -> bool:
        began_s = time.perf_counter()
        taken = not self._dead and bool(self._matcher.consume_token(token))
        self._spent.mask_s += time.perf_counter() - began_s
        return taken

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def fill(self, grammars: Sequence[tuple[Grammar, int]], masks: np.ndarray) -> None:
        began_s = time.perf_counter()
        found = [(one, row) for one, row in grammars if isinstance(one, Matcher)]
        made = np.zeros((len(found), self._width), np.int32)
        if len(found) == 1:
            _fill(found[0][0]._matcher, made)
        else:
            entries = [(one._matcher, place) for place, (one, _) in enumerate(found)]
            self._pool.unsafe_compute_mask_ptr(entries, made.ctypes.data, self._width * 4, len(found))
        width = min(self._width, self.words)
        if self._vocab % 32 and self._width >= self.words:
            made[:, self.words - 1] &= (1 << self._vocab % 32) - 1
        for (one, row), mask in zip(found, made, strict=True):
            if one._matcher.is_error() or not mask[:width].any():
                one._dead = True  # a row has to sample something
                continue
            masks[row, width:] = 0
            masks[row, :width] = mask[:width]
        self._spent.tokens += len(found)
        self._spent.mask_s += time.perf_counter() - began_s


def _fill(matcher: Any, made: np.ndarray) -> None:
    matcher.unsafe_compute_mask_ptr(made.ctypes.data, made.nbytes)


class Matchers:
    """Maker of grammars, from the text that :mod:`workbench.serving.structured` has made of what a client asked for.

    :meth:`begin` answers at once for one that was compiled before. Any other is compiled in a thread, which then calls
    ``tell``: the loop goes on meanwhile, and takes it with :meth:`take`.
    """

    def __init__(self, vocab: int, eos_token_ids: Sequence[int], tell: Callable[[str], None], spent: Spent) -> None:
        """``tell`` is called in that thread, with the sequence that :meth:`begin` was given."""
        self._vocab, self._eos, self._tell = vocab, list(eos_token_ids), tell
        self._serialised: str | None = None
        self._tokenizer: Any = None
        self._kept: OrderedDict[str, Any] = OrderedDict()
        """Compiled matchers at their beginning, or why there is none, least recently asked for first."""
        self._found: dict[str, Any] = {}
        """Those of sequences that have not taken theirs."""
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._pool: Any = None
        self.spent = spent

    def use(self, serialised: str | None) -> None:
        """Take the tokenizer whose tokens the model writes, as ``Tokenizer.serialised`` has it."""
        self._serialised = serialised

    def begin(self, text: str, sequence_id: str) -> bool:
        """Return whether the grammar is there. Otherwise ``tell`` is called with ``sequence_id`` when it is."""
        if self._there(text, sequence_id):
            return True
        if self._thread is None:
            self._thread = _thread_of(STACK_BYTES)
        self._thread.submit(self._compile, text, sequence_id)
        return False

    def _there(self, text: str, sequence_id: str) -> bool:
        with self._lock:
            found = self._kept.get(text)
            if found is None:
                return False
            self._kept.move_to_end(text)
            self._found[sequence_id] = found
            return True

    def take(self, sequence_id: str) -> Matcher | str:
        """Return a grammar that is there, at its beginning, or why it cannot be followed. Each is taken once."""
        with self._lock:
            found = self._found.pop(sequence_id)
        if isinstance(found, str):
            return found
        return Matcher(found.deep_copy(), -(-self._tokenizer.vocab_size // 32), self._vocab, self._pool, self.spent)

    def _compile(self, text: str, sequence_id: str) -> None:
        began_s = time.perf_counter()
        if not self._there(text, sequence_id):
            try:
                found = self._compiled(text)
            except Exception as error:  # a loop that waits for it must hear of it
                found = f"{type(error).__name__}: {error}"
            with self._lock:
                self._kept[text] = self._found[sequence_id] = found
                while len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            self.spent.compiled += 1
            self.spent.compile_s += time.perf_counter() - began_s
        self._tell(sequence_id)

    def _compiled(self, text: str) -> Any:
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._serialised, self._vocab, self._eos)
            self._pool = llguidance.LLExecutor()
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            return matcher.get_error().strip().splitlines()[0]
        # The first mask is the dearest one: what it works out is kept for all that begin here.
        matcher.compute_bitmask()
        return matcher.get_error().strip().splitlines()[0] if matcher.is_error() else matcher

    def close(self) -> None:
        """Leave what is being compiled behind."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _thread_of(stack_bytes: int) -> ThreadPoolExecutor:
    """Return a thread with a stack of its own size."""
    made = ThreadPoolExecutor(1, thread_name_prefix="grammars")
    before = threading.stack_size(stack_bytes)
    try:
        made.submit(int)  # with its first work it starts
    finally:
        threading.stack_size(before)
    return made


def teller(context: zmq.Context[Any], addresses: Addresses) -> Callable[[str], None]:
    """Return what sends word of a compiled grammar to the loop, which may be asleep. For one thread."""
    sockets: list[Any] = []

    def tell(sequence_id: str) -> None:
        if not sockets:
            sockets.append(push_socket(context, addresses.scheduler))
        sockets[0].send(encode(Compiled(sequence_id)))

    return tell


def _tokenizer(serialised: str | None, vocab: int, eos: list[int]) -> Any:
    if serialised is None:
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(ByteVocabulary()), eos_token=eos or None)
    import tokenizers

    own = tokenizers.Tokenizer.from_str(serialised)
    own.no_padding()
    own.no_truncation()
    # Whatever else a token that ends a sequence is written as: within an output it would end it there.
    ending = [text for token in eos if (text := own.id_to_token(token)) is not None]
    own.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in ending])
    if not eos:
        # One that means nothing to the model, which may not have it at all: a grammar then ends where nothing may follow.
        own.add_special_tokens([NO_END])
        end = own.token_to_id(NO_END)
        assert end is not None, "it has just been added"
        eos = [end]
    return llguidance.LLTokenizer(own.to_str(), n_vocab=max(vocab, own.get_vocab_size()), eos_token=eos)
