"""The official client against every endpoint it knows, streamed and not."""

from __future__ import annotations

import openai
import pytest

from tests.serving.server import MODEL, Server, answer

HI = [{"role": "user", "content": "hi"}]
HI_TEXT = "user: hi\nassistant:"


@pytest.fixture(scope="module")
def server():
    server = Server("--max-tokens", "40")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


def joined(stream) -> tuple[str, str | None]:
    text, reason = "", None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.text if hasattr(choice, "text") else choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


def test_the_model_is_listed_and_can_be_looked_up(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_a_completion_says_what_it_wrote_and_what_it_cost(client):
    made = client.completions.create(model=MODEL, prompt="tell me", max_tokens=12)
    assert made.choices[0].text == answer("tell me", 12)
    assert made.choices[0].finish_reason == "length"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (7, 12, 19)


def test_a_completion_without_a_bound_has_sixteen_tokens(client):
    assert client.completions.create(model=MODEL, prompt="x").usage.completion_tokens == 16


def test_a_streamed_completion_is_the_same_text_token_by_token(client):
    chunks = list(client.completions.create(model=MODEL, prompt="tell me", max_tokens=12, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer("tell me", 12)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_prompt_can_be_token_ids(client):
    ids = [5, 900, 77, 12]
    assert client.completions.create(model=MODEL, prompt=ids, max_tokens=9).choices[0].text == answer(ids, 9)


def test_several_prompts_times_several_choices_come_in_order(client):
    made = client.completions.create(model=MODEL, prompt=["one", "two"], n=2, seed=7, max_tokens=5)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in made.choices] == [
        answer("one", 5, 7),
        answer("one", 5, 8),
        answer("two", 5, 7),
        answer("two", 5, 8),
    ]
    assert made.usage.prompt_tokens == 6
    assert made.usage.completion_tokens == 20


def test_several_lists_of_token_ids_are_several_prompts(client):
    made = client.completions.create(model=MODEL, prompt=[[1, 2], [3]], max_tokens=4)
    assert [choice.text for choice in made.choices] == [answer([1, 2], 4), answer([3], 4)]


def test_streamed_choices_can_be_told_apart(client):
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.completions.create(model=MODEL, prompt="x", n=3, seed=1, max_tokens=6, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {i: answer("x", 6, 1 + i) for i in range(3)}


def test_a_chat_answers(client):
    made = client.chat.completions.create(model=MODEL, messages=HI, max_completion_tokens=10)
    assert made.choices[0].message.role == "assistant"
    assert made.choices[0].message.content == answer(HI_TEXT, 10)
    assert made.usage.prompt_tokens == len(HI_TEXT)


def test_a_chat_without_a_bound_takes_the_servers(client):
    assert client.chat.completions.create(model=MODEL, messages=HI).usage.completion_tokens == 40


def test_a_streamed_chat_begins_with_the_role_and_ends_with_a_reason(client):
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, max_tokens=10, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert joined(chunks) == (answer(HI_TEXT, 10), "length")


def test_the_streaming_helper_of_the_client_understands_the_stream(client):
    whole = answer(HI_TEXT, 40)
    with client.chat.completions.stream(model=MODEL, messages=HI, max_tokens=40, stop=whole[20:24]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole[:20]


def test_content_in_parts_is_text(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    made = client.chat.completions.create(model=MODEL, messages=parts, max_tokens=10)
    assert made.choices[0].message.content == answer(HI_TEXT, 10)


@pytest.mark.parametrize("create", ["completions", "chat"])
def test_usage_comes_last_in_a_stream_that_asks_for_it(client, create):
    if create == "chat":
        stream = client.chat.completions.create(
            model=MODEL, messages=HI, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    else:
        stream = client.completions.create(
            model=MODEL, prompt="hi", max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    *before, last = list(stream)
    assert all(chunk.usage is None for chunk in before)
    assert last.choices == []
    assert last.usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_a_stop_string_ends_the_text_before_it(client, stream, width):
    whole = answer("stop here", 40)
    stop = whole[20 : 20 + width]
    cut = whole[: whole.index(stop)]
    made = client.completions.create(
        model=MODEL, prompt="stop here", max_tokens=40, stop=["never!", stop], stream=stream
    )
    text, reason = joined(made) if stream else (made.choices[0].text, made.choices[0].finish_reason)
    assert (text, reason) == (cut, "stop")


def test_a_stop_token_ends_the_text_and_is_not_in_it(client):
    whole = answer("stop here", 40)
    token = ord(whole[10])
    made = client.completions.create(
        model=MODEL, prompt="stop here", max_tokens=40, extra_body={"stop_token_ids": [token]}
    )
    assert made.choices[0].text == whole[: whole.index(chr(token))]
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].stop_reason == token
    ignoring = client.completions.create(
        model=MODEL, prompt="stop here", max_tokens=40, extra_body={"stop_token_ids": [token], "ignore_eos": True}
    )
    assert ignoring.choices[0].text == whole


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_and_a_stop_token_stay_where_that_is_asked_for(client, name, stream):
    whole, chat = answer("stop here", 40), answer(HI_TEXT, 40)
    stop = whole[20:23]
    extra = {name: True}
    made = client.completions.create(
        model=MODEL, prompt="stop here", max_tokens=40, stop=stop, stream=stream, extra_body=extra
    )
    text, reason = joined(made) if stream else (made.choices[0].text, made.choices[0].finish_reason)
    assert (text, reason) == (whole[: whole.index(stop) + 3], "stop")
    token = ord(chat[10])
    made = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=40, stream=stream, extra_body={**extra, "stop_token_ids": [token]}
    )
    text, reason = joined(made) if stream else (made.choices[0].message.content, made.choices[0].finish_reason)
    assert (text, reason) == (chat[: chat.index(chr(token)) + 1], "stop")


def test_generate_keeps_the_stop_string_where_sglangs_name_asks_for_it(server):
    whole = answer("stop here", 40)
    stop = whole[20:23]
    for kept in (False, True, None):
        params = {"max_new_tokens": 40, "stop": stop, "no_stop_trim": kept}
        made = server.http.post("/generate", json={"text": "stop here", "sampling_params": params}).json()
        assert made["text"] == whole[: whole.index(stop)] + stop * bool(kept)


def test_a_chat_has_the_ids_of_its_prompt_and_of_each_choice(client):
    asked = {
        "model": MODEL,
        "messages": HI,
        "max_tokens": 8,
        "n": 2,
        "seed": 5,
        "extra_body": {"return_token_ids": True},
    }
    made = client.chat.completions.create(**asked)
    assert made.prompt_token_ids == list(HI_TEXT.encode())
    written = [list(choice.message.content.encode()) for choice in made.choices]
    assert [choice.token_ids for choice in made.choices] == written and len(written[0]) == 8
    streamed = [[], []]
    prompts = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        prompts += [chunk.prompt_token_ids] if "prompt_token_ids" in chunk.model_extra else []
        for choice in chunk.choices:
            streamed[choice.index] += choice.model_extra.get("token_ids") or []
    assert streamed == written
    assert prompts == [list(HI_TEXT.encode())] * 2, "each choice's first piece has them"
    plain = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=2)
    assert "prompt_token_ids" not in plain.model_extra and "token_ids" not in plain.choices[0].model_extra


def test_least_tokens_put_off_stop_strings_and_stop_tokens(client):
    whole = answer("stop here", 40)
    made = client.completions.create(
        model=MODEL, prompt="stop here", max_tokens=40, stop=list(set(whole[:9])), extra_body={"min_tokens": 30}
    )
    assert 30 <= made.usage.completion_tokens < 40
    token = ord(whole[3])
    made = client.completions.create(
        model=MODEL, prompt="stop here", max_tokens=40, extra_body={"stop_token_ids": [token], "min_tokens": 25}
    )
    assert made.usage.completion_tokens > 25
    assert chr(token) not in made.choices[0].text[:25]


def test_every_sampling_field_is_taken(client):
    made = client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=2,
        temperature=0.0,
        top_p=0.9,
        seed=1,
        presence_penalty=0.1,
        user="me",
        frequency_penalty=-0.1,
        logit_bias={"5": 1.0},
        best_of=1,
        echo=False,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "priority": 3, "skip_special_tokens": False},
    )
    assert made.usage.completion_tokens == 2
    made = client.completions.create(model=MODEL, prompt="x", max_tokens=2, extra_body={"top_k": 10**30})
    assert made.usage.completion_tokens == 2, "more than there are tokens: all of them"


def test_a_prompt_seen_before_is_counted_as_cached(client):
    prompt = "a prompt that nobody else has written so far, " * 4
    first = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
    again = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1


def test_a_client_sees_the_errors_it_has_classes_for(client):
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
