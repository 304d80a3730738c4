"""What the golden commands read: traces and costs, the same bytes on every machine.

Lengths are drawn from ranges of integers or follow from the number of a row: no logarithm or exponential of a processor's
own decides them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tests.cost.profiles import linear_profile
from tests.golden.cli import workbench

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parents[1] / "traces/samples/sample.jsonl"

GENERATED = {
    # Bursts of twelve that queue behind each other.
    "bursts.jsonl": "--requests 60 --arrivals burst --burst-size 12 --rate 20 --input 50-2500 --output 5-120 --seed 11",
    # The batch stays the same for hundreds of steps on end.
    "steady.jsonl": "--requests 24 --arrivals constant --rate 12 --input 100-600 --output 200-700 --seed 12",
    "prompts.jsonl": "--requests 20 --arrivals poisson --rate 2 --input 2000-30000 --output 10-80 --seed 13",
    # Sessions of several turns over three system prompts.
    "chats.jsonl": "--requests 80 --arrivals poisson --rate 8 --input 40-400 --output 20-150 --turns 2-5 "
    "--think-time 0.4 --system-prompts 3 --system-tokens 512 --seed 14",
    "tiny.jsonl": "--requests 100 --arrivals burst --burst-size 5 --rate 60 --input 1-40 --output 1-4 --seed 15",
}


def ranked() -> Iterable[dict[str, object]]:
    """Requests with priorities, deadlines, bounds and adapters of their own."""
    for n in range(80):
        row: dict[str, object] = {
            "arrival_s": n * 0.02,
            "input_length": 60 + n * 173 % 900,
            "output_length": 10 + n * 97 % 140,
            "priority": n * 5 % 7,
            "slo_ttft_s": 0.1 + n * 11 % 13 * 0.05,
        }
        if n % 9 == 4:
            row["max_tokens"] = 20
        if n % 4 == 3:
            row["adapter"] = f"adapter-{n % 3}"
        yield row


def prefixes() -> Iterable[dict[str, object]]:
    """Prompts that branch: one of two roots, one of three branches of it, one of two of that, and an end of their own."""
    for n in range(80):
        root, branch, twig = n % 2, n * 7 % 3, n * 5 // 3 % 2
        blocks = [root, 10 + 3 * root + branch, 100 + 10 * (3 * root + branch) + twig][: 1 + n % 3]
        yield {
            "arrival_s": n // 16 * 0.5,
            "input_length": 256 * len(blocks) + 5 + n * 31 % 90,
            "hash_ids": blocks,
            "block_size": 256,
            "output_length": 5 + n * 13 % 40,
        }


def agents() -> Iterable[dict[str, object]]:
    """Sessions of calls that extend each other, every third with a subagent, as Weka writes them."""
    for session in range(8):
        calls: list[dict[str, object]] = []
        for turn in range(6):
            blocks = 6 + 3 * turn + session % 4
            call: dict[str, object] = {
                "t": 2.0 * turn,
                "in": 64 * blocks + 10 + session,
                "out": 30 + (session * 17 + turn * 29) % 90,
                "think_time": (session + turn) % 5 * 0.2,
                "hash_ids": list(range(blocks)),
            }
            calls.append(call)
            if session % 3 == 1 and turn == 2:
                inner = [{**call, "in": 64 * k + 5, "hash_ids": list(range(500, 500 + k))} for k in (4, 7)]
                calls.append({"type": "subagent", "t": 5.0, "requests": inner})
        yield {"id": f"agent-{session}", "block_size": 64, "hash_id_scope": "local", "requests": calls}


BY_HAND = {"ranked.jsonl": ranked, "prefixes.jsonl": prefixes, "agents.jsonl": agents}


def write_inputs(folder: Path) -> None:
    """Write everything that a golden command may name into ``folder``, from which it is run."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SAMPLE, folder / "sample.jsonl")
    shutil.copy(HERE / "data/fitted.json", folder / "fitted.json")
    linear_profile(folder / "profile", host={"process_s": 2e-5, "schedule_request_s": 1e-6})
    for name, words in GENERATED.items():
        workbench(f"workbench trace generate {name} {words} --force", folder)
    for name, rows in BY_HAND.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows()))
