"""Equal arrivals are spread where the file's clock ticks, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.traces.written import json_lines
from traces import Trace, open_trace
from traces.ticks import find_tick_s, parse_spread

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "traces"


def mooncake(tmp_path: Path, stamps: list[float], **how: object) -> Trace:
    path = tmp_path / "t.jsonl"
    records = (
        {"timestamp": stamp, "input_length": 60, "output_length": 2, "hash_ids": [n]} for n, stamp in enumerate(stamps)
    )
    path.write_text(json_lines(*records))
    return open_trace(path, **how)  # type: ignore[arg-type]


def arrivals(trace: Trace) -> list[float | None]:
    return [request.arrival_s for request in trace]


def about_ticks(trace: Trace) -> list[str]:
    return [note for note in trace.info.notes if "spread" in note]


def ticking(gap: int, jitter: int = 0) -> list[float]:
    """Stamps of a clock that ticks, with two or three requests a tick."""
    return [n * gap + (jitter if n % 3 == 2 else 0) for n in range(20) for _ in range(2 + n % 2)]


@pytest.mark.parametrize(("gap", "jitter"), [(3000, 0), (3000, -1), (1000, 0), (60_000, 2)])
def test_a_file_that_ticks_is_spread_over_its_own_tick(tmp_path: Path, gap: int, jitter: int) -> None:
    trace = mooncake(tmp_path, ticking(gap, jitter))
    found = arrivals(trace)
    assert found[:5] == [
        0.0,
        gap / 2000,
        gap / 1000,
        pytest.approx(gap / 750, rel=0.01),
        pytest.approx(gap / 600, rel=0.01),
    ]
    assert len(set(found)) == len(found)
    assert about_ticks(trace) == [
        f"arrivals come in ticks of {gap / 1000:g} s: those of a tick are spread evenly over it (--spread-ticks off)"
    ]


@pytest.mark.parametrize(
    "stamps",
    [
        [0, 0, 7, 7, 7, 4021, 4021, 9000],
        [0, 0, 0, 3000, 3000],
        [0] * 50,
        sorted([37 * n * n for n in range(30)] * 2),
        [n * 3000 for n in range(40)],
        [n * 3000 for n in range(40) for _ in range(8)],
        [n for n in range(400) for _ in range(1 + n % 3)],
    ],
    ids=["no tick", "too few stamps", "all at once", "pairs at any time", "one each", "batches", "milliseconds"],
)
def test_equal_arrivals_of_a_file_that_does_not_tick_stay_and_no_note_is_made(
    tmp_path: Path, stamps: list[float]
) -> None:
    trace = mooncake(tmp_path, stamps)
    assert arrivals(trace) == [stamp / 1000 for stamp in stamps]
    assert about_ticks(trace) == []


def test_the_switch_turns_spreading_off_and_sets_the_tick(tmp_path: Path) -> None:
    stamps = ticking(3000)
    off = mooncake(tmp_path, stamps, spread_ticks="off")
    assert arrivals(off) == [stamp / 1000 for stamp in stamps] and about_ticks(off) == []
    trace = mooncake(tmp_path, [0, 0, 0, 3000, 3000, 9000], spread_ticks="3")
    assert arrivals(trace) == [0, 1, 2, 3, 4.5, 9]
    assert arrivals(mooncake(tmp_path, [0, 0, 500], spread_ticks="3")) == [0, 0.25, 0.5]
    assert about_ticks(trace) == ["equal arrivals are spread evenly over 3 s, or up to the next one"]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("Timestamp,Request tokens,Response tokens", "{0},5,5"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:{0:02d},5,5"),
        ("timestamp,input_tokens,output_tokens", "{0},5,5"),
    ],
)
def test_other_logs_in_whole_seconds_tick_too(tmp_path: Path, header: str, row: str) -> None:
    path = tmp_path / "t.csv"
    rows = [row.format(second) for second in range(20) for _ in range(2 + second % 2)]
    path.write_text("\n".join([header, *rows]))
    trace = open_trace(path)
    assert arrivals(trace)[:4] == [0.0, 0.5, 1.0, pytest.approx(4 / 3, abs=1e-6)]
    assert len(about_ticks(trace)) == 1


def test_arrivals_that_somebody_chose_are_spread_on_request_only(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    record = '{{"arrival_s": {0}, "input_length": 5, "output_length": 5}}\n'
    path.write_text("".join(record.format(n) for n in range(20) for _ in range(2 + n % 2)))
    assert arrivals(open_trace(path))[:3] == [0, 0, 1]
    assert arrivals(open_trace(path, spread_ticks="1"))[:3] == [0, 0.5, 1]


@pytest.mark.parametrize("stamps", [[4e-7, 4e-7, 5e-7], [0, 1.0000004, 1.0000004, 1.0000005], [0, 0, 0, 6e-7, 6e-7]])
def test_no_arrival_leaves_a_tick_however_short(tmp_path: Path, stamps: list[float]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"arrival_s": {stamp}, "input_length": 5, "output_length": 5}}\n' for stamp in stamps))
    found = arrivals(open_trace(path, spread_ticks="3"))
    assert found == sorted(found) and found[0] == 0


@pytest.mark.parametrize("words", ["on", "0", "-1", "nan", "inf", ""])
def test_a_tick_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="is not auto, off or a number of seconds"):
        parse_spread(words)


@pytest.mark.parametrize(("name", "tick_s"), [("mooncake_conversation.jsonl.gz", 3.0), ("azure2023_code.csv.gz", None)])
def test_real_logs_show_the_ticks_they_have(name: str, tick_s: float | None) -> None:
    if not (DATA / name).exists():
        pytest.skip("the reference data (../shared/data) is not here")
    trace = open_trace(DATA / name, spread_ticks="off")
    assert find_tick_s([request.arrival_s or 0.0 for request in trace]) == tick_s
