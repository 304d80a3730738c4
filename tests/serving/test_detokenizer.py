"""The detokenizer's work, without its process."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workbench.serving.text.detokenizer import Detokenizer
from workbench.serving.text.tokenizer import ByteTokenizer
from workbench.serving.wire import Ended, Opened, Step, TokenLogprob

END = 256


def step(pairs, ended=(), first=(), logprobs=None) -> Step:
    streams = np.array([stream for stream, _ in pairs], np.int64).tobytes()
    tokens = np.array([token for _, token in pairs], np.int32).tobytes()
    return Step(streams, tokens, list(first), list(ended), logprobs)


def opened(*streams: int, stop=(), least=0) -> Detokenizer:
    detokenizer = Detokenizer(ByteTokenizer())
    for stream in streams:
        detokenizer.open(Opened(stream, f"r{stream}", stop, least, True))
    return detokenizer


def test_a_step_has_a_chunk_for_each_of_its_sequences():
    detokenizer = opened(1, 2)
    chunks, _ = detokenizer.step(step([(1, ord("a")), (2, ord("b"))]))
    assert [(chunk.sequence, chunk.text, chunk.token_ids) for chunk in chunks] == [(1, "a", [97]), (2, "b", [98])]


def test_half_a_character_comes_with_its_other_half_or_at_the_end():
    detokenizer = opened(1)
    euro = list("€".encode())
    texts = [detokenizer.step(step([(1, byte)]))[0][0].text for byte in [*euro, euro[0]]]
    assert texts == ["", "", "€", ""]
    chunks, _ = detokenizer.step(step([], [Ended(1, "aborted", "client")]))
    assert [(chunk.text, chunk.kind) for chunk in chunks] == [("�", "aborted")]
    assert detokenizer.open_sequences == 0


def test_the_token_that_ends_a_sequence_is_no_text_but_counts():
    detokenizer = opened(1)
    detokenizer.step(step([(1, ord("a"))], first=[(1, 9, 7)]))
    (chunk,), found = detokenizer.step(step([(1, 42)], [Ended(1, "stop", "", 9, 0, (END, 42))]))
    assert (chunk.text, chunk.token_ids, chunk.kind, chunk.stop_reason, chunk.cached_tokens) == (
        "",
        [42],
        "stop",
        42,
        7,
    )
    assert chunk.prompt_tokens == 9
    assert found == []


def test_a_stop_string_across_steps_ends_the_sequence_and_tells_the_scheduler():
    detokenizer = opened(1, 2, stop=("xyz",))
    texts = []
    for letter in "abxy":
        chunks, found = detokenizer.step(step([(1, ord(letter))]))
        texts.append(chunks[0].text)
        assert found == []
    assert texts == ["a", "b", "", ""]
    (chunk,), found = detokenizer.step(step([(1, ord("z"))]))
    assert (chunk.text, chunk.kind, chunk.stop_reason) == ("", "stop", "xyz")
    assert [(stop.sequence_id, stop.output_tokens) for stop in found] == [("r1", 5)]
    assert detokenizer.open_sequences == 1
    # What the scheduler had under way is dropped.
    assert detokenizer.step(step([(1, ord("q"))])) == ([], [])
    assert detokenizer.step(step([], [Ended(1, "stop", "")])) == ([], [])


def test_a_stop_string_in_the_last_token_is_a_stop_and_not_a_length():
    detokenizer = opened(1, stop=("z",))
    (chunk,), found = detokenizer.step(step([(1, ord("z"))], [Ended(1, "length", "")]))
    assert (chunk.text, chunk.kind, chunk.stop_reason) == ("", "stop", "z")
    assert found == [], "the scheduler knows already that it has ended"


def test_what_was_held_for_a_stop_string_comes_when_the_sequence_ends_without():
    detokenizer = opened(1, stop=("xyz",))
    assert detokenizer.step(step([(1, ord("x"))]))[0][0].text == ""
    (chunk,), _ = detokenizer.step(step([(1, ord("y"))], [Ended(1, "length", "")]))
    assert (chunk.text, chunk.kind, chunk.stop_reason) == ("xy", "length", None)


def test_a_step_may_bring_several_tokens_of_a_sequence_and_ends_it_with_the_last():
    detokenizer = opened(1, 2)
    likely = [TokenLogprob(-0.5, [], []), TokenLogprob(-1.5, [], [])]
    pairs = [(1, ord("a")), (2, ord("b")), (2, ord("c")), (1, END)]
    chunks, found = detokenizer.step(step(pairs, [Ended(1, "stop", "", 0, 0, (END,))], logprobs={2: likely}))
    assert [(chunk.sequence, chunk.text, chunk.kind) for chunk in chunks] == [
        (1, "a", ""),
        (2, "b", ""),
        (2, "c", ""),
        (1, "", "stop"),
    ]
    assert [chunk.logprobs[0].logprob for chunk in chunks if chunk.logprobs] == [-0.5, -1.5]
    assert (found, detokenizer.open_sequences) == ([], 1)


def test_a_stop_string_inside_a_run_of_tokens_ends_the_sequence_there():
    detokenizer = opened(1, stop=("b",))
    pairs = [(1, ord(letter)) for letter in "abc"]
    chunks, found = detokenizer.step(step(pairs, [Ended(1, "length", "")]))
    assert [(chunk.text, chunk.kind) for chunk in chunks] == [("a", ""), ("", "stop")]
    assert [stop.output_tokens for stop in found] == [2], "a session goes on from there"


def test_text_before_the_least_length_stops_nothing():
    detokenizer = opened(1, stop=("a",), least=2)
    kinds = [detokenizer.step(step([(1, ord("a"))]))[0][0].kind for _ in range(3)]
    assert kinds == ["", "", "stop"]


def test_log_probabilities_come_with_the_tokens_spelled():
    detokenizer = opened(1)
    (chunk,), _ = detokenizer.step(step([(1, 97)], logprobs={1: [TokenLogprob(-0.5, [97, 0xE4], [-0.5, -2.0])]}))
    assert chunk.logprobs is not None
    (item,) = chunk.logprobs
    assert (item.token, item.token_bytes, item.logprob) == ("a", b"a", -0.5)
    assert item.top == [("a", b"a", -0.5), ("�", b"\xe4", -2.0)]


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from(b"ab\xc3\xa9")), max_size=60),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=2),
)
def test_interleaved_sequences_are_each_what_they_would_be_alone(pairs, stops):
    def texts(streams: list[int]) -> dict[int, str]:
        detokenizer = opened(*streams, stop=tuple(stops))
        out = dict.fromkeys(streams, "")
        for pair in pairs:
            if pair[0] in streams:
                for chunk in detokenizer.step(step([pair]))[0]:
                    out[chunk.sequence] += chunk.text
        for chunk in detokenizer.step(step([], [Ended(stream, "length", "") for stream in streams]))[0]:
            out[chunk.sequence] += chunk.text
        return out

    together = texts([1, 2, 3])
    assert together == {stream: texts([stream])[stream] for stream in (1, 2, 3)}
