"""Outputs that have a form, by a model with random weights: it knows nothing of any form, so all of it is the masks'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import llguidance  # noqa: E402

from backends.torch.backend import TorchBackend  # noqa: E402
from tests.torch.live import LiveRun, backend_of, serve  # noqa: E402
from tests.torch.schemas import Schema, schemas  # noqa: E402
from tests.torch.tiny import make  # noqa: E402
from workbench.scheduler.messages import Generate  # noqa: E402
from workbench.scheduler.request import SamplingParams  # noqa: E402
from workbench.serving.engine.grammar_costs import Spent  # noqa: E402
from workbench.serving.engine.matchers import Matchers  # noqa: E402
from workbench.serving.structured.byte_vocabulary import ByteVocabulary  # noqa: E402
from workbench.serving.structured.checking import checked_grammar  # noqa: E402
from workbench.serving.structured.formats import OutputFormat  # noqa: E402

EOS, VOCAB = 256, 300
MOST = 160
PROMPT = np.frombuffer(b"a prompt that is cut into several chunks of its own", np.uint8).astype(np.int32)
SCHEMAS = schemas()


@pytest.fixture(scope="module")
def backend(tmp_path_factory: Any) -> Iterator[TorchBackend]:
    folder = tmp_path_factory.mktemp("bytes")
    changes = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": None, "num_hidden_layers": 1}
    make("LlamaForCausalLM", folder, hidden_size=32, initializer_range=0.02, **changes)
    made = backend_of(str(folder), rows=32, kv_tokens=2400, max_context=256, page_size=4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def matchers() -> Iterator[Matchers]:
    made = Matchers(VOCAB, [EOS], lambda sequence_id: None, Spent())
    yield made
    made.close()


def requests(matchers: Matchers, wanted: list[Schema], constrained: bool = True, **more: Any) -> list[Generate]:
    found = []
    for i, schema in enumerate(wanted):
        text = checked_grammar(OutputFormat("json", schema, "guided_json"))
        matchers._compile(text, f"r{i}")
        grammar = matchers.take(f"r{i}")
        assert not isinstance(grammar, str), grammar
        params = SamplingParams(MOST, seed=i, **more)
        found.append(Generate(f"r{i}", PROMPT[: 20 + i % 30], params, grammar=grammar if constrained else None))
    return found


def answers(run: LiveRun, wanted: list[Schema]) -> tuple[dict[int, Any], dict[int, bytes]]:
    """What each answer that stopped says, and the bytes of those that were cut."""
    stopped, cut = {}, {}
    for i in range(len(wanted)):
        written, finish = run.outputs[f"r{i}"], run.ended[f"r{i}"].finish
        assert finish is not None and finish.kind in ("stop", "length"), finish
        raw = bytes(token for token in written if token != EOS)
        if finish.kind == "stop":
            stopped[i] = json.loads(raw.decode())
        else:
            cut[i] = raw
    return stopped, cut


def check(run: LiveRun, wanted: list[Schema]) -> None:
    stopped, cut = answers(run, wanted)
    for i, value in stopped.items():
        jsonschema.validate(value, wanted[i], jsonschema.Draft202012Validator)
    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(ByteVocabulary()))  # type: ignore[arg-type]
    for i, raw in cut.items():
        matcher = llguidance.LLMatcher(vocabulary, checked_grammar(OutputFormat("json", wanted[i], "p")))
        assert matcher.consume_tokens(list(raw)), f"{raw!r} begins no document of {wanted[i]}"
    assert len(stopped) >= 0.95 * len(wanted), {i: (raw, wanted[i]) for i, raw in cut.items()}


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["normal", "overlap", "pipeline"])
def test_a_hundred_schemas_hold_in_every_loop_with_chunks_and_retractions(
    backend: TorchBackend, matchers: Matchers, loop: str
) -> None:
    found = requests(matchers, SCHEMAS)
    tight: dict[str, Any] = {
        "kv_tokens": 600,
        "max_running": 16,
        "page_size": 4,
        "batching": "mixed",
        "max_batch_tokens": 16,
    }
    run = serve(backend, [found[:50], found[50:]], loop, slots=2 if loop == "pipeline" else 1, **tight)
    check(run, SCHEMAS)
    retracted = [req for req in run.ended.values() if req.retractions]
    assert len(retracted) > 3, "the KV was not tight enough"
    assert any(req.finish is not None and req.finish.kind == "stop" for req in retracted)


def test_loops_write_the_same_under_grammars(backend: TorchBackend, matchers: Matchers) -> None:
    some = SCHEMAS[::9]
    written = []
    for loop in ("normal", "overlap"):
        run = serve(backend, [requests(matchers, some)], loop, max_running=32, page_size=4, chunk=16)
        check(run, some)
        written.append([t for rid in sorted(run.outputs) for t in run.outputs[rid]])
    assert written[0] == written[1]


def test_without_their_grammars_the_same_requests_write_no_documents(backend: TorchBackend, matchers: Matchers) -> None:
    run = serve(backend, [requests(matchers, SCHEMAS[:6], constrained=False)], max_running=32, page_size=4)
    for i in range(6):
        with pytest.raises(ValueError):
            json.loads(bytes(t for t in run.outputs[f"r{i}"] if t < EOS).decode())


def test_bias_penalties_and_filters_act_among_what_the_grammar_allows(
    backend: TorchBackend, matchers: Matchers
) -> None:
    wanted: list[Schema] = [{"enum": ["ab", "ac"]}] * 4
    biased = requests(
        matchers, wanted, logit_bias=((ord("c"), 50.0), (ord("!"), 100.0)), repetition_penalty=1.3, top_k=5
    )
    run = serve(backend, [biased], max_running=32, page_size=4)
    assert [run.outputs[f"r{i}"] for i in range(4)] == [list(b'"ac"')] * 4


def test_a_request_ends_where_nothing_may_follow_without_a_token_more(
    backend: TorchBackend, matchers: Matchers
) -> None:
    run = serve(backend, [requests(matchers, [{"const": "x"}], ignore_eos=True)], "overlap", max_running=8, page_size=4)
    assert run.outputs["r0"] == list(b'"x"') and run.ended["r0"].finish.kind == "stop"  # type: ignore[union-attr]


def test_a_dead_end_ends_its_request_alone_and_with_a_reason(backend: TorchBackend, matchers: Matchers) -> None:
    found = requests(matchers, [{"const": "x"}, {"const": "yy"}])
    found[0].grammar.accept(0)  # type: ignore[union-attr]  # nothing that could follow
    run = serve(backend, [found], "overlap", max_running=8, page_size=4)
    finish = run.ended["r0"].finish
    assert finish is not None and finish.status == "aborted:grammar_dead_end"
    assert run.outputs["r1"] == list(b'"yy"')
