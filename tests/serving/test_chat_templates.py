"""What a client may say about a chat template, and renderings that end whatever a template does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import signal
import threading

import httpx2
import pytest

from tests.event_loop import in_a_loop
from tests.patience import until
from tests.serving.server import MODEL, Server, answer
from tests.serving.test_text_streams import TOKENIZERS
from workbench.serving.http.errors import api_error
from workbench.serving.refusals import Refusal
from workbench.serving.text import chat_templates
from workbench.serving.text.chat_templates import Bounds, ChatTemplates, reserved_names
from workbench.serving.text.tokenizer import ByteTokenizer, ModelTokenizer

HI = [{"role": "user", "content": "hi"}]
BOUNDS = Bounds(10_000, 0.1, 0.3)
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this\nto me') }}{% endif %}"
    "{% if m.content == 'for ever' %}"
    + FOR_EVER
    + "{% endif %}{% if m.content == 'bad' %}{{ m.content.x.y }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if not thinking|default(true) %}</think>{% endif %}"
)


class Templated(ByteTokenizer):
    """Bytes, with a template."""

    name = "made up"
    chat_template = TEMPLATE

    def __init__(self) -> None:
        self.special_tokens = {"bos_token": "<s>"}


def run(scenario, trust: bool = False, tokenizer=None, bounds: Bounds = BOUNDS):
    """What ``scenario(templates)`` returns, with templates that are closed thereafter."""

    async def whole():
        templates = ChatTemplates(tokenizer or Templated(), bounds, trust)
        try:
            return await scenario(templates)
        finally:
            templates.close()

    result = in_a_loop(whole())
    until(lambda: not workers(), "no worker is left")
    return result


def workers():
    return [child for child in multiprocessing.active_children() if child.name == "chat-template"]


def text(messages=HI, given=None, **options) -> str:
    return run(lambda templates: templates.text(messages, given or {}), **options)


def refusal(messages=HI, given=None, **options) -> dict:
    with pytest.raises(Refusal) as caught:
        text(messages, given, **options)
    refused = api_error(caught.value)
    assert refused.status == 400
    error = refused.body["error"]
    assert "\n" not in error["message"]
    for quoted in ("Error", "Exception", "__", "argument", "object", "NoneType", "Traceback", "()"):
        assert quoted not in error["message"], "nobody who sends a chat need know Python"
    assert error["message"].startswith(f"{error['param']}: ")
    return error


def test_a_chat_is_the_models_template_filled_in():
    assert text() == "<s><user>hi<assistant>"
    assert text(given={"thinking": False, "unknown_to_it": [{"a": 1}]}) == "<s><user>hi<assistant></think>"


def test_a_template_renders_as_transformers_renders_it(tmp_path):
    TOKENIZERS["byte-level"].save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im start|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = ModelTokenizer(str(tmp_path))
    messages = [*HI, {"role": "assistant", "content": "größe\n"}, *HI]
    rendered = text(messages, {"thinking": False}, tokenizer=tokenizer)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    options = {"add_generation_prompt": True, "thinking": False}
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, **options)
    assert tokenizer.encode_chat(rendered) == theirs.apply_chat_template(messages, return_dict=False, **options)


@pytest.mark.parametrize(
    "name",
    [
        "chat_template",
        "tokenize",
        "conversation",
        "conversations",
        "add_generation_prompt",
        "continue_final_message",
        "tools",
        "documents",
        "messages",
        "return_tensors",
        "return_dict",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
        "kwargs",
        "self",
        "bos_token",
        "eos_token",
        "range",
        "namespace",
        "raise_exception",
        "dict",
        "strftime_now",
    ],
)
@pytest.mark.parametrize("tokenizer", [Templated, ByteTokenizer])
def test_a_name_of_the_renderer_is_refused_by_name(name, tokenizer):
    error = refusal(given={"thinking": True, name: "x"}, tokenizer=tokenizer())
    assert (error["param"], error["code"]) == (f"chat_template_kwargs.{name}", "unsupported_parameter")


@pytest.mark.parametrize(
    "name", ["enable_thinking", "thinking", "date_string", "reasoning_effort", "custom", "a b", ""]
)
def test_other_names_are_variables_of_the_template(name):
    assert name not in reserved_names()
    assert text(given={name: True}) == "<s><user>hi<assistant>"


def test_the_switch_admits_a_template_and_nothing_else():
    own = "{% for m in messages %}[{{ m.content }}{{ mark }}]{% endfor %}"
    assert text(given={"chat_template": own, "mark": "!"}, trust=True) == "[hi!]"
    assert text(given={"chat_template": own}, trust=True, tokenizer=ByteTokenizer()) == "[hi]"
    assert (
        refusal(given={"chat_template": own, "tokenize": True}, trust=True)["param"] == "chat_template_kwargs.tokenize"
    )
    assert refusal(given={"chat_template": 5}, trust=True)["code"] == "invalid_type"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("no", "messages: the model's chat template refuses these messages: not this"),
        ("bad", "messages: the model's chat template fails in line 2: it uses what is not defined there"),
        ("for ever", "messages: the model's chat template takes more than 0.3 s of processor time to render"),
        ("x" * 10_000, "messages: the model's chat template writes more than 10000 characters"),
    ],
)
def test_messages_that_the_models_template_does_not_take_are_a_400(messages, said):
    error = refusal([{"role": "user", "content": messages}])
    assert (error["message"], error["param"], error["code"]) == (said, "messages", "chat_template")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (FOR_EVER, "takes more than 0.3 s of processor time to render"),
        ("{{ lipsum(n=10000000) }}", "takes more than 0.3 s of processor time to render"),
        ("{{ 'a' * 10000000000 }}", "needs too much memory in line 1"),
        ("\n{{ 'x'.center(10000000000) }}", "needs too much memory in line 2"),
        (
            "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "needs too much memory in line 1",
        ),
        ("{{ 'a' * 20000 }}", "writes more than 10000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is nested too deeply in line 1"),
        ("{{ range(10**9) }}", "fails in line 1: a range or a number is too large"),
        ("{{ 1 / 0 }}", "fails in line 1 for these messages and variables"),
        ("{{ ''.__class__.__mro__ }}", "fails in line 1: it does what a template may not"),
        ("{% set x = messages.append(1) %}", "fails in line 1: it does what a template may not"),
        ("\n\n{% oops %}", "is not valid in line 3: Encountered unknown tag 'oops'."),
        ("{{ '\\ud800' }}", "writes what is not text"),
    ],
)
def test_a_template_of_a_request_is_bounded_as_well(own, said):
    error = refusal(given={"chat_template": own}, trust=True)
    assert error["message"] == f"chat_template_kwargs.chat_template: the chat template {said}"


def test_variables_that_are_nested_without_end_are_refused():
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    assert "nested too deeply" in refusal(given={"x": nested})["message"]


def test_a_rendering_that_nobody_waits_for_ends_and_the_next_one_is_served():
    endless = [{"role": "user", "content": "for ever"}]

    async def scenario(templates):
        nine = [asyncio.ensure_future(templates.text(endless, {})) for _ in range(9)]
        while not templates.slow_renderings:
            await asyncio.sleep(0.01)
        served = await templates.text(HI, {})
        for one in nine:
            one.cancel()
        ended = await asyncio.gather(*nine, return_exceptions=True)
        assert {type(one) for one in ended} == {asyncio.CancelledError}
        assert templates.slow_renderings == 0
        return served, await templates.text(HI, {})

    # No bound of time would end them here.
    assert run(scenario, bounds=Bounds(10_000, 0.05, 3600.0)) == ("<s><user>hi<assistant>",) * 2


def test_too_many_slow_renderings_are_a_503(monkeypatch):
    monkeypatch.setattr(chat_templates, "MAX_SLOW", 1)
    endless = [{"role": "user", "content": "for ever"}]

    async def scenario(templates):
        two = [asyncio.ensure_future(templates.text(endless, {})) for _ in range(2)]
        (refused,), (waiting,) = await asyncio.wait(two, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        return refused.exception()

    error = api_error(run(scenario, bounds=Bounds(10_000, 0.05, 3600.0)))
    assert (error.status, error.body["error"]["code"]) == (503, "overloaded") and error.retry_after_s


def test_a_server_answers_others_and_ends_while_clients_bring_endless_templates():
    server = Server("--trust-request-chat-template")
    hostile = {"messages": HI, "chat_template_kwargs": {"chat_template": FOR_EVER}}

    def ask() -> None:
        with contextlib.suppress(httpx2.HTTPError), httpx2.Client(timeout=1.0) as client:
            client.post(f"{server.url}/v1/chat/completions", json=hostile)

    clients = [threading.Thread(target=ask) for _ in range(9)]
    for client in clients:
        client.start()
    own = {"chat_template": "{{ messages[0].content }}"}
    made = server.openai().chat.completions.create(
        model=MODEL, messages=HI, max_tokens=4, extra_body={"chat_template_kwargs": own}
    )
    assert made.choices[0].message.content == answer("hi", 4)
    for client in clients:
        client.join()
    assert server.http.get("/health").is_success
    server.signal(signal.SIGTERM)
    assert server.wait() == (0, "")
