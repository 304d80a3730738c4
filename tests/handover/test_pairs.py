"""Halves of requests on two instances that know each other by a wire: every one ends on both, whatever comes between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from backends.simulated.synthetic import content_key, synthetic_output
from tests.handover.halves import Pair
from tests.patience import until
from workbench.instance import Instance, Recipe, start
from workbench.scheduler.batch import ModelWorkerBatch
from workbench.scheduler.request import SamplingParams
from workbench.serving.backends.live_backend import SyntheticText
from workbench.serving.engine import scheduler_process
from workbench.serving.text.tokenizer import ByteTokenizer, closing_ids

TEXT = SyntheticText(ByteTokenizer().writable_ids(), ByteTokenizer().eos_token_id, closing_ids(ByteTokenizer()))
RUN: dict[str, Any] = {"model": "llama-3.1-8b", "kv_tokens": 4096, "page_size": 16, "max_running": 8}
PROMPT = list(range(40, 100))
PARAMS = SamplingParams(6, ignore_eos=True)


def written(prompt: list[int], tokens: int) -> list[int]:
    return synthetic_output(content_key(np.array(prompt, np.int32), None), 0, tokens, TEXT.writable_ids).tolist()


@pytest.fixture
def pairs() -> Iterator[Any]:
    """Makes pairs on modelled GPUs that take no time, which are closed in the end."""
    made: list[Pair] = []

    def make(**more: Any) -> Pair:
        made.append(Pair({**RUN, **more.pop("run", {})}, TEXT, backend="simulated", time_scale=0.0, **more))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_a_request_may_reach_either_half_first(pairs: Any, loop: str) -> None:
    pair = pairs(run={"loop": loop})
    decode = pair.decode.submit(PROMPT, PARAMS, 1, pair.prefill)
    until(lambda: pair.decode.state()["kv_used_tokens"], "pages are set aside")
    prefill = pair.prefill.submit(PROMPT, PARAMS, 1, pair.decode)
    (answer,) = pair.decode.read(decode)
    assert (answer.kind, answer.tokens) == ("length", written(PROMPT, 6))
    assert pair.prefill.read(prefill)[0].kind == "handed_over"
    prefill = pair.prefill.submit(PROMPT, PARAMS, 2, pair.decode)
    until(lambda: pair.prefill.beat().waiting, "it waits for pages")
    decode = pair.decode.submit(PROMPT, PARAMS, 2, pair.prefill)
    assert pair.decode.read(decode)[0].tokens == written(PROMPT, 6)
    assert pair.prefill.read(prefill)[0].kind == "handed_over"
    for half in pair.halves:
        half.await_rest()


def test_many_at_once_are_not_mixed_up(pairs: Any) -> None:
    pair = pairs()
    prompts = [[*range(40, 60 + i), i] for i in range(60)]
    numbers = [pair.submit(prompt, PARAMS) for prompt in prompts]
    found = pair.decode.read(*(decode for _, decode in numbers))
    assert [answer.tokens for answer in found] == [written(prompt, 6) for prompt in prompts]
    assert {answer.kind for answer in pair.prefill.read(*(prefill for prefill, _ in numbers))} == {"handed_over"}
    for half in pair.halves:
        half.await_rest()


def test_a_client_that_goes_ends_both_halves(pairs: Any) -> None:
    pair = pairs()
    prefill, decode = pair.submit(PROMPT, SamplingParams(3000, ignore_eos=True))
    pair.decode.read_tokens(decode, 1)
    pair.decode.cancel(decode)
    assert pair.decode.read(decode)[0].detail == "client"
    pair.prefill.read(prefill)
    # Before the other half has come, too: that one ends as soon as it does.
    decode = pair.decode.submit(PROMPT, PARAMS, 1, pair.prefill)
    until(lambda: pair.decode.state()["kv_used_tokens"], "pages are set aside")
    pair.decode.cancel(decode)
    assert pair.decode.read(decode)[0].kind == "aborted"
    pair.decode.await_rest()
    prefill = pair.prefill.submit(PROMPT, PARAMS, 1, pair.decode)
    (answer,) = pair.prefill.read(prefill)
    assert (answer.kind, answer.detail) == ("aborted", "withdrawn")
    # And the prefill half alone.
    prefill = pair.prefill.submit(PROMPT, PARAMS, 2, pair.decode)
    pair.prefill.cancel(prefill)
    pair.prefill.read(prefill)
    decode = pair.decode.submit(PROMPT, PARAMS, 2, pair.prefill)
    (answer,) = pair.decode.read(decode)
    assert (answer.kind, answer.detail) == ("aborted", "client")
    for half in pair.halves:
        half.await_rest()


def test_what_one_half_refuses_ends_the_other(pairs: Any) -> None:
    pair = pairs(prefill={"max_context": 50})
    prefill, decode = pair.submit(PROMPT, PARAMS)
    (refused,), (answer,) = pair.prefill.read(prefill), pair.decode.read(decode)
    assert refused.kind == answer.kind == "rejected"
    assert refused.detail == answer.detail == "prompt_exceeds_context"
    for half in pair.halves:
        half.await_rest()


def test_a_room_is_given_to_one_request(pairs: Any) -> None:
    pair = pairs()
    prefill, decode = pair.submit(PROMPT, PARAMS)
    pair.decode.read(decode), pair.prefill.read(prefill)
    for half, other in ((pair.prefill, pair.decode), (pair.decode, pair.prefill)):
        (answer,) = half.read(half.submit(PROMPT, PARAMS, 256, other))
        assert (answer.kind, answer.detail) == ("rejected", "duplicate_room")


def test_a_peer_that_goes_leaves_nothing_behind(pairs: Any) -> None:
    pair = pairs()
    waiting = pair.decode.submit(PROMPT, PARAMS, 1, pair.prefill)
    until(lambda: pair.decode.state()["kv_used_tokens"], "pages are set aside")
    pair.prefill.close()
    pair.halves.remove(pair.prefill)
    (answer,) = pair.decode.read(waiting)
    assert (answer.kind, answer.detail) == ("aborted", "prefill_gone")
    late = pair.decode.submit(PROMPT, PARAMS, 2, pair.prefill)
    assert pair.decode.read(late)[0].detail == "prefill_gone"
    pair.decode.await_rest()


def test_a_decode_instance_that_goes_ends_what_waits_for_it(pairs: Any) -> None:
    pair = pairs()
    prefill, decode = pair.submit(PROMPT, PARAMS)  # so that they know each other
    pair.decode.read(decode), pair.prefill.read(prefill)
    waiting = pair.prefill.submit(PROMPT, PARAMS, 1, pair.decode)
    until(lambda: pair.prefill.beat().waiting, "it waits for pages")
    pair.decode.close()
    pair.halves.remove(pair.decode)
    (answer,) = pair.prefill.read(waiting)
    assert (answer.kind, answer.detail) == ("aborted", "decode_gone")
    pair.prefill.await_rest()


def test_pages_that_never_come_are_given_up(pairs: Any) -> None:
    pair = pairs(run={"transfer_timeout": 0.05, "handshake_timeout": 0.05})
    (answer,) = pair.decode.read(pair.decode.submit(PROMPT, PARAMS, 1, pair.prefill))
    assert (answer.kind, answer.detail) == ("aborted", "transfer_timeout")
    (answer,) = pair.prefill.read(pair.prefill.submit(PROMPT, PARAMS, 2, pair.decode))
    assert (answer.kind, answer.detail) == ("aborted", "handshake_timeout")
    for half in pair.halves:
        half.await_rest()


def test_instances_of_other_models_are_told_apart_in_one_line(pairs: Any, capfd: Any) -> None:
    pair = pairs(prefill={"page_size": 32})
    (answer,) = pair.decode.read(pair.decode.submit(PROMPT, PARAMS, 1, pair.prefill))
    assert (answer.kind, answer.detail) == ("aborted", "prefill_gone")
    pair.decode.await_rest()
    told = capfd.readouterr().err.splitlines()
    assert f"peer {pair.prefill.ready.peer}: page_size is 32 there and 16 here" in told
    assert "peer: a connection from 127.0.0.1 was refused: page_size is 16 there and 32 here" in told


@pytest.mark.parametrize("retraction", ["host", "prefill"])
@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_every_half_ends_once_and_nothing_is_left_whoever_cancels(pairs: Any, loop: str, retraction: str) -> None:
    tight = {"kv_tokens": 640, "reserved_decode_tokens": 16, "decode_retraction": retraction}
    pair = pairs(run={"loop": loop, "chunk": 32}, decode=tight)
    draw = random.Random(2)
    made: dict[int, tuple[list[int], int]] = {}
    numbers = []
    for i in range(80):
        prompt = [*range(40, 50 + draw.randrange(60)), i]
        tokens = draw.randint(1, 120)
        params, room = SamplingParams(tokens, ignore_eos=True), 256 * (i + 1)
        first, second = draw.sample(["prefill", "decode"], 2)
        at = {}
        at[first] = getattr(pair, first).submit(prompt, params, room, getattr(pair, second))
        if draw.random() < 0.2:
            getattr(pair, first).cancel(at[first])
        at[second] = getattr(pair, second).submit(prompt, params, room, getattr(pair, first))
        if draw.random() < 0.1:
            getattr(pair, second).cancel(at[second])
        numbers.append(at)
        made[at["decode"]] = prompt, tokens
        if draw.random() < 0.2:
            pair.decode.read(draw.choice(numbers)["decode"])
    found = pair.decode.read(*made)
    pair.prefill.read(*(at["prefill"] for at in numbers))
    for answer, (prompt, tokens) in zip(found, made.values(), strict=True):
        assert answer.tokens == written(prompt, tokens)[: len(answer.tokens)]
        assert answer.kind == "aborted" or len(answer.tokens) == tokens
    assert sum(answer.kind == "length" for answer in found) > 40
    for half in pair.halves:
        half.await_rest()
    assert pair.decode.beat().retractions, "nobody was retracted: the test shows less than it should"


def test_the_hosts_memory_keeps_nothing_of_who_was_cut_off_there(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Instance] = []
    held: set[str] = set()

    def noting(recipe: Recipe, backend: Any, *more: Any) -> Instance:
        launch = backend.launch

        def noted(batch: ModelWorkerBatch) -> Any:
            for copy in batch.kv_copies:
                held.add(copy.name) if copy.direction == "save" else held.discard(copy.name)
            return launch(batch)

        backend.launch = noted
        started.append(start(recipe, backend, *more))
        return started[-1]

    monkeypatch.setattr(scheduler_process, "start", noting)
    pair = pairs(decode={"kv_tokens": 1024, "reserved_decode_tokens": 0, "max_running": 8})
    numbers = [pair.submit(PROMPT, SamplingParams(800, ignore_eos=True))[1] for _ in range(8)]
    until(lambda: bool(held), "somebody's KV goes to the host")
    for number in numbers:
        pair.decode.cancel(number)
    pair.decode.read(*numbers)
    for half in pair.halves:
        half.await_rest()
    to_come = {copy.name for copy in started[1].scheduler.assembly.copies if copy.direction == "forget"}
    assert held <= to_come
