"""/open_session, /close_session, and requests that continue a session."""

from __future__ import annotations

import json
import threading

import pytest
from tokenizers import processors

from reports.record.run_record import read_record
from tests.serving.server import MODEL, Server, answer
from tests.serving.test_text_streams import byte_fallback
from workbench.serving.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def server():
    server = Server("--time-scale", "0.05", "--max-context", "2000")
    yield server
    server.await_rest()
    server.kill()


@pytest.fixture
def session(server):
    name = opened(server)
    yield name
    server.http.post("/close_session", json={"session_id": name})


def opened(server, **body) -> str:
    response = server.http.post("/open_session", json=body)
    assert response.status_code == 200, response.text
    return response.json()["session_id"]


def complete(server, prompt, **body) -> dict:
    response = server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 20, **body})
    assert response.status_code == 200, response.text
    return response.json()


def generate(server, max_tokens: int = 6, **body) -> dict:
    response = server.http.post("/generate", json={**body, "sampling_params": {"max_tokens": max_tokens}})
    assert response.status_code == 200, response.text
    return response.json()


def counts(made: dict) -> tuple[int, int, int]:
    """(prompt, cached, output) tokens."""
    usage = made["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]


def error(response, status: int) -> dict:
    found = response.json()["error"]
    assert response.status_code == status, found
    assert found["message"] and "\n" not in found["message"]
    return found


def test_the_second_turn_has_the_first_before_it_and_most_of_it_from_the_cache(server, session):
    first = complete(server, "Once upon a time", session_id=session)
    assert counts(first) == (16, 0, 20)
    second = complete(server, " and then", session_id=session)
    whole = "Once upon a time" + first["choices"][0]["text"] + " and then"
    assert second["choices"][0]["text"] == answer(whole, 20)
    assert counts(second) == (16 + 20 + 9, 16 + 20 - 1, 20)


def test_streamed_usage_counts_the_history_too(server, session):
    first = complete(server, "stream me", session_id=session)["choices"][0]["text"]
    client = server.openai()
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=" more",
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"session_id": session},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer(f"stream me{first} more", 5)
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (9 + 20 + 5, 9 + 20 - 1)
    body = {"text": "!", "stream": True, "session_id": session, "sampling_params": {"max_tokens": 3}}
    with server.http.stream("POST", "/generate", json=body) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert counts(json.loads(lines[-1][6:])) == (34 + 5 + 1, 34 + 5 - 1, 3)


def test_turns_continue_exactly_in_token_ids(server, session):
    history: list[int] = []
    for ids in ([9, 8, 7, 1000], [5], [1, 2]):
        made = generate(server, input_ids=ids, session_id=session)
        assert made["output_ids"] == generate(server, input_ids=history + ids)["output_ids"]
        history += ids + made["output_ids"]


def test_a_history_ends_where_a_stop_string_ended_the_answer(server, session):
    whole = answer("stop me", 60)
    first = complete(server, "stop me", session_id=session, max_tokens=60, stop=whole[10:14])
    assert first["choices"][0]["finish_reason"] == "stop"
    assert counts(first)[2] == 14, "up to the string, which is not in the text"
    second = complete(server, " go on", session_id=session)
    assert counts(second)[0] == 7 + 14 + 6
    assert second["choices"][0]["text"] == answer(f"stop me{whole[:14]} go on", 20)


def test_one_request_of_a_session_at_a_time_and_one_that_is_aborted_leaves_no_trace(server, session):
    before = complete(server, "a first turn", session_id=session)["choices"][0]["text"]
    stream = server.openai().completions.create(
        model=MODEL, prompt="never mind", max_tokens=1900, stream=True, extra_body={"session_id": session}
    )
    next(iter(stream))
    response = server.http.post("/v1/completions", json={"prompt": "me too", "session_id": session})
    assert error(response, 409) == {
        "message": "session_id: a request of this session has not ended yet",
        "type": "invalid_request_error",
        "param": "session_id",
        "code": "session_busy",
    }
    stream.close()
    server.await_rest()
    after = complete(server, " a second", session_id=session)
    assert counts(after)[0] == 12 + 20 + 9
    assert after["choices"][0]["text"] == answer(f"a first turn{before} a second", 20)


def test_an_abort_before_the_first_token_still_counts_the_whole_prompt(server, session):
    complete(server, "a first turn", session_id=session)
    assert server.http.post("/pause").is_success
    results = []
    asked = threading.Thread(
        target=lambda: results.append(generate(server, text="waits", session_id=session, request_id="waits"))
    )
    asked.start()
    server.await_metric("num_requests_waiting", lambda value: value == 1)
    server.http.post("/abort", json={"request_id": "waits"})
    asked.join()
    assert server.http.post("/resume").is_success
    assert results[0]["finish_reason"] == "abort" and counts(results[0]) == (12 + 20 + 5, 0, 0)


def test_a_name_may_be_chosen_and_the_state_counts_the_open_ones(server):
    before = server.http.get("/state").json()["sessions"]
    assert opened(server, session_id="mine") == "mine"
    made = opened(server)
    assert made and made != opened(server)
    assert server.http.get("/state").json()["sessions"] == before + 3
    response = server.http.post("/open_session", json={"session_id": "mine"})
    found = error(response, 400)
    assert (found["message"], found["param"]) == ("session 'mine' is open already", "session_id")
    assert server.http.post("/close_session", json={"session_id": "mine"}).json() == {"session_id": "mine"}
    response = server.http.post("/close_session", json={"session_id": "mine"})
    found = error(response, 400)
    assert (found["message"], found["param"]) == ("session 'mine' is not open", "session_id")
    for url in ("/v1/completions", "/generate"):
        body = {"prompt": "x"} if url.startswith("/v1") else {"text": "x"}
        found = error(server.http.post(url, json={**body, "session_id": "mine"}), 400)
        assert (found["code"], found["param"]) == ("unknown_session", "session_id")


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x", "n": 2}, "n"),
        ("/v1/completions", {"prompt": ["x", "y"]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": "x", "session_id": ""}, "session_id"),
        ("/v1/completions", {"prompt": "x", "session_id": 5}, "session_id"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, "session_id"),
        ("/generate", {"text": "x", "session_id": "n" * 201}, "session_id"),
        ("/open_session", {"session_id": ""}, "session_id"),
        ("/open_session", {"name": "x"}, "name"),
        ("/open_session", {"session_id": 5}, "session_id"),
        ("/close_session", {"session_id": None}, "session_id"),
        ("/close_session", {"session_id": "n" * 201}, "session_id"),
    ],
)
def test_what_a_session_cannot_take_is_named(server, session, url, body, param):
    assert error(server.http.post(url, json={"session_id": session, **body}), 400)["param"] == param


def test_a_conversation_too_long_for_the_context_is_refused_and_stays_open(server, session):
    complete(server, "x" * 1000, session_id=session, max_tokens=500)
    response = server.http.post("/v1/completions", json={"prompt": "y" * 600, "session_id": session})
    assert error(response, 400)["code"] == "prompt_exceeds_context"
    assert counts(complete(server, "short", session_id=session))[0] == 1505


def test_a_beginning_of_text_token_comes_once_in_a_session(tmp_path):
    tokenizer = byte_fallback()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    server = Server("--tokenizer", str(tmp_path))
    try:
        first, second = (tokenizer.encode(text).ids for text in ("a fox", "b"))
        assert first[0] == second[0] == 1
        name = opened(server)
        said = generate(server, text="a fox", session_id=name)["output_ids"]
        made = generate(server, text="b", session_id=name)
        assert counts(made)[0] == len(first) + 6 + len(second) - 1
        assert made["output_ids"] == generate(server, input_ids=first + said + second[1:])["output_ids"]
        assert generate(server, text="b")["output_ids"] == generate(server, input_ids=second)["output_ids"]
        made = generate(server, input_ids=second, session_id=name)
        assert counts(made)[0] == len(first) + 6 + len(second) - 1 + 6 + len(second), "ids are taken as they are"
    finally:
        server.kill()


def test_a_record_has_the_whole_prompts_of_a_session_and_whose_they_are(tmp_path):
    folder = tmp_path / "record"
    server = Server("--record", str(folder), "--time-scale", "0.05")
    try:
        opened(server, session_id="chat")
        first = complete(server, "hello", session_id="chat")["choices"][0]["text"]
        complete(server, "alone")
        assert server.http.post("/v1/completions", json={"prompt": "hi", "session_id": "no"}).status_code == 400
        complete(server, " again", session_id="chat")
        assert server.stop()[0] == 0
    finally:
        server.kill()
    requests = read_record(folder / "overlap").requests
    assert requests["session_id"] == ["chat", "", "no", "chat"]
    assert requests["input_tokens"].tolist() == [5, 5, 2, 5 + 20 + 6]
    assert requests["cached_tokens"].tolist() == [0, 0, 0, 5 + 20 - 1]
    assert requests["turn"].tolist() == [0, 0, 0, 1]
    assert requests["status"][2] == "rejected:unknown_session"
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    assert [line["prompt_token_ids"] for line in lines] == [
        ByteTokenizer().encode(text) for text in ("hello", "alone", f"hello{first} again")
    ]
    assert [line["output_length"] for line in lines] == [20, 20, 20]
