"""Properties of incremental decoding and of stop strings."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from workbench.serving.text.text_stream import StopMatcher
from workbench.serving.text.tokenizer import ByteTokenizer, SerialisedDecoder

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café über größe",
    "你好,世界。日本語のテキスト",
    "\U0001f600\U0001f603 \U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
]
SPECIALS = ["<|end|>", "<|im start|>"]


def byte_level() -> Tokenizer:
    """Like GPT-2, Llama 3 and Qwen: characters outside ASCII are cut anywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    tokenizer.add_tokens(["größe added", "日"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Llama 2 and Mistral: words with a mark for the space, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", "▁the", "▁fox", "fox", "é", "ü", "世", "▁世界", "a", "b", ",", "▁▁", "\n"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}
DECODERS = {name: SerialisedDecoder(tokenizer.to_str()) for name, tokenizer in TOKENIZERS.items()}


def pieces_of(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """The ids in consecutive pieces of these lengths, the rest one by one."""
    pieces, at = [], 0
    for length in itertools.chain(cuts, itertools.repeat(1)):
        if at >= len(ids):
            return pieces
        pieces.append(ids[at : at + length])
        at += length
    return pieces


def chunks_of(decoder, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    stream = decoder.stream(skip)
    return [*(stream.push(piece) for piece in pieces_of(ids, cuts)), stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_chunks_of_any_tokens_are_together_the_full_decode(name, data, skip):
    decoder = DECODERS[name]
    ids = data.draw(st.lists(st.integers(0, decoder.size - 1), max_size=40))
    cuts = data.draw(st.lists(st.integers(1, 4), max_size=10))
    whole = TOKENIZERS[name].decode(ids, skip_special_tokens=skip)
    assert "".join(chunks_of(decoder, ids, cuts, skip)) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(1, 3), max_size=10))
@settings(max_examples=300, deadline=None)
def test_a_chunk_never_breaks_inside_a_character(name, text, cuts):
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    whole = TOKENIZERS[name].decode(ids)
    chunks = chunks_of(DECODERS[name], ids, cuts, True)
    assert "".join(chunks) == whole
    if "�" not in whole:
        assert not any("�" in chunk for chunk in chunks)


@given(st.binary(max_size=40), st.lists(st.integers(1, 4), max_size=10))
def test_the_built_in_tokenizer_reads_and_writes_bytes(content, cuts):
    assert "".join(chunks_of(ByteTokenizer(), list(content), cuts, True)) == content.decode("utf-8", "replace")


def test_text_is_not_held_back_once_its_characters_are_whole():
    decoder, tokenizer = DECODERS["byte-level"], TOKENIZERS["byte-level"]
    ids = tokenizer.encode("plain text 你 end").ids
    stream = decoder.stream(True)
    told = ""
    for at, token in enumerate(ids):
        told += stream.push([token])
        whole = tokenizer.decode(ids[: at + 1])
        if not whole.endswith("�"):
            assert told == whole


def test_a_token_alone_has_its_bytes():
    decoder, tokenizer = DECODERS["byte-level"], TOKENIZERS["byte-level"]
    for text in ("fox", "€"):
        ids = tokenizer.encode(text).ids
        assert b"".join(decoder.token(i)[1] for i in ids) == text.encode()
    fallback = DECODERS["byte-fallback"]
    assert fallback.token(TOKENIZERS["byte-fallback"].token_to_id("<0xE4>")) == ("�", b"\xe4")


LETTERS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def matched(text: str, cuts: list[int], stops: list[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    out = []
    for piece in pieces_of(list(text), cuts):
        shown, stop = matcher.push("".join(piece))
        out.append(shown)
        if stop is not None:
            return out, stop
    return [*out, matcher.finish()], None


@given(LETTERS, st.lists(st.integers(1, 6), max_size=10), STOPS)
@settings(max_examples=500)
def test_a_stop_string_is_found_wherever_the_text_is_cut(text, cuts, stops):
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    shown, found = matched(text, cuts, stops)
    if ends:
        _, start, stop = min(ends)
        assert ("".join(shown), found) == (text[:start], stop)
    else:
        assert ("".join(shown), found) == (text, None)


@given(LETTERS, STOPS)
def test_what_is_held_back_could_begin_a_stop_string_and_nothing_else_is(text, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for end in range(1, len(text) + 1):
        piece, found = matcher.push(text[end - 1])
        if found is not None:
            return
        shown += piece
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_without_stop_strings_nothing_is_held():
    assert StopMatcher([]).push("abc") == ("abc", None)
