"""Recordings of what engines decided, and how each is replayed: preset, loop and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ground.errors import InputError
from ground.json_file import read_json
from workbench.instance import LoopSpec
from workbench.parity.scenarios import CASES, CONTEXT_TOKENS, KV_BLOCK_TOKENS, RETRACTED, Case
from workbench.parity.steps import Decision
from workbench.scheduler.config import SchedulerConfig
from workbench.scheduler.settings import ConfigError
from workbench.settings.engines import exact_name
from workbench.settings.loading import settings_from

LOOP = {"sync": "normal", "async": "overlap", "normal": "normal", "overlap": "overlap"}
"""Our loop for each of the engines' ways to run."""


class RecordingError(InputError):
    """A recording that cannot be read or replayed."""


@dataclass(frozen=True)
class Scenario:
    """One scenario of a recording and what is asked of the scheduler for it."""

    key: str
    """``case/page/loop/seed``, or ``case/mode/seed`` where there is one page size."""
    case: Case
    case_name: str
    seed: int
    loop: LoopSpec
    config: SchedulerConfig
    ignore_eos: bool
    """Whether requests say that they stop by length alone. None could stop otherwise in any case."""
    token_too_early: bool
    """Whether a request is handed a token with a chunk that ends one token before its prompt does
    (:attr:`Recording.recorder`)."""


@dataclass(frozen=True)
class Recording:
    """What an engine decided."""

    path: Path
    engine: str
    """As the recording has it: name, version, and what was asked of it."""
    preset: str
    recorder: str | None
    """The script that recorded, where that is said. The first one for vLLM did not, and hands an asynchronous engine a token
    where a chunk ends one token before the prompt does. No model runner does, but the engine takes it."""
    decisions: Mapping[str, list[Decision]]
    """For every scenario by its key, a batch an entry."""

    def scenario(self, key: str) -> Scenario:
        """The scenario of a key. Raises RecordingError."""
        name, pages, mode, seed = _parts(key) or ("", [], "", "")
        if name not in CASES or mode not in LOOP:
            raise RecordingError(f"{self.path}: {key!r} is no case/page/loop/seed")
        asked = self._asked
        case, ignore_eos = CASES[name], "conservativeness" not in asked and "may-stop" not in asked
        more: dict[str, Any] = {"page_size": int(pages[0])} if pages else {}
        if "conservativeness" in asked:
            try:
                more["conservativeness"] = float(asked["conservativeness"])
            except ValueError:
                raise RecordingError(
                    f"{self.path}: engine: conservativeness {asked['conservativeness']!r} is not a number"
                ) from None
        loop = LOOP[mode]
        config = scheduler_config(self.preset, case, loop, more)
        too_early = self.recorder is None and mode == "async"
        return Scenario(key, case, name, int(seed), LoopSpec(loop), config, ignore_eos, too_early)

    @property
    def _asked(self) -> dict[str, str]:
        """What was asked of the engine, by the words after its name and version."""
        asked = (words.split() for words in self.engine.split(",")[1:])
        return {words[0]: words[-1] for words in asked if words}


def _parts(key: str) -> tuple[str, list[str], str, str] | None:
    """Case, page size if there is one, loop and seed of a scenario's key; None for what has not these."""
    match key.split("/"):
        case [name, *pages, mode, seed] if len(pages) < 2 and all(_number(each) for each in (*pages, seed)):
            return name, pages, mode, seed
    return None


def _number(word: str) -> bool:
    return word.isascii() and word.isdecimal()


def scheduler_config(preset: str, case: Case, loop: str, more: Mapping[str, Any]) -> SchedulerConfig:
    """The scheduler of an engine's preset, of a case's sizes. Raises ConfigError."""
    flags: dict[str, Any] = {"engine": preset, "max_running": case.running, "policy": case.policy, **more}
    mixed = settings_from(None, {"engine": preset}).batching == "mixed"
    flags |= {"max_batch_tokens": case.budget} if mixed else {"chunk": case.budget, "mixed_chunk": case.mixed}
    if case.policy == "priority" and not mixed:
        flags["preempt_threshold"] = 1
    if case.long_prefill:
        flags["long_prefill_tokens"] = case.long_prefill
    settings = settings_from(None, flags)
    return settings.scheduler(case.blocks * KV_BLOCK_TOKENS, CONTEXT_TOKENS, 1)


def _ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def read_recording(path: Path) -> Recording:
    """Read a recording. Raises RecordingError for what is none, and for an engine that has no preset."""
    values = read_json(path, RecordingError)
    engine, recorder = values.pop("engine", None), values.pop("recorder", None)
    if not isinstance(engine, str):
        raise RecordingError(f"{path}: engine: {engine!r} is not the name and version of whose decisions these are")
    for key, steps in values.items():
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise RecordingError(f"{path}: {key}: is no list of batches")
        for at, step in enumerate(steps):
            for name, value in step.items():
                if not (_ids(value) if name == RETRACTED else type(value) is int and value > 0):
                    wanted = "a list of ids" if name == RETRACTED else "a number of tokens"
                    raise RecordingError(f"{path}: {key}: batch {at}: {name}: {value!r} is not {wanted}")
    if not values:
        raise RecordingError(f"{path}: holds no scenario")
    words = engine.split(",")[0].split()
    try:
        preset = exact_name("-".join(words[:2]))
    except ConfigError as error:
        raise RecordingError(f"{path}: engine: {error}") from error
    return Recording(path, engine, preset, recorder, values)
