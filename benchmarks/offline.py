"""The field's offline benchmark: 256 prompts at once, lengths uniform in 100 to 1024, against transformers in the same run.

    python benchmarks/offline.py                                     # on a GPU: Qwen3-0.6B's shape, bf16, all of it
    python benchmarks/offline.py --requests 8 --scale 0.1 --layers 4 # on a CPU: a slice of it, of a smaller model

Dummy weights, stops by length alone. The requests: Python's ``random`` seeded with 0; for each prompt a length
``randint(100, 1024)`` and that many ids ``randint(0, 10000)``; after all prompts, as many output lengths
``randint(100, 1024)``. Prints tokens a second and the ratio to transformers' own generate (or continuous batching on a
GPU) on the same model; writes JSON under ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends.torch.backend import TorchBackend, make_backend
from backends.torch.workers import RunnerOptions
from workbench.instance import LoopSpec, Recipe, start
from workbench.loops.drive import drive
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.messages import Generate
from workbench.scheduler.request import SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-14b": {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    # No model at all: for running a benchmark's code on a CPU.
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "head_dim": 16,
        "vocab_size": 10240,
        "eos_token_id": 2,
    },
}


CAPTURE_SIZES = (1, 2, 4, *range(8, 257, 8))
"""Decode batches that are captured as CUDA graphs."""


class Over(Exception):
    """Every request has ended."""


class Inbox:
    """All requests at once, then nothing."""

    def __init__(self, messages: list[object]) -> None:
        self._messages = messages

    def drain(self) -> list[object]:
        messages, self._messages = self._messages, []
        return messages

    def arrival(self) -> Any:
        def wait() -> None:
            if not self._messages:
                raise Over

        return wait


class Counter:
    """An outbox that counts tokens."""

    def __init__(self) -> None:
        self.tokens = self.ended = 0

    def scheduled(self, batch: Any) -> None:
        """Nothing to note."""

    def send(self, result: Any) -> None:
        for req in result.ended:
            self.tokens += req.output_len
            self.ended += 1


def requests(count: int, scale: float) -> tuple[list[list[int]], list[int]]:
    """The field's prompts and output lengths; ``scale`` shortens both."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))] for _ in range(count)]
    outputs = [draw.randint(100, 1024) for _ in range(count)]
    if scale != 1:
        prompts = [prompt[: max(int(len(prompt) * scale), 1)] for prompt in prompts]
        outputs = [max(int(length * scale), 1) for length in outputs]
    return prompts, outputs


def write_shape(name: str, layers: int | None, folder: Path) -> Path:
    """A config.json of a shape, its vocabulary and heads as in the original."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
        **SHAPES[name],
    }
    if layers is not None:
        config["num_hidden_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_once(backend: TorchBackend, loop: str, prompts: list[list[int]], outputs: list[int]) -> tuple[float, int]:
    """(seconds, output tokens) of one pass over all requests."""
    config = SchedulerConfig(backend.kv_tokens, min(backend.max_context, backend.kv_tokens + 1), max_running=256)
    recipe = Recipe(loop=LoopSpec(loop), scheduler=config, eos_token_ids=backend.eos_token_ids)
    messages: list[object] = [
        Generate(f"r{i}", np.array(prompt, np.int32), SamplingParams(length, ignore_eos=True, temperature=0.0))
        for i, (prompt, length) in enumerate(zip(prompts, outputs, strict=True))
    ]
    counter = Counter()
    instance = start(recipe, backend, lambda scheduler: (Inbox(messages), counter))
    began = time.perf_counter()
    with contextlib.suppress(Over):
        drive(instance.loop, backend.rested)
    seconds = time.perf_counter() - began
    assert counter.ended == len(prompts) and counter.tokens == sum(outputs), "every request must write what was asked"
    return seconds, counter.tokens


def transformers_repeatedly(
    folder: Path, device: str, prompts: list[list[int]], outputs: list[int], repetitions: int
) -> Iterator[tuple[float, int, str]]:
    """(seconds, output tokens, how) of transformers on the same shape, once a repetition: its continuous batching on a GPU,
    one request after another on a CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
    if device == "cuda":
        settings = GenerationConfig(max_new_tokens=max(outputs), do_sample=False, eos_token_id=-1, pad_token_id=0)
        with model.continuous_batching_context_manager(generation_config=settings, block=True, timeout=5) as manager:
            _generate(manager, prompts, [4] * len(prompts))  # starts and warms up
            for _ in range(repetitions):
                began = time.perf_counter()
                tokens = _generate(manager, prompts, outputs)
                seconds = time.perf_counter() - began
                assert tokens == sum(outputs), f"transformers wrote {tokens} of {sum(outputs)} tokens"
                yield seconds, tokens, "continuous batching"
        return
    for _ in range(repetitions):
        began = time.perf_counter()
        for prompt, length in zip(prompts, outputs, strict=True):
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
            assert out.shape[1] == len(prompt) + length
        yield time.perf_counter() - began, sum(outputs), "generate, one request after another"


def _generate(manager: Any, prompts: list[list[int]], outputs: list[int]) -> int:
    """Run requests through transformers' continuous batching; output tokens."""
    for prompt, length in zip(prompts, outputs, strict=True):
        manager.add_request(prompt, max_new_tokens=length)
    ended = tokens = 0
    while ended < len(prompts):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' generation thread ended early")
        elif result.is_finished():
            ended += 1
            tokens += len(result.generated_tokens)
    return tokens


def make_options(folder: Path, device: str, prompts: list[list[int]], outputs: list[int]) -> RunnerOptions:
    """A runner of dummy weights that holds these requests: on a GPU in bfloat16 with as much KV as fits and CUDA graphs."""
    longest = max(len(prompt) + length for prompt, length in zip(prompts, outputs, strict=True))
    on_gpu = device == "cuda"
    return RunnerOptions(
        str(folder),
        device,
        "bfloat16" if on_gpu else "float32",
        load_format="dummy",
        rows=256,
        max_context=longest + 1,
        kv_tokens=None if on_gpu else sum(map(len, prompts)) + sum(outputs) + 512,
        capture_sizes=CAPTURE_SIZES if on_gpu else (),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape has")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--scale", type=float, default=1.0, help="shortens prompts and outputs")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/offline"))
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts, outputs = requests(given.requests, given.scale)
    folder = write_shape(given.shape, given.layers, given.out / "model")
    options = make_options(folder, device, prompts, outputs)
    began = time.perf_counter()
    backend = make_backend(options, lambda row: None)
    print(f"{given.shape} on {device}: {backend.kv_tokens:,} KV tokens, ready in {time.perf_counter() - began:.1f} s")
    print(f"{len(prompts)} requests, {sum(map(len, prompts)):,} tokens in, {sum(outputs):,} out")
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "arguments": vars(given) | {"out": ""}}
    run_once(backend, "overlap", prompts[:2], [2, 2])  # compiles and warms up
    for loop in ("normal", "overlap"):
        speeds = []
        for _ in range(given.repetitions):
            seconds, tokens = run_once(backend, loop, prompts, outputs)
            speeds.append(tokens / seconds)
        result[loop] = speeds
        print(
            f"{loop:8} {statistics.median(speeds):10,.1f} output tokens/s  ({min(speeds):,.1f} to {max(speeds):,.1f})"
        )
    print(f"overlap / normal: {statistics.median(result['overlap']) / statistics.median(result['normal']):.3f}")
    backend.close()
    del backend
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    if not given.no_transformers:
        ((seconds, tokens, how),) = transformers_repeatedly(folder, device, prompts, outputs, 1)
        result["transformers"] = {"tokens_per_s": tokens / seconds, "how": how}
        ratio = statistics.median(result["overlap"]) / (tokens / seconds)
        print(f"transformers {tokens / seconds:,.1f} output tokens/s ({how}); ours is {ratio:.2f} times that")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"written: {given.out / 'result.json'}")


if __name__ == "__main__":
    main()
