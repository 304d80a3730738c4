"""Grammars over the tokens of every kind of vocabulary, followed at random."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.serving.test_text_streams import DECODERS, TOKENIZERS
from workbench.serving.engine import matchers
from workbench.serving.engine.grammar_costs import Spent
from workbench.serving.engine.matchers import Matcher, Matchers
from workbench.serving.structured.checking import checked_grammar
from workbench.serving.structured.formats import OutputFormat

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["größe", "日本 🙂", 'a "b" \\ c']},
        "note": {"type": "string", "maxLength": 6},
        "parts": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 120}, "maxItems": 2},
    },
    "required": ["kind", "note", "parts"],
    "additionalProperties": False,
}
ENDS = {
    "byte-level": {"special": [0], "a word": [260], "none": []},
    "byte-fallback": {"special": [2], "a word": [261], "none": []},
}


def made(name: str, ends: list[int], more: int = 0) -> tuple[Matchers, int]:
    """``more``: tokens that the model has beside those of its tokenizer; below 0 that it lacks."""
    vocab = TOKENIZERS[name].get_vocab_size() + more
    found = Matchers(vocab, ends, lambda sequence_id: None, Spent())
    found.use(TOKENIZERS[name].to_str())
    return found, vocab


def begun(found: Matchers, form: OutputFormat, sequence_id: str = "one") -> Matcher:
    found._compile(checked_grammar(form), sequence_id)
    grammar = found.take(sequence_id)
    assert isinstance(grammar, Matcher), grammar
    return grammar


def allowed(grammar: Matcher) -> list[int]:
    masks = np.zeros((1, grammar.words), np.int32)
    grammar.fill([(grammar, 0)], masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[0]
    return bits.nonzero()[0].tolist()


@pytest.mark.parametrize("name, ends", [(name, ends) for name, kinds in ENDS.items() for ends in kinds])
@pytest.mark.parametrize("more", [0, 37, -2])
@pytest.mark.parametrize("seed", range(3))
def test_an_output_of_any_vocabulary_has_its_form_and_ends_only_where_it_may(name, ends, more, seed):
    eos = ENDS[name][ends]
    found, vocab = made(name, eos, more)
    grammar = begun(found, OutputFormat("json", SCHEMA, "p"))
    written: list[int] = []
    choice = np.random.default_rng(seed)
    while not grammar.complete:
        tokens = allowed(grammar)
        assert tokens and max(tokens) < vocab and len(written) < 400
        token = int(choice.choice(tokens))
        if token in eos:
            break
        assert grammar.accept(token)
        written.append(token)
    stream = DECODERS[name].stream(True)
    text = stream.push(written) + stream.finish()
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("name", ENDS)
def test_a_form_that_only_an_end_can_follow_is_no_form_for_a_model_that_has_none(name):
    nothing = OutputFormat("regex", "a{0}", "p")
    with_end, without = (made(name, ends)[0] for ends in (ENDS[name]["special"], []))
    assert allowed(begun(with_end, nothing)) == ENDS[name]["special"]
    grammar = begun(without, nothing)
    assert not grammar.accept(allowed(grammar)[0] if allowed(grammar) else 5), "it ends with a reason"


def test_a_grammar_that_others_have_pushed_out_is_still_there_for_who_waits_for_it(monkeypatch):
    monkeypatch.setattr(matchers, "MOST_KEPT", 2)
    found, _ = made("byte-level", [0])
    for number in range(5):
        found._compile(checked_grammar(OutputFormat("regex", f"a{{{number + 1}}}", "p")), f"r{number}")
    for number in range(5):
        assert isinstance(found.take(f"r{number}"), Matcher)
