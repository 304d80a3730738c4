"""Run libraries that applications build structured output and tools on, as they are, against a server of this project.

    python tests/clients/structured.py [NAME ...]       (or: make clients)

Each is installed, at the version below, in an environment of its own below WORKBENCH_CLIENTS (default
~/.cache/workbench-clients), which takes a network. The server is a modelled GPU whose answers are made up: what they say
means nothing, and that they can be read is all the grammar's. lm-eval needs log probabilities: its server has a model of
random weights.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

INSTRUCTOR = """
import instructor, openai, pydantic, sys
from typing import Literal

class Person(pydantic.BaseModel):
    name: Literal["Ada", "Emmy"]
    age: int = pydantic.Field(ge=0, le=99)

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    made = instructor.from_openai(client, mode=mode)
    person = made.chat.completions.create(
        model="llama-3.1-8b", response_model=Person, max_tokens=300, messages=[{"role": "user", "content": "who?"}]
    )
    assert isinstance(person, Person)
print("fine")
"""

OUTLINES = """
import openai, outlines, pydantic, sys
from typing import Literal

class Person(pydantic.BaseModel):
    name: Literal["Ada", "Emmy"]
    age: int

    model_config = {"extra": "forbid"}

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
model = outlines.from_openai(client, "llama-3.1-8b")
Person.model_validate_json(model("who?", Person, max_tokens=300))
model = outlines.from_vllm(client, "llama-3.1-8b")
Person.model_validate_json(model("who?", Person, max_tokens=300))
assert model("which?", Literal["yes", "no"], max_tokens=300) in ("yes", "no")
print("fine")
"""

LANGCHAIN = """
import pydantic, sys
from typing import Literal
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

class Person(pydantic.BaseModel):
    name: Literal["Ada", "Emmy"]
    happy: bool

@tool
def rain(city: Literal["Rome", "Oslo"]) -> str:
    "How wet it is."
    return "wet"

model = ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model="llama-3.1-8b", max_tokens=300)
for method in ("json_schema", "function_calling"):
    assert isinstance(model.with_structured_output(Person, method=method).invoke("who?"), Person)
calls = model.bind_tools([rain], tool_choice="required").invoke("rain?").tool_calls
assert calls and all(call["name"] == "rain" and call["args"]["city"] in ("Rome", "Oslo") for call in calls)
streamed = None
for piece in model.bind_tools([rain], tool_choice="rain").stream("rain?"):
    streamed = piece if streamed is None else streamed + piece
assert streamed.tool_calls[0]["args"]["city"] in ("Rome", "Oslo")
print("fine")
"""

AGENTS = """
import asyncio, pydantic, sys
from typing import Literal
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents import set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
called = []

class Person(pydantic.BaseModel):
    name: Literal["Ada", "Emmy"]

@function_tool
def rain(city: Literal["Rome", "Oslo"]) -> str:
    called.append(city)
    return "wet"

async def main():
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model="llama-3.1-8b", openai_client=client)
        settings = ModelSettings(tool_choice="required", max_tokens=300, parallel_tool_calls=False)
        called.clear()
        agent = Agent(name="a", instructions="say it", model=model, tools=[rain], model_settings=settings)
        result = await Runner.run(agent, "rain?")
        assert called and called[0] in ("Rome", "Oslo") and result.final_output
        typed = Agent(name="b", model=model, output_type=Person, model_settings=ModelSettings(max_tokens=300))
        assert isinstance((await Runner.run(typed, "who?")).final_output, Person)
        streamed = Runner.run_streamed(Agent(name="c", model=model, model_settings=ModelSettings(max_tokens=80)), "hi")
        kinds = {event.type async for event in streamed.stream_events()}
        assert "raw_response_event" in kinds and streamed.final_output

asyncio.run(main())
print("fine")
"""

LM_EVAL = """
import json, pathlib, sys
import lm_eval
from lm_eval.tasks import TaskManager

folder = pathlib.Path("task")
folder.mkdir(exist_ok=True)
rows = [{"q": f"the {i}th is", "choices": ["red", "blue", "a longer answer"], "answer": i % 3} for i in range(6)]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "local.yaml").write_text(f'''
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {(folder / "rows.jsonl").resolve()}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
''')
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": sys.argv[2],
        "base_url": sys.argv[1] + "/v1/completions",
        "tokenizer": sys.argv[2],
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_retries": 1,
    },
    tasks=["local_choice"],
    task_manager=TaskManager(include_path=str(folder)),
    bootstrap_iters=0,
)
assert 0 <= found["results"]["local_choice"]["acc,none"] <= 1
samples = found["samples"]["local_choice"]
assert len(samples) == 6 and all(value[0][0] < 0 for sample in samples for value in sample["resps"])
print("fine")
"""


@dataclass(frozen=True)
class Library:
    """A library, what is installed for it, and a program that uses it: it gets the server's address, and its model."""

    packages: tuple[str, ...]
    program: str
    real: bool = False
    """Its server computes a model."""


LIBRARIES = {
    "instructor": Library(("instructor==1.17.0",), INSTRUCTOR),
    "outlines": Library(("outlines==1.3.3", "openai==2.30.0"), OUTLINES),
    "langchain-openai": Library(("langchain-openai==1.7.4",), LANGCHAIN),
    "openai-agents": Library(("openai-agents==0.24.0",), AGENTS),
    "lm-eval": Library(("lm-eval[api]==0.4.13", "transformers==5.23.0"), LM_EVAL, real=True),
}


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(LIBRARIES))
    if unknown:
        print(f"no such library: {', '.join(unknown)}; there are {', '.join(LIBRARIES)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from tests.clients.run_clients import environment, run
    from tests.serving.server import Server

    fine = True
    for name in names or LIBRARIES:
        library = LIBRARIES[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            bin = environment(name, *library.packages) / "bin"
            (folder / "program.py").write_text(library.program)
            model = _random_model(folder / "model") if library.real else "llama-3.1-8b"
            flags = (
                ("--dtype", "fp32") if library.real else ("--tool-parser", "hermes", "--simulated-output-tokens", "12")
            )
            server = Server(*flags, model=model, backend="cpu" if library.real else "simulated")
            try:
                said = run([bin / "python", "program.py", server.url, model], folder)
            finally:
                server.kill()
        good = said.rstrip().endswith("fine")
        fine &= good
        print(f"{name}: {'fine' if good else 'not fine'}", flush=True)
        if not good:
            print(said[-3000:], file=sys.stderr)
    return 0 if fine else 1


def _random_model(folder: Path) -> str:
    import json

    from tests.serving.test_text_streams import TOKENIZERS
    from tests.torch.tiny import make

    tokenizer = TOKENIZERS["byte-level"]
    folder.mkdir()
    make("LlamaForCausalLM", folder, vocab_size=tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
