"""The scoreboard: how far our predictions are from measured runs, next to the published errors of other simulators.

    python benchmarks/fidelity.py [--data FOLDER] [--record] [--check] [--json]

Every folder under FOLDER/truth with requests.jsonl and meta.json is a case: the run is imported, simulated with the
profile of its GPU and model under FOLDER/profiles and the trace it names under FOLDER/traces, and compared request by
request. Settings are those the run recorded; no number is fitted to a run. `summary.txt` beside a run holds what
another simulator published about the same run. `--record` keeps the errors in benchmarks/fidelity.json; `--check` fails
when one has grown by more than a tenth. FOLDER is ../shared/data, or WORKBENCH_DATA. A case without data is named and
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.simulated.catalogue.gpu_specs import same_gpu
from backends.simulated.catalogue.model_specs import same_model
from reports.compare.comparison import Comparison, compare
from reports.record.errors import RecordError
from reports.record.measured import read_measured
from reports.record.run_record import RunRecord, write_record
from traces import open_trace
from workbench.calibrate.fit import fit_record
from workbench.cluster.simulate import simulate_loop
from workbench.settings.loading import recorded_settings, settings_from
from workbench.settings.run_settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("WORKBENCH_DATA", ROOT.parent / "shared" / "data"))
RECORDED = ROOT / "benchmarks" / "fidelity.json"
ALLOWED_GROWTH = 0.10
FLOOR = 0.002
"""Errors below this are noise: growth is counted from here."""
ERRORS = {
    "ttft_mean": ("ttft", "mean"),
    "tpot_mean": ("tpot", "mean"),
    "e2e_mean": ("e2e", "mean"),
    "ttft_each": ("ttft", "absolute_mean"),
    "tpot_each": ("tpot", "absolute_mean"),
    "e2e_each": ("e2e", "absolute_mean"),
}
TITLES = {
    "ttft_mean": "TTFT mean",
    "tpot_mean": "TPOT mean",
    "e2e_mean": "E2E mean",
    "ttft_each": "TTFT each",
    "tpot_each": "TPOT each",
    "e2e_each": "E2E each",
}
FITTED = ", fitted to its simulation"
FITTED_CASE = "RTXPRO6000_Llama-3.1-8B"
"""The case whose simulation costs are fitted to."""
SUMMARY_NAMES = {"TTFT Mean": "ttft_mean", "TPOT Mean": "tpot_mean", "Latency Mean": "e2e_mean"}


@dataclass
class Score:
    """One line of the scoreboard."""

    case: str
    errors: dict[str, float]
    """As shares: signed errors of means, and mean absolute errors of requests."""
    published: dict[str, float]
    """Errors another simulator published on the same run."""
    comparison: Comparison
    notes: list[str]


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
    found = compare(measured, record)
    return Score(truth.name, _errors(found), published(truth / "summary.txt"), found, record.meta["cost_notes"]), record


def fitted_score(case: str, settings: RunSettings, trace: Any, record: RunRecord) -> Score:
    """How well costs fitted to a simulated record reproduce it: the error of ``calibrate --from`` alone."""
    import dataclasses

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fitted.json"
        fit_record(record, Path(folder), file)
        again = _simulate(dataclasses.replace(settings, cost=f"fitted:{file}"), trace)
    found = compare(record, again)
    return Score(f"{case}{FITTED}", _errors(found), {}, found, [])


def _simulate(settings: RunSettings, trace: Any) -> RunRecord:
    return simulate_loop(settings, settings.loops[0], trace, trace_sha256="", command="benchmarks/fidelity.py")


def _errors(found: Comparison) -> dict[str, float]:
    errors = {}
    for name, (latency, part) in ERRORS.items():
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


def grown(scores: list[Score], recorded: dict[str, dict[str, float]]) -> list[str]:
    """A line for every error that is more than a tenth above its recorded value."""
    lines = []
    for result in scores:
        for name, value in result.errors.items():
            before = recorded.get(result.case, {}).get(name)
            if before is not None and abs(value) > max(abs(before), FLOOR) * (1 + ALLOWED_GROWTH):
                lines.append(f"{result.case}: {TITLES[name]} {value:+.2%}, recorded {before:+.2%}")
    return lines


def table(scores: list[Score]) -> str:
    """The scoreboard as a Markdown table; published errors in brackets."""
    lines = ["| run | " + " | ".join(TITLES.values()) + " |", "|---|" + "---|" * len(TITLES)]
    for result in scores:
        cells = []
        for name in TITLES:
            value = result.errors.get(name)
            text = "" if value is None else f"{value:+.1%}" if name.endswith("mean") else f"{value:.1%}"
            other = result.published.get(name)
            cells.append(text + (f" ({other:+.1%})" if other is not None else ""))
        lines.append(f"| {result.case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--record", action="store_true", help="keep the errors as the ones to be compared with")
    parser.add_argument("--check", action="store_true", help="exit with 1 when an error has grown by more than a tenth")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    scores, skipped = run(options.data)
    if options.json:
        print(json.dumps({s.case: {"errors": s.errors, "published": s.published} for s in scores}, indent=2))
    else:
        print(table(scores))
        print("\nin brackets: what LLMServingSim's own simulation reached on the same run (summary.txt beside it)")
        for result in scores:
            for note in result.notes:
                print(f"note: {result.case}: {note}")
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    if options.record:
        kept = {s.case: {name: round(value, 5) for name, value in s.errors.items()} for s in scores}
        RECORDED.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    if options.check:
        recorded = json.loads(RECORDED.read_text())
        scored = {s.case for s in scores}
        lost = [case.name for case in cases(options.data) if case.name in recorded and case.name not in scored]
        worse = [*grown(scores, recorded), *(f"{name}: could be scored before" for name in lost)]
        for line in worse:
            print(f"worse: {line}", file=sys.stderr)
        sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
