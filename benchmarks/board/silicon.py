"""Measured rows that AIConfigurator publishes (``silicon_sample.csv``): TTFT and TPOT by engine, GPU, model and layout.

The file is part of the package ``aiconfigurator-core`` (Apache-2.0) and is read where that is installed.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.board.halves import scores

PACKAGE = "aiconfigurator_core"
FILE = "systems/silicon_sample.csv"
SIZES = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
PARALLEL = (*SIZES, *(f"{role}_{size}" for role in ("prefill", "decode") for size in SIZES))
"""Columns of all parallel sizes; those of the other mode are empty."""
CONFIGURATION = ("backend", "backend_version", "model_path", "system", "mode", *PARALLEL)
"""Columns that make a configuration, in the order in which they are joined."""
APART = ("prefill_num_workers", "decode_num_workers", "decode_batch_size")
"""Further columns of disaggregated rows."""
INSTANCES_UNKNOWN = "how many instances prefill and how many decode is not said"
PUBLISHED_AGAIN = "the same measurement as a row that says how many instances there were"
NIGHTLY = "nightly"
"""How builds that are of no version are called: what numbers their names have are dates and commits."""
GENERATED = "aic-auto-gap-analysis/data/"
"""In the sources of rows that AIConfigurator's makers measured, of what it had generated."""
VersionDays = dict[str, list[tuple[date, tuple[int, ...], str]]]
"""By engine: days, the numbers of versions that were measured on them, and these versions."""
SHORTEST = 0.8
"""``RANDOM_RANGE_RATIO`` of InferenceMAX, from whose runs most rows come (its README); others have one length."""


@dataclass(frozen=True)
class Side:
    """The instances that prefill, or those that decode, where prompts and outputs are apart."""

    instances: int
    """Workers, each of which is ``tp`` times ``pp`` times ``dp`` GPUs."""
    tp: int
    pp: int
    dp: int
    """Ranks of each whose attention is data parallel."""
    ep: int
    """GPUs of each that experts are spread over; 1: none are."""


@dataclass(frozen=True)
class Row:
    """One measurement. Lengths are tokens. Of a disaggregated one the layout is that of each decode instance."""

    id: str
    engine: str
    version: str
    """Empty where it is unknown."""
    model: str
    system: str
    mode: str
    """``agg``: prompts and outputs on the same instances; ``disagg``."""
    precision: str
    """Of the matrix products: fp8, fp8_block, nvfp4, int4_wo, or empty."""
    input_tokens: int
    output_tokens: int
    concurrency: int
    """Requests at a time, over all instances."""
    tp: int
    dp: int
    """Ranks whose attention is data parallel."""
    ep: int
    """GPUs that experts are spread over; 1: none are."""
    shortest: float
    """Shortest length as a share of the stated one: lengths are drawn evenly between the two."""
    ttft_s: float
    tpot_s: float
    configuration: str
    """What a configuration is, joined with ``|``."""
    prefill: Side | None = None
    decode: Side | None = None
    """Both for a disaggregated row, else neither."""
    taken_for: str = ""
    """The version that it is taken for where its own is unknown or a nightly build: that of the row of its engine that was
    measured nearest in time, or the newest of these for one without a date."""
    generated: bool = False
    """Whether AIConfigurator's generator deployed its engine (benchmarks/board/launched.py)."""

    @property
    def scores(self) -> bool:
        """Whether its configuration belongs to scoring; else to fitting."""
        return scores(self.configuration)


def find_rows() -> Path | None:
    """The file of the installed package, or None."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(next(iter(found.submodule_search_locations))) / FILE
    return path if path.is_file() else None


def read_rows(path: Path, mode: str = "agg") -> tuple[list[Row], Counter[str]]:
    """Every row of a mode that can be predicted in principle, and how many are left out, by reason.

    Disaggregated rows are left out of ``agg`` with a reason, as rows of the same list; others are no matter of ``disagg``.
    Raises ValueError with one line for a file in another form.
    """
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = {"id", "silicon_data_source", "silicon_ttft_ms", *CONFIGURATION, *(APART if mode == "disagg" else ())}
        missing = columns - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: line 1: {', '.join(sorted(missing))}: no such column")
        # Which rows are published again, and which versions ran when, takes all of them; line numbers are for what is then
        # wrong in one.
        lines = [(reader.line_num, values) for values in reader]
        whole = {_measured(values) for _, values in lines if values["mode"] == "disagg" and _instances_said(values)}
        ran = _versions_by_day(values for _, values in lines)
        for line, values in lines:
            if mode == "disagg" and values["mode"] != mode:
                continue
            reason = disagreement(values["model_path"], values["silicon_data_source"])
            if reason is None and values["mode"] != mode:
                reason = "disaggregated: in tables of their own"
            if reason is None and mode == "disagg" and not _instances_said(values):
                reason = PUBLISHED_AGAIN if _measured(values) in whole else INSTANCES_UNKNOWN
            if reason is None:
                reason = other_concurrency(values)
            if reason is None and not values["silicon_ttft_ms"]:
                reason = "no TTFT"
            if reason is not None:
                left_out[reason] += 1
                continue
            try:
                rows.append(_row(values, ran))
            except ValueError as error:
                raise ValueError(f"{path}: line {line}: {error}") from None
    return rows, left_out


def disagreement(model: str, source: str) -> str | None:
    """Say that a row's model is another one than its source names, by family and size, or None."""
    named = re.search(r"\bmodel=([^;]+)", source) or re.search(r"/([^/;]+)\.csv", source)
    if named is None or not (words := _words(named[1])):
        return None
    sizes, known = {word for word in words if _size(word)}, _words(model)
    if sizes and not sizes <= set(known):
        return "model and source disagree"
    return None


def other_concurrency(values: dict[str, str]) -> str | None:
    """Say that a row's requests at a time are others than its source says, or None."""
    said = re.search(r"\bsilicon_concurrency=(\d+)", values["silicon_data_source"])
    if said is None or int(said[1]) == _concurrency(values):
        return None
    return "requests at a time and source disagree"


def recounted(values: dict[str, str]) -> bool:
    """Whether the columns of a row count its GPUs twice."""
    return layout(values) != _columns(values)


def _instances_said(values: dict[str, str]) -> bool:
    return bool(values["prefill_num_workers"] and values["decode_num_workers"])


def _measured(values: dict[str, str]) -> tuple[str, ...]:
    """What two rows have in common that are of the same run: all but how its GPUs are written down."""
    said = re.search(r"\bsilicon_concurrency=(\d+)", values["silicon_data_source"])
    of = ("backend", "system", "isl", "osl")
    latencies = (f"{float(values[name] or 0):.9g}" for name in ("silicon_ttft_ms", "silicon_tpot_ms"))
    return (*(values[name] for name in of), said[1] if said else "", *latencies)


def _side(values: dict[str, str], role: str) -> Side:
    names = ("num_workers", "tp_size", "pp_size", "attention_dp_size", "moe_ep_size")
    return Side(*(_count(values, f"{role}_{name}") for name in names))


def _concurrency(values: dict[str, str]) -> int:
    if values["mode"] == "disagg":
        # A batch is one rank's of one decode instance.
        decode = _side(values, "decode")
        return round(float(values["decode_batch_size"])) * decode.instances * decode.dp
    return round(float(values["batch_size"])) * _count(values, "attention_dp_size")


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+[\d.]*|\d+(?:\.\d+)?b?", name.lower())


def _size(word: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?b", word) is not None


LARGEST_NODE = 8
"""GPUs of the boxes that rows are of, racks (gb200, gb300) aside."""


def layout(values: dict[str, str]) -> tuple[int, int, int]:
    """Tensor-parallel size, ranks of attention, and GPUs that experts are spread over.

    Many rows multiply the same GPUs twice: what their names call ``tp8_ep8``, one box, stands in the columns as eight ways
    of tensor parallelism of experts by eight of expert parallelism, or four of tensor parallelism by four ranks of
    attention: 64 or 16 GPUs. All names that there are say so, and no box has as many: these are N GPUs, with experts spread
    over all.
    """
    tp, dp, moe_ep = _columns(values)
    moe_tp = _count(values, "moe_tp_size")
    count = round((tp * dp) ** 0.5)
    squared = count > 1 and count * count == tp * dp and (moe_tp, moe_ep) in ((count, count), (1, count * count))
    named = re.search(r"_tp(\d+)(?:_\d)?_ep(\d+)", values["id"])
    said = named is not None and int(named[1]) == int(named[2]) == count
    if squared and (said or (named is None and (tp * dp > LARGEST_NODE or tp == dp))):
        return (1, count, count) if dp > 1 else (count, 1, count)
    return tp, dp, moe_ep


def _columns(values: dict[str, str]) -> tuple[int, int, int]:
    """The same three as they stand."""
    return _count(values, "tp_size"), _count(values, "attention_dp_size"), _count(values, "moe_ep_size")


def numbers_of(version: str) -> tuple[int, ...]:
    """The numbers of a version, or of a preset's name; none of a nightly build."""
    found = None if version.startswith(NIGHTLY) else re.search(r"\d+(\.\d+)+", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _day(values: dict[str, str]) -> date | None:
    """When a row was measured, where its source says."""
    found = re.search(r"\bmeasured=(\d{4}-\d\d-\d\d)", values["silicon_data_source"])
    return date.fromisoformat(found[1]) if found else None


def _versions_by_day(lines: Iterable[dict[str, str]]) -> VersionDays:
    """The days on which versions with numbers were measured."""
    found: dict[str, set[tuple[date, tuple[int, ...], str]]] = {}
    for values in lines:
        day, numbers = _day(values), numbers_of(values["backend_version"])
        if day is not None and numbers:
            found.setdefault(values["backend"], set()).add((day, numbers, values["backend_version"]))
    return {engine: sorted(days) for engine, days in found.items()}


def _taken_for(values: dict[str, str], ran: VersionDays) -> str:
    """The version measured nearest to a row, the newer of two that are as near; the newest of all where it has no day."""
    days, day = ran.get(values["backend"], []), _day(values)
    if not days:
        return ""
    if day is None:
        return max(days, key=lambda each: each[1])[2]
    return min(days, key=lambda each: (abs((each[0] - day).days), [-number for number in each[1]]))[2]


def _row(values: dict[str, str], ran: VersionDays) -> Row:
    prefill = decode = None
    if values["mode"] == "disagg":
        prefill, decode = _side(values, "prefill"), _side(values, "decode")
        tp, dp, moe_ep = decode.tp, decode.dp, decode.ep
    else:
        tp, dp, moe_ep = layout(values)
    return Row(
        id=values["id"],
        engine=values["backend"],
        version=values["backend_version"],
        model=values["model_path"],
        system=values["system"],
        mode=values["mode"],
        precision=values["gemm_quant_mode"],
        input_tokens=int(values["isl"]),
        output_tokens=int(values["osl"]),
        concurrency=_concurrency(values),
        tp=tp,
        dp=dp,
        ep=moe_ep,
        shortest=SHORTEST if re.match(r"db-dump|source_file=[^/;]+\.csv", values["silicon_data_source"]) else 1.0,
        ttft_s=float(values["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(values["silicon_tpot_ms"]) / 1e3,
        configuration="|".join(values[name] for name in CONFIGURATION),
        prefill=prefill,
        decode=decode,
        taken_for=_taken_for(values, ran),
        generated=GENERATED in values["silicon_data_source"],
    )


def _count(values: dict[str, str], name: str) -> int:
    """A parallel size; 0 and nothing stand for 1."""
    return max(round(float(values[name] or 1)), 1)
