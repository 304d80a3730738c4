"""Measured runs, request by request: predicted with the profile of their GPU and model, beside other simulators' errors.

Every folder under DATA/truth with requests.jsonl and meta.json is a case: the run is imported, simulated with the profile
of its GPU and model under DATA/profiles and the trace it names under DATA/traces, and compared request by request. Settings
are those the run recorded; no number is fitted to a run. ``summary.txt`` beside a run holds what another simulator published
about the same run. DATA is ../shared/data, or WORKBENCH_DATA.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.simulated.catalogue.gpu_specs import same_gpu
from backends.simulated.catalogue.model_specs import same_model
from reports.compare.comparison import Comparison, compare
from reports.imported.llmservingsim import read_measured
from reports.record.errors import RecordError
from reports.record.run_record import RunRecord, write_record
from traces import open_trace
from workbench.calibrate.fit import fit_record
from workbench.cluster.simulate import simulate_loop
from workbench.settings.loading import recorded_settings, settings_from
from workbench.settings.run_settings import RunSettings

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("WORKBENCH_DATA", ROOT.parent / "shared" / "data"))
ERRORS = {
    "ttft_mean": ("TTFT mean", "ttft", "mean"),
    "tpot_mean": ("TPOT mean", "tpot", "mean"),
    "e2e_mean": ("E2E mean", "e2e", "mean"),
    "ttft_each": ("TTFT each", "ttft", "absolute_mean"),
    "tpot_each": ("TPOT each", "tpot", "absolute_mean"),
    "e2e_each": ("E2E each", "e2e", "absolute_mean"),
}
"""What is scored, by the names in scoreboard.json: its title in the table, and the latency and part of a comparison."""
FITTED = ", fitted to its simulation"
FITTED_CASE = "RTXPRO6000_Llama-3.1-8B"
"""The case whose simulation costs are fitted to."""
SUMMARY_NAMES = {"TTFT Mean": "ttft_mean", "TPOT Mean": "tpot_mean", "Latency Mean": "e2e_mean"}


@dataclass
class Score:
    """One measured run."""

    case: str
    errors: dict[str, float]
    """As shares: signed errors of means, and mean absolute errors of requests."""
    published: dict[str, float]
    """Errors another simulator published on the same run."""


def cases(data: Path = DATA) -> list[Path]:
    """Folders of measured runs."""
    return sorted(path.parent for path in (data / "truth").glob("*/requests.jsonl"))


def find_profile(data: Path, truth: Path, record: RunRecord) -> Path:
    """The profile of a run: of its model, on the GPU that the run's folder is named after. Raises FileNotFoundError."""
    gpu = truth.name.split("_")[0]
    for meta in sorted((data / "profiles").glob("*/*/*/*/*/meta.yaml")):
        folder = meta.parent
        hardware, model = folder.parents[2].name, f"{folder.parents[1].name}/{folder.parents[0].name}"
        if same_gpu(hardware, gpu) and same_model(model, str(record.meta["model"])):
            return folder
    raise FileNotFoundError(f"{truth.name}: no profile of {record.meta['model']} on {gpu} under {data / 'profiles'}")


def find_trace(data: Path, record: RunRecord) -> Path:
    """The trace that a run names. Raises FileNotFoundError."""
    name = Path(record.meta["trace"]["name"]).stem
    for path in sorted((data / "traces").iterdir()):
        if re.sub(r"\.jsonl(\.gz|\.zst)?$", "", path.name).endswith(name):
            return path
    raise FileNotFoundError(f"no trace {name} under {data / 'traces'}")


def score(data: Path, truth: Path) -> tuple[Score, RunRecord]:
    """Simulate one measured run and compare; also returns the simulated record."""
    measured = read_measured(truth)
    profile, trace = find_profile(data, truth, measured), open_trace(find_trace(data, measured))
    with tempfile.TemporaryDirectory() as folder:
        write_record(measured, Path(folder) / "measured")
        settings = settings_from(None, {"cost": f"profile:{profile}"}, Path(folder) / "measured")
    record = _simulate(settings, trace)
    return Score(truth.name, _errors(compare(measured, record)), published(truth / "summary.txt")), record


def fitted_score(case: str, settings: RunSettings, trace: Any, record: RunRecord) -> Score:
    """How well costs fitted to a simulated record reproduce it: the error of ``calibrate --from`` alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fitted.json"
        fit_record(record, Path(folder), file)
        again = _simulate(replace(settings, cost=f"fitted:{file}"), trace)
    return Score(f"{case}{FITTED}", _errors(compare(record, again)), {})


def _simulate(settings: RunSettings, trace: Any) -> RunRecord:
    return simulate_loop(settings, settings.loops[0], trace, trace_sha256="", command="benchmarks/scoreboard.py")


def _errors(found: Comparison) -> dict[str, float]:
    errors = {}
    for name, (_, latency, part) in ERRORS.items():
        value = getattr(found.latencies[latency], part)
        if value is not None:
            errors[name] = float(value)
    return errors


def published(summary: Path) -> dict[str, float]:
    """Errors of means from a summary of LLMServingSim's; empty without the file."""
    if not summary.is_file():
        return {}
    found = {}
    for line in summary.read_text().splitlines():
        parts = re.match(r"(\w+ Mean)\s+([\d.]+)\s+([\d.]+)\s+([-+][\d.]+)%", line)
        if parts and parts[1] in SUMMARY_NAMES:
            found[SUMMARY_NAMES[parts[1]]] = float(parts[4]) / 100
    return found


def run(data: Path = DATA) -> tuple[list[Score], list[str]]:
    """All scores, and a line for every case that could not be run."""
    scores, skipped = [], []
    found = cases(data)
    if not found:
        skipped.append(f"no measured runs under {data / 'truth'}")
    fitted = None
    for truth in found:
        try:
            result, record = score(data, truth)
        except (OSError, ValueError, RecordError) as error:  # every error of bad input here is one of these
            skipped.append(f"{truth.name}: {error}")
            continue
        scores.append(result)
        if truth.name == FITTED_CASE:
            settings = RunSettings(**recorded_settings(record.meta, record.name))
            trace = open_trace(find_trace(data, read_measured(truth)))
            fitted = fitted_score(truth.name, settings, trace, record)
    return scores + ([fitted] if fitted else []), skipped


def table(scores: list[Score]) -> str:
    """A Markdown table; published errors in brackets."""
    lines = ["| run | " + " | ".join(title for title, *_ in ERRORS.values()) + " |", "|---|" + "---|" * len(ERRORS)]
    for result in scores:
        cells = []
        for name in ERRORS:
            value = result.errors.get(name)
            text = "" if value is None else f"{value:+.1%}" if name.endswith("mean") else f"{value:.1%}"
            other = result.published.get(name)
            cells.append(text + (f" ({other:+.1%})" if other is not None else ""))
        lines.append(f"| {result.case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
