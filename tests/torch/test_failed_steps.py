"""A step that raises: the loop ends with it, and the next one on the same runner starts from nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from backends.torch.backend import TorchBackend  # noqa: E402
from backends.torch.workers import WorkerDied  # noqa: E402
from tests.constrained import packed  # noqa: E402
from tests.torch.live import backend_of, greedy, messages, serve  # noqa: E402
from tests.torch.test_vocabulary_masks import batch  # noqa: E402
from tests.torch.tiny import VOCAB, make, prompts, reference  # noqa: E402

NEW = 6
PROMPTS = prompts((21, 5, 34))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: Any) -> tuple[str, list[list[int]]]:
    folder = tmp_path_factory.mktemp("llama")
    model = make("LlamaForCausalLM", folder)
    return str(folder), [reference(model, prompt, NEW)[0] for prompt in PROMPTS]


def failing(backend: TorchBackend, monkeypatch: Any, step: int) -> None:
    """Have the model's forward pass raise at its ``step``-th call, once."""
    model, calls = backend.workers.runner.model, []  # type: ignore[attr-defined]
    forward = model.forward

    def raises_once(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == step:
            raise RuntimeError("a step that fails")
        return forward(*args)

    monkeypatch.setattr(model, "forward", raises_once)


@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
@pytest.mark.parametrize("step", [1, 4])
def test_the_next_loop_serves_and_logs_its_own_batches_alone(
    llama: Any, loop: str, step: int, monkeypatch: Any
) -> None:
    folder, expected = llama
    backend = backend_of(folder)
    failing(backend, monkeypatch, step)
    groups = [[message] for message in messages(PROMPTS, greedy(NEW))]
    with pytest.raises(RuntimeError, match="a step that fails"):
        serve(backend, groups, loop, max_running=8)
    assert not backend.phases.pending
    run = serve(backend, groups, loop, max_running=8)
    backend.close()
    assert [run.outputs[f"r{i}"] for i in range(len(PROMPTS))] == expected
    assert [(row[0], row[7]) for row in run.rows] == [
        (batch.worker.step, len(batch.worker.rows)) for batch in run.batches
    ]


def fails_on_the_second_rank(rank: Any) -> None:
    """An errand: have the next forward pass raise there, while the first rank waits for its share."""
    if rank.number == 1:
        rank.runner.model.layers[0].mlp.forward = _raise


def _raise(*args: Any) -> Any:
    raise RuntimeError("a step that fails\nand more about it")


@pytest.mark.slow
def test_of_several_ranks_the_one_that_fails_is_heard_and_all_end(llama: Any) -> None:
    backend = backend_of(llama[0], tp=2)
    backend.workers.everywhere(fails_on_the_second_rank)
    first, second = (backend.launch(batch()) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"^a step that fails"):
        backend.done(first)()
    assert not backend.phases.pending
    for call in (backend.done(first), backend.done(second), lambda: backend.launch(batch()), backend.stop_profile):
        with pytest.raises(WorkerDied, match=r"^the ranks of the model have ended: RuntimeError: a step that fails$"):
            call()
    assert not backend.phases.pending
    backend.close()


@pytest.mark.parametrize("fails", ["in the model", "before its masks"])
def test_the_masks_of_a_batch_that_was_given_up_are_no_one_elses(llama: Any, fails: str, monkeypatch: Any) -> None:
    def only(token: int) -> np.ndarray:
        return packed(np.arange(VOCAB)[None] == token)

    backend = backend_of(llama[0])
    if fails == "in the model":
        failing(backend, monkeypatch, 1)
        forward = backend.launch(batch(masked=np.array([0])))
        backend.sample(forward, only(41))
        with pytest.raises(RuntimeError):
            backend.done(forward)()
    else:
        backend.launch(batch(masked=np.array([0])))  # its loop ended before it had masks
    forward = backend.launch(batch(masked=np.array([0])))
    backend.sample(forward, only(42))
    assert forward.output().tokens.tolist() == [42]
    backend.close()
