"""Run benchmark clients as they are against ``workbench serve --backend simulated``: GuideLLM, aiperf, SGLang's.

    .venv/bin/python tests/clients/run_clients.py [NAME...]

Each is installed once in an environment of its own, in a cache folder ($WORKBENCH_CLIENTS, else ~/.cache/workbench-clients).
What they write of the run is imported, as `workbench import` does. Prints one line for each; exit code 1 unless every
request of every client succeeded, and has finished in the record.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("WORKBENCH_CLIENTS") or Path.home() / ".cache" / "workbench-clients")
MODEL = "llama-3.1-8b"
REQUESTS = 12
PATIENCE_S = 600
Settled = tuple[int, str]
"""Requests that succeeded, and the client's last words where they are not all."""


def environment(name: str, *packages: str) -> Path:
    """The folder of a virtual environment that has the packages."""
    folder = CACHE / name
    mark = folder / ".installed"
    wanted = "\n".join(packages)
    if not mark.exists() or mark.read_text() != wanted:
        print(f"installing {', '.join(packages)} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pip(folder, "install", *packages)
        mark.write_text(wanted)
    return folder


def pip(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", *arguments, "-q", "--disable-pip-version-check"], check=True
    )


def run(command: list[str | Path], folder: Path) -> str:
    """What a client says on both streams."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE_S
    )
    return done.stdout


def guidellm(url: str, tokenizer: Path, folder: Path, route: str = "/v1/completions") -> Settled:
    bin = environment("guidellm", "guidellm==0.8.1") / "bin"
    said = run(
        [
            bin / "guidellm",
            "run",
            "--backend",
            f"kind=openai_http,target={url},model={MODEL},request_format={route}",
            "--profile",
            "kind=concurrent,streams=4",
            "--constraint",
            f"kind=max_requests,count={REQUESTS}",
            "--tokenizer",
            f"kind=huggingface_auto,model={tokenizer}",
            "--data",
            "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
            "--output",
            "kind=json,path=report.json",
            "--disable-console",
        ],
        folder,
    )
    found = list(folder.glob("**/report.json"))
    if not found:
        return 0, said
    totals = json.loads(found[0].read_text())["benchmarks"][0]["metrics"]["request_totals"]
    return totals["successful"] if not totals["errored"] else 0, said


def guidellm_chat(url: str, tokenizer: Path, folder: Path) -> Settled:
    return guidellm(url, tokenizer, folder, "/v1/chat/completions")


def aiperf(url: str, tokenizer: Path, folder: Path, kind: str = "completions") -> Settled:
    bin = environment("aiperf", "aiperf==0.13.0") / "bin"
    said = run(
        [
            bin / "aiperf",
            "profile",
            "--model",
            MODEL,
            "--url",
            url,
            "--endpoint-type",
            kind,
            "--streaming",
            "--tokenizer",
            tokenizer,
            "--request-count",
            str(REQUESTS),
            "--concurrency",
            "4",
            "--isl",
            "64",
            "--osl",
            "16",
            "--output-artifact-dir",
            folder / "artifacts",
            "--ui",
            "none",
        ],
        folder,
    )
    report = folder / "artifacts" / "profile_export_aiperf.json"
    if not report.exists():
        return 0, said
    summary = json.loads(report.read_text())
    errors = (summary.get("error_request_count") or {}).get("avg", 0)
    return int(summary["request_count"]["avg"]) if not errors else 0, said


def aiperf_chat(url: str, tokenizer: Path, folder: Path) -> Settled:
    return aiperf(url, tokenizer, folder, "chat")


def bench_serving(url: str, tokenizer: Path, folder: Path, backend: str = "sglang") -> Settled:
    home = environment("sglang", "aiohttp", "numpy", "pillow", "requests", "tqdm", "transformers")
    script = home / "sglang" / "bench_serving.py"
    if not script.exists():
        pip(home, "download", "--no-deps", "sglang==0.4.10", "-d", str(home / "wheels"))
        with zipfile.ZipFile(next((home / "wheels").glob("sglang-0.4.10-*.whl"))) as wheel:
            wheel.extract("sglang/bench_serving.py", home)
    said = run(
        [
            home / "bin" / "python",
            script,
            "--backend",
            backend,
            "--base-url",
            url,
            "--dataset-name",
            "random-ids",
            "--model",
            MODEL,
            "--tokenizer",
            tokenizer,
            "--num-prompts",
            str(REQUESTS),
            "--random-input-len",
            "64",
            "--random-output-len",
            "16",
            "--random-range-ratio",
            "1",
            "--max-concurrency",
            "4",
            "--disable-tqdm",
            "--output-file",
            "result.jsonl",
            "--output-details",
        ],
        folder,
    )
    found = re.search(r"Successful requests: +(\d+)", said)
    return int(found[1]) if found else 0, said


def bench_serving_openai(url: str, tokenizer: Path, folder: Path) -> Settled:
    return bench_serving(url, tokenizer, folder, "sglang-oai")


def bench_serving_chat(url: str, tokenizer: Path, folder: Path) -> Settled:
    return bench_serving(url, tokenizer, folder, "sglang-oai-chat")


CLIENTS: dict[str, Callable[[str, Path, Path], Settled]] = {
    "guidellm": guidellm,
    "guidellm-chat": guidellm_chat,
    "aiperf": aiperf,
    "aiperf-chat": aiperf_chat,
    "sglang-bench": bench_serving,
    "sglang-bench-openai": bench_serving_openai,
    "sglang-bench-chat": bench_serving_chat,
}


RESULTS = {"guidellm": "**/report.json", "aiperf": "artifacts", "sglang": "result.jsonl"}
"""Where each leaves its measurements, by the first part of its name."""


def imported(name: str, folder: Path) -> int:
    """Requests that finished in the record of what a client measured."""
    from reports.imported.recognise import read_results

    found = list(folder.glob(RESULTS[name.partition("-")[0]]))
    return read_results(found[0]).requests["status"].count("finished") if found else 0


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(CLIENTS))
    if unknown:
        print(f"no such client: {', '.join(unknown)}; there are {', '.join(CLIENTS)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from tests.serving.server import Server
    from tests.serving.test_text_streams import TOKENIZERS

    fine = True
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer"
        tokenizer.mkdir()
        TOKENIZERS["byte-level"].save(str(tokenizer / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        }
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
        server = Server("--tokenizer", str(tokenizer), model=MODEL)
        try:
            for name in names or CLIENTS:
                folder = Path(temporary) / name
                folder.mkdir()
                succeeded, said = CLIENTS[name](server.url, tokenizer, folder)
                recorded = imported(name, folder)
                good = succeeded == recorded == REQUESTS
                fine &= good
                print(f"{name}: {succeeded} of {REQUESTS} requests succeeded, {recorded} imported", flush=True)
                if not good:
                    print(said[-3000:], file=sys.stderr)
        finally:
            server.kill()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
