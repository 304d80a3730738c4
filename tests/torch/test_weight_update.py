"""Another checkpoint for a model that is being served: the tokens after it are those of a runner started from it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from backends.torch.backend import TorchBackend  # noqa: E402
from backends.torch.parallel import Parallel  # noqa: E402
from backends.torch.weight_update import HalfWritten, check_weights, write_weights  # noqa: E402
from tests.torch.checkpoints import altered, load, rewrite  # noqa: E402
from tests.torch.live import LiveRun, backend_of, greedy, messages, serve, spans  # noqa: E402
from tests.torch.tiny import prompts  # noqa: E402
from workbench.scheduler.messages import UpdateWeights  # noqa: E402

NEW = 12
PROMPTS = prompts((21, 34))
PROMPTS += [[*PROMPTS[1][:30], 5, 6]]  # shares a prefix with the one before


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a small Llama, another of the same shape)."""
    folder = tmp_path_factory.mktemp("llamas")
    return folder / "old", altered(folder / "old", folder / "new")


def asked(prefix: str) -> list[Any]:
    made = messages(PROMPTS, greedy(NEW))
    return [type(one)(f"{prefix}{one.rid}", one.prompt, one.params) for one in made]


def updated(
    backend: TorchBackend, folder: Path, loop: str = "normal", **settings: Any
) -> tuple[LiveRun, list[str | None]]:
    """Everybody asks (``a``), the weights change, everybody asks again (``b``): all of what came, and what was told."""
    told: list[str | None] = []
    update = UpdateWeights(lambda: backend.check_weights(str(folder)), backend.write_weights, told.append)
    # The second half arrives when the first is long over, so that it finds its prompts in the cache if they are there.
    quiet: list[list[object]] = [[] for _ in range(4 * NEW)]
    run = serve(backend, [asked("a"), *quiet, [update, *asked("b")]], loop, max_running=8, **settings)
    return run, told


def fresh(folder: Path, **options: Any) -> dict[str, list[int]]:
    backend = backend_of(str(folder), **options)
    outputs = serve(backend, [asked("b")], max_running=8).outputs
    backend.close()
    return outputs


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}, {}),
    "tied, in bfloat16": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, {"dtype": "bfloat16"}),
    "quantised to FP8 as it is read": ("Qwen3ForCausalLM", {"head_dim": 16}, {"fp8": True}),
    "experts": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"max_context": 100}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_after_an_update_are_those_of_a_runner_started_from_the_new_checkpoint(
    kind: str, tmp_path: Path
) -> None:
    architecture, changes, options = KINDS[kind]
    other = altered(tmp_path / "old", tmp_path / "new", architecture, **changes)
    backend = backend_of(str(tmp_path / "old"), **options)
    places = [parameter.data_ptr() for parameter in backend.workers.runner.model.parameters()]
    run, told = updated(backend, other)
    assert [p.data_ptr() for p in backend.workers.runner.model.parameters()] == places
    backend.close()
    wanted = fresh(other, **options)
    assert told == [None]
    assert {rid: tokens for rid, tokens in run.outputs.items() if rid[0] == "b"} == wanted
    assert all(run.outputs[f"ar{i}"] != wanted[f"br{i}"] for i in range(len(PROMPTS))), "the models differ too little"
    # Within a half the prefix is found, from one half to the next it is not.
    assert run.ended["br0"].cached_tokens == 0
    assert len(PROMPTS[1]) > run.ended["br2"].cached_tokens


@pytest.mark.slow
def test_every_stage_changes_its_layers_or_none_does_and_leaves_a_trace_of_its_own(
    llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = llamas
    backend = backend_of(str(old), pp=2)
    incomplete = tmp_path / "incomplete"
    shutil.copytree(new, incomplete)
    rewrite(incomplete, lambda tensors: tensors.pop("model.norm.weight"))  # which only the last stage reads
    try:
        with pytest.raises(ValueError, match=r"incomplete: missing tensor model\.norm\.weight$"):
            backend.check_weights(str(incomplete))
        before = serve(backend, [asked("b")], "pipeline", max_running=8, slots=2).outputs
        backend.start_profile(f"{tmp_path}/whole", None)
        run, told = updated(backend, new, "pipeline", slots=2)
        files = backend.stop_profile()
        backend.start_profile(f"{tmp_path}/end", None)
        serve(backend, [asked("b")], "pipeline", max_running=8, slots=2)
    finally:
        backend.close()
    assert before == fresh(old), "the refused update has changed something"
    assert told == [None]
    assert {rid: tokens for rid, tokens in run.outputs.items() if rid[0] == "b"} == fresh(new)
    assert files == [f"{tmp_path}/whole/rank-{rank}.json.gz" for rank in range(2)]
    first, second = (spans(Path(file)) for file in files)
    assert first == second and len(first) == len(run.batches)
    first, second = (spans(tmp_path / "end" / f"rank-{rank}.json.gz") for rank in range(2))
    assert first == second and len(first) >= NEW


@pytest.mark.parametrize("fp8", [False, True])
def test_a_rank_of_several_takes_its_share_of_the_new_tensors(llamas: tuple[Path, Path], fp8: bool) -> None:
    old, new = llamas
    for rank in range(2):
        half = Parallel(tp=2, tp_rank=rank)
        model, _ = load(old, parallel=half, fp8=fp8)
        write_weights(check_weights(str(new), model, fp8=fp8, max_context=None), model)
        wanted, _ = load(new, parallel=half, fp8=fp8)
        for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(ours.float(), theirs.float())


def edit_config(name: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, **changes}))

    return edit


def edit_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.layers.1.input_layernorm.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "{}: not a folder with a config.json; weights are updated from a local one"),
    "other sizes": (edit_config(num_hidden_layers=2), "{}/config.json: another model: layers is 2, not 3"),
    "other family": (
        edit_config(architectures=["MistralForCausalLM"], sliding_window=None),
        "{}/config.json: another model: architecture is MistralForCausalLM, not LlamaForCausalLM",
    ),
    "other end": (
        edit_config("generation_config.json", eos_token_id=[2, 9]),
        "{}/config.json: another model: eos_token_ids is (2, 9), not (2,)",
    ),
    "unknown family": (
        edit_config(architectures=["Gpt"]),
        "{}/config.json: architectures: 'Gpt' is not supported; supported: ",
    ),
    "strange config": (edit_config(architectures=[["x"]]), "{}: cannot be read: TypeError: "),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "{}: no weights (no *.safetensors); "),
    "a missing tensor": (edit_tensors(lambda t: t.pop(NORM)), f"{{}}: missing tensor {NORM}"),
    "another shape": (
        edit_tensors(lambda t: t.update({NORM: torch.ones(63)})),
        f"{{}}: tensor {NORM} has shape [63], expected [64]",
    ),
    "a tensor too many": (edit_tensors(lambda t: t.update(extra=torch.ones(1))), "{}: unexpected tensor extra"),
    "a file cut short": (cut, "{}: model"),
}


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line_and_the_model_stays_as_it_was(
    llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = llamas
    backend = backend_of(str(old))
    held = {name: tensor.clone() for name, tensor in backend.workers.runner.model.state_dict().items()}
    for name, (spoil, line) in REFUSED.items():
        folder = tmp_path / name.replace(" ", "-")
        shutil.copytree(new, folder)
        spoil(folder)
        with pytest.raises(ValueError, match=f"^{re.escape(line.format(folder))}.*$") as caught:
            backend.check_weights(str(folder))
        assert "\n" not in str(caught.value)
    run, told = updated(backend, tmp_path / "no-folder")
    assert told == [REFUSED["no folder"][1].format(tmp_path / "no-folder")]
    for name, tensor in backend.workers.runner.model.state_dict().items():
        assert torch.equal(tensor, held[name])
    backend.close()
    wanted = fresh(old)
    assert {rid: run.outputs[rid] for rid in wanted} == wanted
    assert run.ended["br0"].cached_tokens == len(PROMPTS[0]) - 1, "the prefix cache was emptied for nothing"
    assert sum(req.retractions for req in run.ended.values()) == 0


def test_a_copy_of_a_tied_embedding_has_to_be_one(tmp_path: Path) -> None:
    other = altered(tmp_path / "old", tmp_path / "new", tie_word_embeddings=True, num_hidden_layers=1)
    rewrite(other, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    backend = backend_of(str(tmp_path / "old"))
    backend.check_weights(str(other))
    rewrite(other, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        backend.check_weights(str(other))
    backend.close()


def test_weights_that_break_off_while_they_are_written_leave_nothing_to_be_served(
    llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = llamas
    going = tmp_path / "going"
    shutil.copytree(new, going)
    backend = backend_of(str(old))
    backend.check_weights(str(going))
    (going / "model.safetensors").unlink()
    with pytest.raises(HalfWritten, match=r"^\S+going: the weights could not be written whole: "):
        backend.write_weights()
    backend.close()
