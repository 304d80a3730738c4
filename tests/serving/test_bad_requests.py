"""Whatever a client gets wrong is named, in OpenAI's shape, and harms nobody else."""

from __future__ import annotations

import pytest

from tests.serving.server import MODEL, Server, answer
from workbench.serving.http.bodies import CompletionRequest, parse
from workbench.serving.refusals import Refusal

JSON = {"content-type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "model": MODEL}
TEXT = {"prompt": "hi", "model": MODEL}


@pytest.fixture(scope="module")
def server():
    server = Server("--max-context", "256", "--kv-tokens", "400", "--max-body-bytes", "20000")
    yield server
    assert server.openai().completions.create(model=MODEL, prompt="fine", max_tokens=3).choices[0].text == answer(
        "fine", 3
    )
    server.await_rest()
    server.kill()


@pytest.fixture(scope="module")
def locked():
    server = Server("--api-key", "sesame", "--served-model-name", "door")
    yield server
    server.kill()


def refused(response, status: int) -> dict:
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


CASES = [
    ({**TEXT, "temperature": -0.1}, "temperature"),
    ({**TEXT, "temperature": "hot"}, "temperature"),
    ({**TEXT, "top_p": 0}, "top_p"),
    ({**TEXT, "top_p": 1.1}, "top_p"),
    ({**TEXT, "top_k": -2}, "top_k"),
    ({**TEXT, "min_p": 2}, "min_p"),
    ({**TEXT, "repetition_penalty": 0}, "repetition_penalty"),
    ({**TEXT, "presence_penalty": 3}, "presence_penalty"),
    ({**TEXT, "frequency_penalty": -3}, "frequency_penalty"),
    ({**TEXT, "max_tokens": -1}, "max_tokens"),
    ({**TEXT, "max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({**TEXT, "max_tokens": True}, "max_tokens"),
    ({**TEXT, "prompt": [8.5]}, "prompt"),
    ({**TEXT, "logit_bias": {"8.5": 1}}, "logit_bias"),
    ({**TEXT, "max_tokens": 1 << 40}, "max_tokens"),
    ({**TEXT, "max_tokens": 2.5}, "max_tokens"),
    ({**TEXT, "min_tokens": 17}, "min_tokens"),
    ({**TEXT, "min_tokens": -1}, "min_tokens"),
    ({**TEXT, "n": 0}, "n"),
    ({**TEXT, "n": 1000}, "n"),
    ({**TEXT, "seed": 1 << 70}, "seed"),
    ({**TEXT, "stop": ""}, "stop"),
    ({**TEXT, "stop": ["a"] * 17}, "stop"),
    ({**TEXT, "stop": ["a" * 1001]}, "stop"),
    ({**TEXT, "stop": 5}, "stop"),
    ({**TEXT, "stop_token_ids": [-1]}, "stop_token_ids"),
    ({**TEXT, "stop_token_ids": [1 << 30]}, "stop_token_ids"),
    ({**TEXT, "logit_bias": {"x": 1}}, "logit_bias"),
    ({**TEXT, "logit_bias": {"1": 101}}, "logit_bias"),
    ({**TEXT, "logit_bias": {"99999999": 1}}, "logit_bias"),
    ({**TEXT, "priority": 1 << 40}, "priority"),
    ({**TEXT, "request_id": ""}, "request_id"),
    ({**TEXT, "request_id": "two\nlines"}, "request_id"),
    ({**TEXT, "request_id": "x\r\nset-cookie: a=b", "stream": True}, "request_id"),
    ({**CHAT, "request_id": "\u65e5"}, "request_id"),
    ({**TEXT, "slo_ttft_s": 0}, "slo_ttft_s"),
    ({**TEXT, "slo_ttft_s": "soon"}, "slo_ttft_s"),
    ({**CHAT, "slo_tpot_s": -1}, "slo_tpot_s"),
    ({**TEXT, "cache_salt": ""}, "cache_salt"),
    ({**TEXT, "echo": True, "stream": True}, "echo"),
    ({**TEXT, "best_of": 4}, "best_of"),
    ({**TEXT, "suffix": "end"}, "suffix"),
    ({**TEXT, "logprobs": 3}, "logprobs"),
    ({**TEXT, "logprobs": 50}, "logprobs"),
    ({**TEXT, "stream_options": {"include_usage": True}}, "stream_options"),
    ({**TEXT, "stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({**TEXT, "temprature": 1}, "temprature"),
    ({**TEXT, "prompt": None}, "prompt"),
    ({**TEXT, "prompt": ""}, "prompt"),
    ({**TEXT, "prompt": []}, "prompt"),
    ({**TEXT, "prompt": ["a", 1]}, "prompt"),
    ({**TEXT, "prompt": [[1], []]}, "prompt"),
    ({**TEXT, "prompt": [True]}, "prompt"),
    ({**TEXT, "prompt": [-1]}, "prompt"),
    ({**TEXT, "prompt": [1 << 40]}, "prompt"),
    ({**TEXT, "prompt": ["a"] * 300}, "n"),
    ({"model": MODEL}, "prompt"),
    ({"model": MODEL, "messages": []}, "messages"),
    ({"model": MODEL, "messages": "hi"}, "messages"),
    ({**CHAT, "messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    ({**CHAT, "messages": [{"role": "user"}]}, "messages[0].content"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({**CHAT, "messages": [{"role": "user", "content": "x", "mood": "glad"}]}, "messages[0].mood"),
    ({**CHAT, "messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
    ({**CHAT, "tools": [{"type": "function"}]}, "tools[0]"),
    ({**CHAT, "top_logprobs": 2}, "top_logprobs"),
    ({**CHAT, "logprobs": True}, "logprobs"),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({**CHAT, "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
]


@pytest.mark.parametrize(("body", "param"), CASES)
def test_a_wrong_field_is_a_400_that_names_it(server, body, param):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    error = refused(server.http.post(path, json=body), 400)
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_a_number_that_is_none_is_refused(server, value):
    error = refused(
        server.http.post("/v1/completions", content=f'{{"prompt": "x", "temperature": {value}}}', headers=JSON), 400
    )
    assert (error["code"], error["param"]) == ("invalid_json", None)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"{'a': 1}", b"\xff\xfe", b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_not_a_json_object_is_a_400(server, body):
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/abort"):
        refused(server.http.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"prompt": "x \\ud83d"}', "a text has half of a surrogate pair"),
        (b'{"prompt": "\\ud83d and more text behind it"}', "a text has half of a surrogate pair"),
        (b'{"\\udc00": 1}', "a text has half of a surrogate pair"),
        (b'\xef\xbb\xbf{"prompt": ["\\ud83d\\ud83d"]}', "a text has half of a surrogate pair"),
        (b'{"prompt": "x \\ud83d', "Input data was truncated"),
        (b'{"prompt": "\\ud83d\\ude00"', "Input data was truncated"),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
        (b'{"temperature": NaN}', "JSON is malformed: invalid character (byte 16)"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b'{"prompt": "x",}', "JSON is malformed: trailing comma in object (byte 15)"),
    ],
)
def test_why_a_body_is_not_json_is_true(body, why):
    with pytest.raises(Refusal) as caught:
        parse(body, CompletionRequest)
    assert str(caught.value) == f"the body is not valid JSON: {why}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_the_context_is_a_400(server, stream):
    error = refused(server.http.post("/v1/completions", json={**TEXT, "prompt": [5] * 255, "stream": stream}), 400)
    assert error["code"] == "context_length_exceeded"
    refused(server.http.post("/generate", json={"input_ids": [5] * 300, "stream": stream}), 400)


def test_the_longest_prompt_that_fits_gets_its_one_token(server):
    made = server.http.post("/v1/completions", json={**TEXT, "prompt": [5] * 254}).json()
    assert made["usage"]["completion_tokens"] == 1
    assert made["choices"][0]["finish_reason"] == "length"


def test_another_model_is_a_404(server):
    error = refused(server.http.post("/v1/completions", json={**TEXT, "model": "gpt-4"}), 404)
    assert error["code"] == "model_not_found"
    refused(server.http.get("/v1/models/gpt-4"), 404)


def test_another_path_is_a_404_and_another_method_a_405(server):
    refused(server.http.get("/v1/nothing"), 404)
    refused(server.http.get("/v1/completions"), 405)


def test_a_body_beyond_the_limit_is_a_413(server):
    error = refused(server.http.post("/v1/completions", json={**TEXT, "prompt": "x" * 20000}), 413)
    assert "20000" in error["message"]


def test_a_body_beyond_the_limit_is_a_413_also_when_it_does_not_say_its_length(server):
    def pieces():
        for _ in range(30):
            yield b"x" * 1000

    refused(server.http.post("/v1/completions", content=pieces(), headers=JSON), 413)


@pytest.mark.parametrize("header", [None, "sesame", "Bearer wrong", "Bearer", "Bearer sesamé"])
def test_a_wrong_key_is_a_401(locked, header):
    headers = {} if header is None else {"authorization": header.encode()}
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/generate"),
        ("POST", "/pause"),
        ("POST", "/abort"),
        ("POST", "/flush_cache"),
        ("POST", "/resume"),
        ("GET", "/state"),
        ("POST", "/settings"),
    ):
        error = refused(locked.http.request(method, path, headers=headers), 401)
        assert error["code"] == "invalid_api_key"


def test_the_right_key_opens_and_health_and_metrics_need_none(locked):
    client = locked.openai(api_key="sesame")
    assert [model.id for model in client.models.list()] == ["door"]
    assert client.completions.create(model="door", prompt="x", max_tokens=2).choices[0].text == answer("x", 2)
    assert locked.http.get("/health").is_success
    assert locked.http.get("/metrics").is_success


def test_errors_are_counted(server):
    refused(server.http.post("/v1/completions", content=b"{", headers=JSON), 400)
    before = server.metric("request_refused_total", status="400")
    server.http.post("/v1/completions", content=b"{}", headers=JSON)
    assert server.metric("request_refused_total", status="400") == before + 1


@pytest.mark.parametrize(
    ("header", "value"), [("x-slo-ttft-s", "soon"), ("x-slo-ttft-ms", "-1"), ("x-slo-tpot-ms", "inf")]
)
def test_a_wrong_objective_in_a_header_is_a_400_that_names_the_header(server, header, value):
    error = refused(server.http.post("/v1/completions", json=TEXT, headers={header: value}), 400)
    assert error["param"] == header
    assert error["message"] in (f"{header}: 'soon' is not a number", f"{header}: {value} is not positive and finite")


def test_a_page_of_another_origin_changes_nothing_and_a_body_has_to_be_json(server):
    page = {"origin": "https://evil.example"}
    changing = "pause resume flush_cache stop_profile abort generate v1/completions settings nothing"
    for path in changing.split():
        assert refused(server.http.post(f"/{path}", headers=page), 403)["code"] == "origin_not_allowed"
        error = refused(server.http.post(f"/{path}", content=b"{}", headers={"content-type": "text/plain"}), 415)
        assert error["code"] == "unsupported_media_type"
    refused(server.http.get("/state", headers={"host": "evil.example"}), 403)
    assert server.metric("scheduler_paused") == 0


def test_a_page_that_is_let_in_gets_its_errors_and_its_answers():
    server = Server("--allow-origin", "https://app.example", "--allow-host", "box.example")
    page = {"origin": "https://app.example", "host": "box.example"}
    for body, status in (({**TEXT, "max_tokens": 1}, 200), ({**TEXT, "n": 0}, 400)):
        answered = server.http.post("/v1/completions", json=body, headers=page)
        assert (answered.status_code, answered.headers["access-control-allow-origin"]) == (
            status,
            "https://app.example",
        )
    server.kill()
