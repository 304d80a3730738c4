"""The server with a real model: a tiny random one, on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from reports.record.run_record import read_record  # noqa: E402
from tests.meta_form import check_meta  # noqa: E402
from tests.serving.server import ROOT, Server, environment  # noqa: E402
from tests.serving.test_text_streams import TOKENIZERS  # noqa: E402
from tests.torch.test_gguf import write_gguf  # noqa: E402
from tests.torch.tiny import make, reference  # noqa: E402
from workbench.serving.serve_settings import ServeSettings  # noqa: E402
from workbench.settings.loading import settings_from  # noqa: E402
from workbench.settings.real import device_defaults  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TOKENIZER = TOKENIZERS["byte-level"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, the same model in transformers): a tokenizer whose characters are cut anywhere, and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    size = TOKENIZER.get_vocab_size()
    made = make("LlamaForCausalLM", folder, vocab_size=size)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, made


NO_SIMULATOR = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name == "simpy" or name.startswith("backends.simulated"):
            raise ImportError(f"a real run imports {name}")

sys.meta_path.insert(0, Refusing())
"""


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """None of its processes can import the simulator: each of them runs this first."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(NO_SIMULATOR)
    record = site / "record"
    server = Server(
        "--served-model-name",
        "tiny",
        "--kv-tokens",
        "2000",
        "--load-format",
        "safetensors",
        "--record",
        str(record),
        model=str(model[0]),
        backend="cpu",
        PYTHONPATH=os.pathsep.join((str(site), str(ROOT))),
    )
    server.record = record
    yield server
    server.kill()


def test_what_keeps_the_simulator_out_of_a_server_does(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_SIMULATOR)
    command = [sys.executable, "-c", "import backends.simulated.realtime"]
    ran = subprocess.run(
        command, env=environment(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT)))), capture_output=True, text=True
    )
    assert ran.returncode and "a real run imports backends.simulated" in ran.stderr


def test_a_step_on_a_cpu_is_small_unless_told_otherwise_and_the_server_says_so(server):
    assert ", chunk 512, " in server.first_line
    assert server.http.get("/state").json()["settings"]["chunk"] == 512


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, (512, 512)), ({"chunk": 64, "max_batch_tokens": 4096}, (64, 4096)), ({"chunk": 0}, (None, 512))],
)
def test_a_given_chunk_wins_over_that_of_the_device(flags, expected):
    settings = settings_from(None, flags, defaults=device_defaults("cpu"))
    assert (settings.chunk, settings.max_batch_tokens) == expected
    assert settings_from(None, {}, defaults=device_defaults("cuda")).chunk == 8192


def test_a_gguf_file_is_served_when_it_is_asked_for_by_its_format(model, tmp_path):
    write_gguf(model[1], "llama", tmp_path / "tiny.gguf")
    run = settings_from(None, {"model": str(tmp_path / "tiny.gguf"), "kv_tokens": 100}, defaults=device_defaults("cpu"))
    built = build(run, "gguf")
    assert built.vocab == TOKENIZER.get_vocab_size()
    built.close()
    with pytest.raises(ValueError, match="load_format says safetensors"):
        build(run, "safetensors")


def build(run, load_format: str):
    settings = ServeSettings(run, "cpu", load_format=load_format)
    return settings.spec.build(run, settings.loop, None, lambda row: None, 0.0)


def greedy(model, prompt: str, count: int) -> list[int]:
    return reference(model[1], TOKENIZER.encode(prompt).ids, count)[0]


@pytest.mark.parametrize("prompt", ["the quick brown", "你好 world", "naïve café"])
def test_greedy_text_is_the_models_and_its_chunks_are_the_whole(server, model, prompt):
    expected = TOKENIZER.decode(greedy(model, prompt, 24))
    options = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    client = server.openai()
    assert client.completions.create(**options).choices[0].text == expected
    stream = client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_token_ids_in_and_out_are_the_models(server, model):
    ids = TOKENIZER.encode("the lazy dog").ids
    sampling = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    made = server.http.post("/generate", json={"input_ids": ids, "sampling_params": sampling}).json()
    assert made["output_ids"] == greedy(model, "the lazy dog", 12)


def test_a_chat_is_rendered_by_the_models_template(server, model):
    expected = TOKENIZER.decode(greedy(model, "user: hi\nassistant:", 10))
    made = server.openai().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=10,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert made.choices[0].message.content == expected


def test_messages_that_the_template_refuses_are_a_400(server):
    response = server.http.post("/v1/chat/completions", json={"messages": [{"role": "developer", "content": "hi"}]})
    assert response.status_code == 400
    assert "no developers here" in response.json()["error"]["message"]


def test_log_probabilities_are_the_models(server, model):
    prompt = "the quick"
    tokens, logits = reference(model[1], TOKENIZER.encode(prompt).ids, 5)
    start = len(TOKENIZER.encode(prompt).ids) - 1
    expected = torch.log_softmax(logits[start : start + 5], -1)
    client = server.openai()
    made = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=5, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    )
    found = made.choices[0].logprobs
    for i, token in enumerate(tokens):
        assert found.token_logprobs[i] == pytest.approx(float(expected[i, token]), abs=1e-3)
        assert max(found.top_logprobs[i].values()) == pytest.approx(found.token_logprobs[i], abs=1e-3)
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    content = [item for chunk in chat if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content]
    assert [len(item.top_logprobs) for item in content] == [2, 2, 2]
    assert all(item.bytes is not None for item in content)


def test_a_seed_repeats_a_sample(server):
    client = server.openai()
    options = {"model": "tiny", "prompt": "x", "max_tokens": 20, "n": 2, "extra_body": {"ignore_eos": True}}
    first, again = (client.completions.create(**options, seed=5) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert first.choices[0].text != first.choices[1].text


def test_nothing_is_left_of_what_was_served(server):
    server.await_rest()


def test_a_real_server_ends_with_its_record_written_and_without_the_simulator(server):
    completion(server, "one request", max_tokens=2)  # without any there is no record
    code, said = server.stop()
    assert (code, "Traceback" in said) == (0, False), said
    meta = read_record(server.record / "overlap").meta
    check_meta(meta, "served")
    assert (meta["hardware"]["simulated"], meta["settings"]["backend"], "torch" in meta["versions"]) == (
        False,
        "cpu",
        True,
    )
    assert [meta["settings"][name] for name in ("gpu", "cost", "time_scale", "simulated_output_tokens")] == [None] * 4


@pytest.fixture(scope="module")
def plain_server(model):
    found = Server("--dtype", "fp32", model=str(model[0]), backend="cpu")
    yield found
    found.kill()


def completion(server, prompt, **body):
    answer = server.http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_an_echoed_prompt_has_the_log_probabilities_of_its_own_tokens(model, plain_server):
    """What lm-eval's loglikelihood asks for: chunked, cached before, several prompts, as text and as ids."""
    _, made = model
    texts = ["the very same words " * 12, "grün 日本 ends"]
    ids = [TOKENIZER.encode(text).ids for text in texts]
    completion(plain_server, texts[0], max_tokens=4)  # its prefix is in the cache now
    for prompt in (texts, ids):
        for max_tokens in (1, 0):
            found = completion(plain_server, prompt, max_tokens=max_tokens, echo=True, logprobs=3)
            for text, tokens, choice in zip(texts, ids, found, strict=True):
                assert choice["text"].startswith(text)
                told = choice["logprobs"]
                with torch.no_grad():
                    log = made(torch.tensor([tokens])).logits[0].log_softmax(-1)
                wanted = log[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].tolist()
                assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
                assert len(told["token_logprobs"]) == len(told["tokens"]) == len(told["text_offset"])
                assert len(told["tokens"]) == len(tokens) + max_tokens
                before = [TOKENIZER.decode(tokens[:k]).rstrip("\N{REPLACEMENT CHARACTER}") for k in range(len(tokens))]
                assert told["text_offset"][: len(tokens)] == [len(text) for text in before]
                assert told["token_logprobs"][1 : len(tokens)] == pytest.approx(wanted, abs=1e-3)
                best = log.max(-1).values.tolist()
                for value, top in zip(best, told["top_logprobs"][1 : len(tokens)], strict=False):
                    assert max(top.values()) == pytest.approx(value, abs=1e-3)


def test_an_echo_without_log_probabilities_is_the_text_before_the_answer(plain_server):
    (plain,), (echoed,) = (
        completion(plain_server, "abc", max_tokens=5),
        completion(plain_server, "abc", max_tokens=5, echo=True),
    )
    assert echoed["text"] == "abc" + plain["text"] and echoed["logprobs"] is None
    for asked, param in (({"stream": True}, "echo"), ({"prompt": ""}, "prompt"), ({"prompt": [10**6]}, "prompt")):
        refused = plain_server.http.post("/v1/completions", json={"prompt": "abc", "echo": True, **asked})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_random_weights_write_the_form_that_they_are_asked_for(plain_server):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["ä", "日本"]}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    (choice,) = completion(plain_server, "x", max_tokens=100, guided_json=schema, temperature=1, seed=3)
    value = json.loads(choice["text"])
    assert value["a"] in ("ä", "日本") and 0 <= value["b"] <= 99 and choice["finish_reason"] == "stop"


def test_log_probabilities_under_a_form_are_among_the_tokens_that_may_follow(plain_server):
    (choice,) = completion(plain_server, "abc", max_tokens=4, guided_regex="[ab]{3}", logprobs=4)
    for top in choice["logprobs"]["top_logprobs"]:
        allowed = [value for token, value in top.items() if token in ("a", "b")]
        assert sum(map(math.exp, allowed)) == pytest.approx(1, abs=1e-4)
        assert sorted(top.values())[:2] == [-9999.0] * 2 and len(top) == 4
    body = {"messages": [{"role": "user", "content": "x"}], "guided_choice": ["a"], "logprobs": True, "top_logprobs": 2}
    chat = plain_server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in chat[0]["top_logprobs"]] == [0.0, -9999.0]


def test_token_ids_and_the_stop_string_come_where_they_are_asked_for(plain_server):
    (choice,) = completion(plain_server, "abc", max_tokens=6, return_token_ids=True)
    assert choice["prompt_token_ids"] == TOKENIZER.encode("abc").ids and len(choice["token_ids"]) == 6
    stop = choice["text"][1:3]
    (cut,), (kept,) = (
        completion(plain_server, "abc", max_tokens=6, stop=stop, include_stop_str_in_output=include)
        for include in (False, True)
    )
    assert kept["text"] == cut["text"] + stop and kept["stop_reason"] == stop
