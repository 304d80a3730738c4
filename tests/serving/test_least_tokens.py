"""A text never has fewer tokens than it is said to have at least; a prompt far too long is refused without encoding it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.event_loop import in_a_loop
from tests.serving.test_text_streams import CORPUS, TOKENIZERS, byte_fallback, byte_level
from workbench.scheduler.capacity import Capacity
from workbench.serving.refusals import Refusal
from workbench.serving.requests import Limits
from workbench.serving.text import least_tokens
from workbench.serving.text.least_tokens import least_tokens_of
from workbench.serving.text.prompts import Prompts
from workbench.serving.text.tokenizer import ByteTokenizer, ModelTokenizer, _byte_level_alphabet


def normalized(*steps) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    return tokenizer


def as_llama_2() -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def unknown_fused() -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE({"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, [("a", "b")], unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS * 5,
        trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", show_progress=False, special_tokens=["<unk>"]),
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def split_away() -> Tokenizer:
    tokenizer = byte_level()
    removing = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([removing, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def blanks_taken_along() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True, special=True)])
    return tokenizer


MADE = {
    **TOKENIZERS,
    "as Llama 2": as_llama_2(),
    "NFC": normalized(normalizers.NFC()),
    "NFKD": normalized(normalizers.NFKD()),
    "lower case": normalized(normalizers.Lowercase()),
    "stripped": normalized(normalizers.Strip()),
    "unigram": unigram(),
    "unknown fused": unknown_fused(),
    "word piece": word_piece(),
    "split away": split_away(),
    "blanks": blanks_taken_along(),
}
LEAST = {name: least_tokens_of(made.to_str(), _byte_level_alphabet()) for name, made in MADE.items()}
PIECES = [
    *CORPUS,
    "the quick ",
    "<|end|>",
    "<|im start|>",
    "größe added",
    " " * 9,
    "\n\n",
    "e\u0301",
    "\u0338",
    "가",
    "\u1100\u1161",
    "ﬁ",
    "aaaa",
    "abc",
    "ab",
    "=" * 20,
    "▁▁",
    "日",
    "zzz",
    "\u2003",
]


@pytest.mark.parametrize("name", MADE)
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_text_has_no_fewer_tokens_than_it_is_said_to_have(name, text):
    tokens = len(MADE[name].encode(text, add_special_tokens=False).ids)
    for enough in (0, 1, tokens, 10**6):
        assert LEAST[name](text, enough) <= tokens


@pytest.mark.parametrize("name", ["byte-level", "NFC", "as Llama 2", "blanks"])
@given(data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_nor_has_a_text_of_many_stretches(name, data):
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), min_size=5, max_size=20)) * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_tokens, "_CUT_FROM", 0)
        patch.setattr(least_tokens, "_STRETCH_BYTES", data.draw(st.integers(1, 500)))
        assert LEAST[name](text, 10**6) <= len(MADE[name].encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", MADE)
def test_a_long_text_has_at_least_a_share_of_its_tokens_unless_nothing_can_be_said(name):
    text = "the quick brown fox abc " * 1000
    share = LEAST[name](text, 0) / len(MADE[name].encode(text).ids)
    assert share == 0 if name in ("word piece", "lower case", "stripped", "split away") else share > 0.05


def test_stretches_of_ordinary_text_have_nearly_all_of_its_tokens(monkeypatch):
    text = "the quick brown fox abc größe " * 10_000
    tokens = len(MADE["byte-level"].encode(text).ids)
    weighed = LEAST["byte-level"](text, tokens)
    monkeypatch.setattr(least_tokens, "_CUT_FROM", 0)
    assert weighed < 0.5 * tokens < 0.9 * tokens < LEAST["byte-level"](text, tokens)
    assert tokens // 10 <= LEAST["byte-level"](text, tokens // 10) < tokens // 2, "it stops when there are enough"


def limits(longest: int) -> Limits:
    return Limits(Capacity(longest + 2, 10**9), 10**6, True, "cpu", 16, False)


class Counting(ByteTokenizer):
    """Bytes; knows how often it was used."""

    encoded = 0

    def encode(self, text: str) -> list[int]:
        self.encoded += 1
        return super().encode(text)


@pytest.mark.parametrize("prompt", ["x" * 20_000, ["fits", "x" * 20_000], [1] * 20_000, [[1], [2] * 20_000]])
def test_a_prompt_far_too_long_is_refused_before_any_is_encoded(prompt):
    tokenizer = Counting()

    async def encode():
        prompts = Prompts(tokenizer, limits(10_000))
        return await prompts.encoded(prompts.listed(prompt, 16), 16, "prompt")

    with pytest.raises(Refusal, match="20000 tokens are more than the 10000 that fit") as caught:
        in_a_loop(encode())
    assert caught.value.kind == "context_length_exceeded"
    assert tokenizer.encoded == 0


def test_a_chat_far_too_long_is_refused_before_it_is_encoded(tmp_path):
    TOKENIZERS["byte-level"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = ModelTokenizer(str(tmp_path))

    async def encode(text: str) -> list[int]:
        return await Prompts(tokenizer, limits(1000)).chat(text, 16, "messages")

    text = "the quick brown fox " * 5000
    tokenizer.encode_chat = None
    with pytest.raises(Refusal, match=r"^messages: at least [0-9]+ tokens are more than the 1000 that fit"):
        in_a_loop(encode(text))


@pytest.mark.parametrize("longest", [4001, 20_000])
def test_the_longest_prompt_that_fits_is_encoded(longest):
    async def encode():
        return await Prompts(ByteTokenizer(), limits(longest)).encoded(["x" * longest], 16, "prompt")

    assert len(in_a_loop(encode())[0]) == longest
