"""/update_weights_from_disk, /start_profile and /stop_profile on a server with a tiny real model."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from reports.record.run_record import read_record  # noqa: E402
from tests.patience import until  # noqa: E402
from tests.serving.server import Server  # noqa: E402
from tests.serving.test_text_streams import TOKENIZERS  # noqa: E402
from tests.torch.checkpoints import altered  # noqa: E402
from tests.torch.live import backend_of, greedy, messages, serve, spans  # noqa: E402
from tests.torch.tiny import prompts  # noqa: E402

TOKENIZER = TOKENIZERS["byte-level"]
(PROMPT,) = prompts((40,))
NEW = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models ``old`` and ``new``, which have the same shape."""
    folder = tmp_path_factory.mktemp("control")
    altered(folder / "old", folder / "new", vocab_size=TOKENIZER.get_vocab_size())
    TOKENIZER.save(str(folder / "old" / "tokenizer.json"))
    (folder / "old" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.fixture(scope="module")
def server(place):
    server = Server(
        "--kv-tokens",
        "2000",
        "--record",
        f"{place}/record",
        "--loop",
        "overlap",
        "--profile-dir",
        f"{place}/profiles",
        model=f"{place}/old",
        backend="cpu",
    )
    yield server
    server.kill()


def generate(server, new: int = NEW) -> tuple[list[int], int]:
    """(what the model writes to PROMPT, tokens of it that were found in the prefix cache)."""
    sampling = {"max_tokens": new, "temperature": 0, "ignore_eos": True}
    made = server.http.post("/generate", json={"input_ids": PROMPT, "sampling_params": sampling}).json()
    return made["output_ids"], made["usage"]["prompt_tokens_details"]["cached_tokens"]


def update(server, folder):
    return server.http.post("/update_weights_from_disk", json={"model_path": str(folder)})


def by_a_fresh_runner(folder) -> list[int]:
    backend = backend_of(str(folder))
    tokens = serve(backend, [messages([PROMPT], greedy(NEW))], max_running=8).outputs["r0"]
    backend.close()
    return tokens


def test_after_an_update_the_server_writes_what_the_new_checkpoint_does(server, place):
    old, new = (by_a_fresh_runner(place / name) for name in ("old", "new"))
    assert old != new
    assert [generate(server), generate(server)] == [(old, 0), (old, len(PROMPT) - 1)]
    refused = update(server, place / "nowhere")
    assert refused.status_code == 400
    line = f"{place}/nowhere: not a folder with a config.json; weights are updated from a local one"
    assert refused.json()["error"] | {"message": line, "param": "model_path"} == refused.json()["error"]
    assert generate(server) == (old, len(PROMPT) - 1)

    taken = update(server, place / "new")
    assert taken.status_code == 200, taken.text
    assert taken.json() == {"success": True, "message": f"serving the weights of {place}/new"}
    assert [generate(server), generate(server)] == [(new, 0), (new, len(PROMPT) - 1)]


def test_a_request_on_its_way_goes_on_after_an_update_and_gets_all_its_tokens(server, place):
    body = {"input_ids": PROMPT, "stream": True, "sampling_params": {"max_tokens": 150, "ignore_eos": True}}
    with server.http.stream("POST", "/generate", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        pieces = [json.loads(next(lines)[6:])]
        assert update(server, place / "old").status_code == 200
        pieces += [json.loads(line[6:]) for line in lines]
    assert sum(len(piece["output_ids"]) for piece in pieces) == 150
    assert pieces[-1]["finish_reason"] == "length"
    server.await_metric("num_preemptions_total", lambda value: value == 1)


def test_a_paused_server_takes_an_update_and_answers_it(server, place):
    server.http.post("/pause")
    assert update(server, place / "new").status_code == 200
    server.http.post("/resume")
    assert generate(server)[0] == by_a_fresh_runner(place / "new")


def test_a_profile_ends_by_itself_or_when_it_is_told_or_with_the_server(server, place):
    def post(path: str, **body: object):
        return server.http.post(path, json=body)

    folders = [place / "profiles" / str(i) for i in range(3)]
    traces = [folder / "rank-0.json.gz" for folder in folders]

    def start(folder, **body: object):
        return post("/start_profile", output_dir=folder.name, **body)

    assert start(folders[0]).json() == {"status": "ok"}
    line = f"a profile is running already, for {folders[0]}"
    again = start(folders[1])
    assert (again.status_code, again.json()["error"]["message"]) == (400, line)
    assert again.json()["error"]["param"] is None, "nothing is wrong with the folder"
    generate(server)
    assert post("/stop_profile").json() == {"status": "ok", "files": [str(traces[0])]}
    refused = start(folders[0])
    line = f"output_dir: {traces[0]} exists and is not overwritten; name another folder"
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, line)
    assert refused.json()["error"]["param"] == "output_dir"

    assert start(folders[1], num_steps=3).is_success
    generate(server)
    until(traces[1].is_file, "the trace")
    assert post("/stop_profile").json()["error"]["message"] == "no profile is running"

    for name in ("new", "old", "new"):
        assert update(server, place / name).is_success
    assert start(folders[2], num_steps=1000).is_success
    generate(server)
    code, said = server.stop()
    assert code == 0, said
    assert [len(spans(trace)) for trace in traces] == [NEW, 3, NEW]

    notes = read_record(place / "record" / "overlap").meta["trace"]["notes"]
    assert [note.split(": ")[-1] for note in notes[-3:]] == [f"{place}/{name}" for name in ("new", "old", "new")]
    assert notes[-3].startswith("weights updated after ")
