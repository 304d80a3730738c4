"""Text to token ids and back, with a model's tokenizer or with the built-in one of plain bytes.

The HTTP process loads the tokenizer, through transformers because of chat templates, and hands its serialised form to the
detokenizer process, which needs the `tokenizers` library alone.
"""

from __future__ import annotations

import json
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ground.errors import InputError
from workbench.serving.text.least_tokens import least_tokens_of
from workbench.serving.text.text_stream import ByteStream, TextStream, WindowStream


class TokenizerError(InputError):
    """A tokenizer that cannot be used, in one line."""


class Decoder(Protocol):
    """The part of a tokenizer that the detokenizer needs."""

    def stream(self, skip_special_tokens: bool) -> TextStream:
        """A new incremental decoding."""
        ...

    def token(self, token_id: int) -> tuple[str, bytes]:
        """One token alone, as text and as the bytes it stands for."""
        ...


class Tokenizer(Protocol):
    """The part of a tokenizer that the HTTP process needs."""

    name: str
    bos_tokens: int
    """Special tokens that :meth:`encode` puts before a text (BOS): what continues a text goes without them."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, the special tokens a model expects at its start included."""
        ...

    chat_template: str | None
    """Jinja, to be rendered with :attr:`special_tokens`; None: there is none."""
    special_tokens: dict[str, str]
    """By the names that templates have for them: bos_token and so on."""

    def plain_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str | None:
        """The text of a conversation that the assistant is to continue, without a template; None: it takes one."""
        ...

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a conversation as text, which has its special tokens in it."""
        ...

    def least_tokens(self, text: str, enough: int) -> int:
        """A number that the tokens of ``text`` are never fewer than, at a fraction of the cost of encoding it. From
        ``enough`` on it need not be told how many more they are."""
        ...

    def serialised(self) -> str | None:
        """Serialised form for :func:`load_decoder`."""
        ...

    def writable_ids(self) -> np.ndarray:
        """int32: tokens that are whole text by themselves: what a synthetic answer is made of."""
        ...

    @property
    def eos_token_id(self) -> int:
        """The token that ends a synthetic answer."""
        ...


class ByteTokenizer:
    """One token a byte, and one that ends. For a simulated model without a tokenizer at hand."""

    name = "built-in bytes"
    eos_token_id = 256
    bos_tokens = 0
    chat_template: str | None = None

    def __init__(self) -> None:
        self.special_tokens: dict[str, str] = {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def plain_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str | None:
        """Paragraphs of ``role: content``, before them one for each tool, and calls as a model is asked to write them."""
        lines = [f"tool: {json.dumps(tool, ensure_ascii=False)}\n" for tool in tools or ()]
        for message in messages:
            calls = "".join(
                f"<tool_call>{json.dumps(call['function'], ensure_ascii=False)}</tool_call>"
                for call in message.get("tool_calls") or ()
            )
            lines.append(f"{message['role']}: {message.get('content') or ''}{calls}\n")
        return "".join(lines) + "assistant:"

    def encode_chat(self, text: str) -> list[int]:
        return self.encode(text)

    def least_tokens(self, text: str, enough: int) -> int:
        return len(text.encode("utf-8", "surrogatepass"))

    def serialised(self) -> str | None:
        return None

    def writable_ids(self) -> np.ndarray:
        return np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8).astype(np.int32)

    def stream(self, skip_special_tokens: bool) -> TextStream:
        return ByteStream(_BYTES, frozenset())

    def token(self, token_id: int) -> tuple[str, bytes]:
        piece = _BYTES[token_id] if token_id < len(_BYTES) else b""
        return piece.decode("utf-8", "replace"), piece


_BYTES = [bytes([i]) for i in range(256)]


class ModelTokenizer:
    """A model's own tokenizer, through transformers."""

    def __init__(self, path: str) -> None:
        import os

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.name = path
        try:
            folder = Path(path)
            if folder.suffix == ".gguf":
                self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder.parent), gguf_file=folder.name)
            else:
                self._tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as fault:  # transformers raises whatever its readers do
            raise TokenizerError(f"{path}: no usable tokenizer: {_first_line(fault)}") from fault
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(f"{path}: its tokenizer has no tokenizer.json form, which decoding needs")
        self._serialised: str = backend.to_str()
        self._least_tokens = least_tokens_of(self._serialised, _byte_level_alphabet())
        added = self._tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self.bos_tokens = len(list(takewhile(bool, added)))
        self.special_tokens = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        self.chat_template = self._default_template()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def _default_template(self) -> str | None:
        try:
            template: str = self._tokenizer.get_chat_template()
        except ValueError:  # none, or several and no default
            return None
        return template

    def plain_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str | None:
        return None

    def encode_chat(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def least_tokens(self, text: str, enough: int) -> int:
        return self._least_tokens(text, enough)

    def serialised(self) -> str | None:
        return self._serialised

    def writable_ids(self) -> np.ndarray:
        decoder = SerialisedDecoder(self._serialised)
        texts = [decoder.token(i)[0] if i not in decoder.special_ids else "" for i in range(decoder.size)]
        return np.array([i for i, text in enumerate(texts) if text and "�" not in text], np.int32)

    @property
    def eos_token_id(self) -> int:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise TokenizerError(f"{self.name}: its tokenizer names no end-of-sequence token")
        return int(eos)


class SerialisedDecoder:
    """The decoding half of a ``tokenizer.json``."""

    def __init__(self, text: str) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        kind = json.loads(text).get("decoder") or {}
        steps = kind["decoders"] if kind.get("type") == "Sequence" else [kind]
        self._table = self._byte_table() if [step.get("type") for step in steps] == ["ByteLevel"] else None
        self._byte_tokens = {
            i: int(t[3:5], 16)
            for i in range(self.size)
            if (t := self._tokenizer.id_to_token(i)) and len(t) == 6 and t[:3] == "<0x"
        }

    def stream(self, skip_special_tokens: bool) -> TextStream:
        skipped = self.special_ids if skip_special_tokens else frozenset()
        if self._table is not None:
            return ByteStream(self._table, skipped)

        def decode(ids: list[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=False)

        return WindowStream(decode, skipped, self._byte_tokens)

    def token(self, token_id: int) -> tuple[str, bytes]:
        if self._table is not None:
            piece = self._table[token_id] if token_id < self.size else b""
            return piece.decode("utf-8", "replace"), piece
        if token_id in self._byte_tokens:
            piece = bytes([self._byte_tokens[token_id]])
            return piece.decode("utf-8", "replace"), piece
        # After another one: at the beginning of a text some decoders leave out a space, and two tokens would look alike.
        before, both = (
            self._tokenizer.decode(ids, skip_special_tokens=False) for ids in (self._anchor, [*self._anchor, token_id])
        )
        text = (
            both[len(before) :]
            if both.startswith(before)
            else self._tokenizer.decode([token_id], skip_special_tokens=False)
        )
        return text, text.encode()

    @cached_property
    def _anchor(self) -> list[int]:
        """An ordinary token that is a letter, if there is one."""
        letters = (self._tokenizer.token_to_id(letter) for letter in "aetionsr")
        return [found for found in letters if found is not None and found not in self.special_ids][:1]

    def _byte_table(self) -> list[bytes]:
        """The bytes of every token of a byte-level vocabulary, which spells bytes as printable characters."""
        byte_of = {character: value for value, character in enumerate(_byte_level_alphabet())}
        table = []
        for i in range(self.size):
            token = self._tokenizer.id_to_token(i)
            if token is None:
                table.append(b"")
            elif all(character in byte_of for character in token):
                table.append(bytes(byte_of[character] for character in token))
            else:
                table.append(token.encode())
        return table


def _byte_level_alphabet() -> list[str]:
    """The character for each byte, as GPT-2 chose: itself where printable, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    alphabet, extra = [], 0
    for value in range(256):
        if value in printable:
            alphabet.append(chr(value))
        else:
            alphabet.append(chr(256 + extra))
            extra += 1
    return alphabet


def closing_ids(tokenizer: Tokenizer) -> np.ndarray:
    """int32: single tokens that end a part of a JSON document, of those that the tokenizer has."""
    decoder = load_decoder(tokenizer.serialised())
    found = []
    for text in ('"', "}", "]", ","):
        ids = tokenizer.encode(text)[tokenizer.bos_tokens :]
        found += ids if len(ids) == 1 and decoder.token(ids[0])[1] == text.encode() else []
    return np.array(found, np.int32)


def load_tokenizer(path: str | None) -> Tokenizer:
    """The tokenizer of a folder, Hugging Face id or GGUF file; None: the built-in one. Raises TokenizerError."""
    return ByteTokenizer() if path is None else ModelTokenizer(path)


def load_decoder(serialised: str | None) -> Decoder:
    """The decoding half of the tokenizer whose ``serialised()`` this is."""
    return ByteTokenizer() if serialised is None else SerialisedDecoder(serialised)


def _first_line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__
