"""Log probabilities as clients get them: an entry for each token, and offsets that count the characters of the text."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.test_text_streams import DECODERS, TOKENIZERS
from workbench.serving.chunks import LogprobText
from workbench.serving.http.openai_api import CompletionShape, chat_logprobs
from workbench.serving.text.detokenizer import Detokenizer
from workbench.serving.wire import Ended, Opened, Step, TokenLogprob

SHAPE = CompletionShape(SimpleNamespace(prompts=1, n=1), "m")  # type: ignore[arg-type]


def told(decoder, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[LogprobText]]:
    """(the text, the log probabilities) of a sequence of tokens, each of which was the likeliest."""
    detokenizer = Detokenizer(decoder)
    detokenizer.open(Opened(1, "r", stop, 0, False))
    text, found = "", []
    for i, token in enumerate(ids):
        end = [Ended(1, "length", "")] if i == len(ids) - 1 else []
        step = Step(
            np.array([1], np.int64).tobytes(),
            np.array([token], np.int32).tobytes(),
            [],
            end,
            {1: [TokenLogprob(-0.5, [token], [-0.5])]},
        )
        for chunk in detokenizer.step(step)[0]:
            text += chunk.text
            found += chunk.logprobs or []
    return text, found


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(text=st.text(st.sampled_from(" abfoxé世€\U0001f600\u200d\n"), min_size=1, max_size=12))
def test_a_token_stands_where_its_offset_says(kind, text):
    ids = TOKENIZERS[kind].encode(text, add_special_tokens=False).ids
    written, found = told(DECODERS[kind], ids)
    offsets = [item.offset for item in found]
    assert offsets == sorted(offsets) and len(found) == len(ids)
    for i, item in enumerate(found):
        if "�" not in item.token:
            # A decoder may leave out the space that begins a text.
            assert written.startswith((item.token, item.token[1:]) if i == 0 else item.token, item.offset), (
                item,
                written,
            )
    begun = b"".join(item.token_bytes for item in found)
    if kind == "byte-level":
        assert begun.decode() == written
        sizes = np.cumsum([0, *(len(item.token_bytes) for item in found)])
        assert offsets == [len(begun[:size].decode("utf-8", "ignore")) for size in sizes[:-1].tolist()]


def test_offsets_go_on_right_after_characters_in_several_tokens():
    for kind, text in (("byte-fallback", "€a€"), ("byte-level", "€a")):
        ids = TOKENIZERS[kind].encode(text, add_special_tokens=False).ids
        written, found = told(DECODERS[kind], ids)
        assert written == text
        at = {item.token: item.offset for item in found}
        assert at["a"] == 1, [(item.token, item.offset) for item in found]
    ids = [*b"\xe2\x82", ord("a"), *"€b".encode()]
    from workbench.serving.text.tokenizer import ByteTokenizer

    written, found = told(ByteTokenizer(), ids)
    assert written == "�a€b"
    assert [item.offset for item in found] == [0, 0, 1, 2, 2, 2, 3]


def item(token_id: int, token: str, logprob: float, top: list[tuple[int, str, float]]) -> LogprobText:
    return LogprobText(
        token,
        token.encode(),
        logprob,
        [(text, text.encode(), value) for _, text, value in top],
        token_id,
        [i for i, _, _ in top],
    )


def test_tokens_of_equal_text_each_have_an_entry_and_the_sampled_one_its_own_value():
    two = item(9, " a", -5.1855, [(9, " a", -5.1855), (4, " a", -5.2004)])
    assert SHAPE._logprobs([two])["top_logprobs"] == [{" a": -5.1855, "token_id:4": -5.2004}]
    behind = item(9, " a", -5.3, [(4, " a", -5.1), (5, "b", -5.2)])
    assert SHAPE._logprobs([behind])["top_logprobs"] == [{"token_id:4": -5.1, "b": -5.2, " a": -5.3}]
    assert SHAPE._logprobs([item(9, "c", -1.0, [])])["top_logprobs"] == [{"c": -1.0}]
    by_id = CompletionShape(SimpleNamespace(prompts=1, n=1), "m", tokens_as_ids=True)  # type: ignore[arg-type]
    assert by_id._logprobs([two]) == {
        "tokens": ["token_id:9"],
        "token_logprobs": [-5.1855],
        "top_logprobs": [{"token_id:9": -5.1855, "token_id:4": -5.2004}],
        "text_offset": [0],
    }


def test_bytes_that_are_no_text_are_written_as_bytes():
    half = LogprobText("�", b"\xe2\x82", -1.0, [("�", b"\xe2\x82", -1.0), ("�", b"\xac", -2.0)], 7, [7, 8])
    made = SHAPE._logprobs([half])
    assert made["tokens"] == ["bytes:\\xe2\\x82"]
    assert made["top_logprobs"] == [{"bytes:\\xe2\\x82": -1.0, "bytes:\\xac": -2.0}]
    (content,) = chat_logprobs([half])["content"]
    assert content["bytes"] == [0xE2, 0x82] and [top["bytes"] for top in content["top_logprobs"]] == [
        [0xE2, 0x82],
        [0xAC],
    ]


def test_a_word_with_its_space_and_without_are_two_tokens():
    decoder = DECODERS["byte-fallback"]
    words = [decoder.token(TOKENIZERS["byte-fallback"].token_to_id(name))[0] for name in ("▁fox", "fox")]
    assert words == [" fox", "fox"]


def test_a_stop_string_leaves_the_offsets_of_what_came_before():
    ids = list("€ab".encode())
    from workbench.serving.text.tokenizer import ByteTokenizer

    written, found = told(ByteTokenizer(), [*ids, ord("c")], stop=("bc",))
    assert written == "€a"
    assert [one.offset for one in found] == [0, 0, 0, 1, 2, 3]
    assert all(a <= b for a, b in pairwise(one.offset for one in found))
