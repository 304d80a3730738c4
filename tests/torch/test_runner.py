"""The whole real path: scheduler, loop, runner, sampler. Greedy output is transformers', whatever the settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.torch.live import backend_of, greedy, messages, serve  # noqa: E402
from tests.torch.tiny import VOCAB, make, prompts, reference  # noqa: E402
from workbench.scheduler.messages import Abort, Generate  # noqa: E402
from workbench.scheduler.request import SamplingParams  # noqa: E402

NEW = 16
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
PROMPTS = [*prompts((21, 5, 34)), prompts((40,))[0][:30]]
# The last two share a prefix with one of the others.
PROMPTS += [[*PROMPTS[0][:17], 7, 8, 9], [*PROMPTS[2][:32], 5, 6]]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny(request: Any, tmp_path_factory: Any) -> tuple[str, list[list[int]]]:
    """(folder of a random model, transformers' greedy continuations of PROMPTS)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make(request.param, folder, **ARCHITECTURES[request.param])
    return str(folder), [reference(model, prompt, NEW)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: Any) -> tuple[str, list[list[int]]]:
    folder = tmp_path_factory.mktemp("llama")
    model = make("LlamaForCausalLM", folder)
    return str(folder), [reference(model, prompt, NEW)[0] for prompt in PROMPTS]


def staggered() -> list[list[Generate]]:
    """A request a step, so that prompts meet decodes."""
    return [[message] for message in messages(PROMPTS, greedy(NEW))]


def check(run: Any, expected: list[list[int]]) -> None:
    assert len(run.ended) == len(PROMPTS)
    for i, tokens in enumerate(expected):
        assert run.outputs[f"r{i}"] == tokens, f"r{i}"
        assert run.ended[f"r{i}"].output_len == NEW


IN_TURN: dict[str, Any] = {
    "batching": "mixed",
    "mixed_order": "admission",
    "cache": "blocks",
    "page_size": 4,
    "give_back": "ended",
    "share_in_batch_tokens": None,
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no prefix cache": ({}, {"cache": "none"}),
    "pages of 16": ({"page_size": 16}, {"page_size": 16}),
    "small chunks": ({}, {"chunk": 8}),
    "small chunks, pages of 4": ({"page_size": 4}, {"page_size": 4, "chunk": 8}),
    "chunks cut inside a page": ({"page_size": 4}, {"page_size": 4, "chunk": 7, "chunk_cut": "tokens"}),
    "chunks as they end, decodes beside": (
        {"page_size": 16, "rows": 16},
        {"page_size": 16, "chunk": 25, "mixed_chunk": True, "chunk_cut": "tokens", "give_back": "at_once"},
    ),
    "mixed chunks": ({}, {"chunk": 16, "mixed_chunk": True}),
    "decode-first mixed": ({}, {"batching": "mixed", "max_batch_tokens": 12}),
    "in the order of admission": (
        {"page_size": 4, "rows": 16},
        {"max_batch_tokens": 12, "long_prefill_tokens": 6, **IN_TURN},
    ),
    "all together, blocks found in their step": ({"page_size": 4, "rows": 16}, {"max_batch_tokens": 160, **IN_TURN}),
    "retraction, blocks": (
        {"kv_tokens": 140, "page_size": 4, "rows": 16},
        {"max_batch_tokens": 40, **IN_TURN, "admit_for": "chunk"},
    ),
    "retraction": ({"kv_tokens": 140}, {"conservativeness": 0.01, "cache": "none"}),
    "retraction, pages of 4": ({"kv_tokens": 140, "page_size": 4}, {"conservativeness": 0.01, "page_size": 4}),
}


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_output_is_that_of_transformers(tiny: Any, loop: str, name: str) -> None:
    folder, expected = tiny
    options, settings = SETTINGS[name]
    backend = backend_of(folder, **options)
    groups = [[one for group in staggered() for one in group]] if name.startswith("all together") else staggered()
    run = serve(backend, groups, loop, max_running=8, **settings)
    backend.close()
    check(run, expected)
    if name.startswith("retraction"):
        assert sum(req.retractions for req in run.ended.values()) > 0
    if "chunks" in name:
        assert any(batch.worker.unsampled is not None for batch in run.batches)
    if name.startswith("all together"):
        first = run.batches[0].prefill
        assert any(row.cached for row in first), "nobody found what the same step computes"
    if "cache" not in settings and loop == "normal" and name != "retraction, pages of 4":
        assert sum(req.cached_tokens for req in run.ended.values()) > 0


OTHERS = {
    "MistralForCausalLM": {"sliding_window": 12},
    "Qwen2ForCausalLM": {},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
}


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.slow
def test_every_other_family_agrees_under_each_loop_with_chunks_retraction_and_ranks(
    architecture: str, tmp_path: Path
) -> None:
    model = make(architecture, tmp_path, **OTHERS[architecture])
    expected = [reference(model, prompt, NEW)[0] for prompt in PROMPTS]
    for loop, tp, pp in (("normal", 1, 1), ("overlap", 2, 1), ("pipeline", 1, 2)):
        for page_size in (1, 16):
            backend = backend_of(str(tmp_path), tp=tp, pp=pp, page_size=page_size, kv_tokens=176)
            try:
                run = serve(
                    backend,
                    staggered(),
                    loop,
                    max_running=8,
                    slots=pp,
                    page_size=page_size,
                    chunk=16,
                    conservativeness=0.01,
                )
            finally:
                backend.close()
            check(run, expected)
            assert any(batch.worker.unsampled is not None for batch in run.batches)


@pytest.mark.parametrize("loop, tp, pp", [("overlap", 2, 1), ("normal", 2, 1), ("pipeline", 1, 2), ("pipeline", 2, 2)])
@pytest.mark.slow
def test_several_ranks_write_what_one_writes(llama: Any, loop: str, tp: int, pp: int) -> None:
    folder, expected = llama
    backend = backend_of(folder, tp=tp, pp=pp, page_size=4)
    try:
        run = serve(backend, staggered(), loop, max_running=8, slots=pp, page_size=4, chunk=16)
    finally:
        backend.close()
    check(run, expected)
    stages = {row[2] for row in run.rows}
    assert stages == set(range(pp))


def test_an_iteration_is_logged_with_its_times_in_order(llama: Any) -> None:
    backend = backend_of(llama[0])
    run = serve(backend, staggered(), "overlap", max_running=8)
    backend.close()
    assert [row[0] for row in run.rows] == list(range(len(run.batches)))
    for _, _, _, _, launch_s, start_s, end_s, *_, receive_s, schedule_s, launch_host_s, process_s in run.rows:
        assert 0 <= start_s <= end_s and launch_s >= 0
        assert min(receive_s, schedule_s, launch_host_s, process_s) >= 0
    ends = [row[6] for row in run.rows]
    assert ends == sorted(ends)


def test_the_end_of_sequence_ends_a_request_and_ignoring_it_does_not(llama: Any) -> None:
    folder, expected = llama
    stop = expected[0][5]
    backend = backend_of(folder)
    params = [
        greedy(NEW, ignore_eos=False, stop_token_ids=(stop,)),
        greedy(NEW, ignore_eos=True, stop_token_ids=(stop,)),
    ]
    run = serve(backend, [messages([PROMPTS[0], PROMPTS[0]], params)], "overlap", max_running=8)
    backend.close()
    first = expected[0].index(stop)
    assert run.outputs["r0"] == expected[0][: first + 1] and run.ended["r0"].finish.kind == "stop"
    assert run.outputs["r1"] == expected[0] and run.ended["r1"].finish.kind == "length"


def test_a_stop_token_is_not_sampled_before_min_new_tokens(llama: Any) -> None:
    folder, expected = llama
    stop = expected[0][0]
    backend = backend_of(folder)
    params = greedy(NEW, ignore_eos=False, stop_token_ids=(stop,), min_new_tokens=4)
    run = serve(backend, [messages([PROMPTS[0]], params)], max_running=8)
    backend.close()
    assert stop not in run.outputs["r0"][:4] and len(run.outputs["r0"]) >= 4


def test_a_seeded_request_samples_the_same_alone_in_company_and_after_a_retraction(llama: Any) -> None:
    folder, _ = llama
    params = SamplingParams(NEW, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=7)
    alone = backend_of(folder)
    wanted = serve(alone, [messages([PROMPTS[0]], params)], max_running=8).outputs["r0"]
    alone.close()
    crowd = backend_of(folder, kv_tokens=140)
    run = serve(
        crowd, [[m] for m in messages(PROMPTS, params)], "overlap", max_running=8, conservativeness=0.01, cache="none"
    )
    crowd.close()
    assert run.outputs["r0"] == wanted
    assert sum(req.retractions for req in run.ended.values()) > 0
    assert len({tuple(tokens) for tokens in run.outputs.values()}) == len(PROMPTS)


def test_penalties_and_biases_change_what_they_say(llama: Any) -> None:
    folder, expected = llama
    favourite = 123
    params = [
        greedy(NEW, logit_bias=((favourite, 100.0),)),
        greedy(NEW, frequency_penalty=1000.0),
        greedy(NEW, logit_bias=((favourite, 50.0),), presence_penalty=1000.0),
        greedy(NEW, repetition_penalty=1e6),
        greedy(NEW),
    ]
    backend = backend_of(folder)
    run = serve(backend, [[m] for m in messages([PROMPTS[0]] * 5, params)], "overlap", max_running=8)
    backend.close()
    assert run.outputs["r0"] == [favourite] * NEW
    assert len(set(run.outputs["r1"])) == NEW  # no token twice
    assert run.outputs["r2"].count(favourite) == 1
    assert len(set(run.outputs["r3"])) == NEW and not set(run.outputs["r3"]) & set(PROMPTS[0])
    assert run.outputs["r4"] == expected[0]  # and nobody else is touched


def test_log_probabilities_are_those_of_the_model(llama: Any, tmp_path: Path) -> None:
    folder, expected = llama
    model = make("LlamaForCausalLM", tmp_path)
    _, logits = reference(model, PROMPTS[1], NEW)
    log = logits.log_softmax(-1)
    backend = backend_of(folder)
    params = [greedy(NEW), greedy(NEW, logprobs=3), greedy(NEW, logprobs=0)]
    run = serve(backend, [messages([PROMPTS[0], PROMPTS[1], PROMPTS[2]], params)], "overlap", max_running=8)
    backend.close()
    assert set(run.logprobs) == {"r1", "r2"}
    for i, (sampled, top, ids) in enumerate(run.logprobs["r1"]):
        at = log[len(PROMPTS[1]) - 1 + i]
        assert sampled == pytest.approx(float(at[expected[1][i]]), abs=1e-4)
        values, indices = at.topk(3)
        np.testing.assert_allclose(top[:3], values.numpy(), atol=1e-4)
        assert ids[:3] == indices.tolist()


def test_an_abort_while_the_batch_runs_frees_everything(llama: Any) -> None:
    folder, expected = llama
    backend = backend_of(folder)
    groups: list[list[object]] = [list(messages(PROMPTS, greedy(NEW))), [], [Abort("r1")], [Abort("r3")], []]
    run = serve(backend, groups, "overlap", max_running=8)
    backend.close()
    assert run.ended["r1"].finish.kind == run.ended["r3"].finish.kind == "aborted"
    assert run.outputs["r0"] == expected[0] and run.outputs["r2"] == expected[2]
    assert run.scheduler is not None and run.scheduler.idle


def test_a_request_as_long_as_the_context_is_served(llama: Any) -> None:
    backend = backend_of(llama[0], max_context=64, kv_tokens=128)
    prompt = [3 + i % (VOCAB - 3) for i in range(50)]
    run = serve(backend, [messages([prompt], greedy(1000))], "overlap", max_running=8)
    backend.close()
    assert len(run.outputs["r0"]) == 64 - 50 - 1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
