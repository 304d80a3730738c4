"""Record an engine's own decisions anew, in an environment of its own.

    python benchmarks/recordings/record.py vllm 0.33.0 OUT.json.gz [--cases tight,few-rows] [--seeds 0-1]

Makes a virtual environment outside the checkout, fetches the engine's wheel and unpacks its Python files into it (no
kernels, no GPU: most of what the wheel depends on is never imported), installs the light packages that those files
need, writes the config.json of a small Llama, and runs the engine's script of this folder there. A second run finds
all that in place. What is not known here is passed to that script: its own --help says what it takes.

Packages come from where pip gets them. A build of torch for CPU is enough and smaller: pip takes it where
PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS offers one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # The scenarios: this project need not be installed.

from recording import add_arguments, chosen_cases, refuse  # noqa: E402

from workbench.parity.scenarios import CONTEXT_TOKENS  # noqa: E402

MARK = "recordings.txt"
"""In an environment made here: the engine and version that it holds, or that it is not whole."""
TORCH = "torch==2.13.0"
"""Whatever the wheel asks for: a scheduler without a model needs any torch."""

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""The config.json that an engine is given. No weights: nothing is computed."""


@dataclass(frozen=True)
class Engine:
    """How to get at an engine's scheduler."""

    script: str
    """Of this folder. Run by the environment's interpreter, with $MODEL, and the project and the engine on PYTHONPATH."""
    imports: tuple[str, ...]
    """Packages that its files import on the way to the scheduler, in one version or another. The wheel says which of them
    it needs, and in which versions; the rest of what it needs is left out."""
    besides: tuple[str, ...] = ()
    """Packages that they import too, and that the wheel does not name."""
    keep: tuple[str, ...] = (".py",)
    """Ends of the names of the files that are unpacked."""
    download: tuple[str, ...] = ()
    """Options of ``pip download``, where its wheel needs some to be found."""
    variables: tuple[tuple[str, str], ...] = ()
    """Of the environment that its script runs in, with their values."""
    modules: tuple[tuple[str, str], ...] = ()
    """Versions that its script can drive, each with the module of this folder that does; none: the script drives any."""


ENGINES = {
    "vllm": Engine(
        script="record_vllm.py",
        imports=(
            *("aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "diskcache", "einops", "fastapi", "gguf"),
            *("llguidance", "mistral_common", "msgspec", "numpy", "openai", "openai-harmony", "oss-harmony"),
            *("partial-json-parser", "pillow", "prometheus_client", "psutil", "py-cpuinfo", "pybase64", "pydantic"),
            *("pyyaml", "pyzmq", "regex", "requests", "setproctitle", "transformers", "xgrammar"),
        ),
        besides=("uvloop",),
        variables=(("VLLM_LOGGING_LEVEL", "ERROR"), ("CUDA_VISIBLE_DEVICES", "")),
    ),
    "sglang": Engine(
        script="record_sglang.py",
        imports=(
            *("aiohttp", "apache-tvm-ffi", "compressed-tensors", "einops", "fastapi", "gguf", "ipython", "loguru"),
            *("msgspec", "numpy", "nvidia-ml-py", "openai", "opentelemetry-api", "orjson", "packaging"),
            *("partial-json-parser", "pillow", "psutil", "pybase64", "pydantic", "python-multipart", "pyzmq", "regex"),
            *("requests", "scipy", "sentencepiece", "setproctitle", "tqdm", "transformers", "uvicorn", "watchfiles"),
            "zstandard",
        ),
        besides=("dill", "loguru", "triton"),
        # The tree in Rust, and headers of kernels that are never compiled but looked for.
        keep=(".py", ".so", ".json", ".cuh", ".h"),
        download=("--python-version=3.11", "--platform=manylinux_2_34_x86_64"),
        variables=(("OMP_NUM_THREADS", "1"), ("CUDA_VISIBLE_DEVICES", "")),
        modules=(("0.5.23", "sglang_0_5_23"), ("0.5.10.post1", "sglang_0_5_10")),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Record an engine's own decisions anew, in an environment of its own.",
        epilog="All else is passed to the engine's script.",
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("version", help="as its wheel has it, for instance 0.33.0")
    add_arguments(parser)
    parser.add_argument("--venv", type=Path, help="the environment's folder (one under the user's cache folder)")
    parser.add_argument("--wheels", type=Path, help="a folder with the engine's wheel, or to keep it in")
    asked, more = parser.parse_known_args()
    cases = chosen_cases(asked.engine, asked.cases)
    engine = ENGINES[asked.engine]
    if engine.modules and asked.version not in dict(engine.modules):
        refuse(f"{asked.engine} {asked.version}: {engine.script} drives {', '.join(dict(engine.modules))}")
    venv = (asked.venv or cache() / f"{asked.engine}-{asked.version}").resolve()
    prepare(venv, asked.engine, asked.version, asked.wheels)
    variables = {"MODEL": str(venv / "model"), "PYTHONPATH": os.pathsep.join([str(ROOT), str(venv / "engine")])}
    command = [str(venv / "bin" / "python"), str(HERE / engine.script), str(asked.out), "--cases", ",".join(cases)]
    command += ["--seeds", f"{asked.seeds[0]}-{asked.seeds[-1]}", *more]
    sys.exit(subprocess.run(command, env=os.environ | dict(engine.variables) | variables).returncode)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "workbench" / "recordings"


def prepare(venv: Path, name: str, version: str, wheels: Path | None) -> None:
    """Make the environment if it is not there whole. It holds one version of one engine; another's folder is refused."""
    mark, holds = venv / MARK, f"{name} {version}"
    if mark.exists() and mark.read_text() == holds:
        return
    if mark.exists() and mark.read_text() != f"{holds}, unfinished":
        refuse(f"--venv: {venv} holds {mark.read_text()}")
    if venv.exists() and any(venv.iterdir()) and not mark.exists():
        refuse(f"--venv: {venv} is not empty and was not made here")
    say(f"making {venv}")
    if venv.exists():
        shutil.rmtree(venv)
    venv.mkdir(parents=True)
    mark.write_text(f"{holds}, unfinished")  # first: whatever interrupts this, the folder is known as made here
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    engine = ENGINES[name]
    with tempfile.TemporaryDirectory(prefix="recordings-") as passing:
        folder = wheels or Path(passing)
        wheel = find_wheel(folder, name, version) or fetch(venv, folder, name, version)
        say(f"unpacking {wheel.name}")
        requirements = unpack(wheel, venv / "engine", engine.keep)
    imports = {package(each) for each in engine.imports}
    wanted = [TORCH, *(each for each in requirements if package(each) in imports), *engine.besides]
    say("installing " + " ".join(wanted))
    pip(venv, "install", "--quiet", *wanted)
    (venv / "model").mkdir()
    (venv / "model" / "config.json").write_text(json.dumps(MODEL, indent=1))
    mark.write_text(holds)


def find_wheel(folder: Path, name: str, version: str) -> Path | None:
    return next(iter(sorted(folder.glob(f"{name}-{version}-*.whl"))), None)


def fetch(venv: Path, folder: Path, name: str, version: str) -> Path:
    """Download the wheel alone."""
    say(f"downloading {name} {version}: some hundred MB")
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--only-binary=:all:", *ENGINES[name].download]
    pip(venv, "download", "--quiet", "--no-deps", *options, "--dest", str(folder), f"{name}=={version}")
    wheel = find_wheel(folder, name, version)
    if wheel is None:
        refuse(f"pip left no wheel of {name} {version} in {folder}")
    return wheel


def unpack(wheel: Path, folder: Path, keep: tuple[str, ...]) -> list[str]:
    """Unpack the files with these ends, and give what the wheel says it needs on this machine, extras apart."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder, [name for name in names if name.endswith(keep)])
        (metadata,) = (name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        lines = archive.read(metadata).decode().split("\n\n")[0].splitlines()
    needs = [line.removeprefix("Requires-Dist:").strip() for line in lines if line.startswith("Requires-Dist:")]
    return [need for need in needs if not re.search(r";.*\bextra\b", need)]


def package(requirement: str) -> str:
    """Give the name in a requirement, as names are compared: ``Prometheus_Client>=0.18`` is ``prometheus-client``."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(venv: Path, *arguments: str) -> None:
    command = [str(venv / "bin" / "python"), "-m", "pip", *arguments]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        refuse(f"pip {arguments[0]} failed; {venv} is left unfinished, and is made anew when this is run again")


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
