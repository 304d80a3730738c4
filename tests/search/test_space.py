"""What `--vary` means."""

from __future__ import annotations

import pytest

from workbench.search.point import Base
from workbench.search.space import SpaceError, grid_points, parse_vary, random_points


def values(text: str) -> tuple:
    return parse_vary([text])[0].grid()


def test_lists_become_values_of_the_settings_kind():
    assert values("tp=1,2,4") == (1, 2, 4)
    assert values("page-size=1,16") == (1, 16)
    assert values("mem_fraction=0.8,0.9") == (0.8, 0.9)
    assert values("mixed_chunk=true,off") == (True, False)
    assert values("chunk=512,none") == (512, None)
    assert values("chunk=0") == (None,)
    assert values("policy=fcfs,my.module:Policy") == ("fcfs", "my.module:Policy")


def test_ranges_have_steps_in_a_grid():
    assert values("tp=1..4") == (1, 2, 3, 4)
    assert values("max_running=16..200:log") == (16, 32, 64, 128)
    assert values("rate=1..3/5") == (1.0, 1.5, 2.0, 2.5, 3.0)
    assert values("rate=1..100/3:log") == (1.0, 10.0, 100.0)
    assert values("max_running=1..8/3") == (1, 4, 8)


def test_a_grid_is_every_combination_the_last_setting_fastest():
    points = list(grid_points(parse_vary(["tp=1,2", "loop=normal,overlap"])))
    assert [(p["tp"], p["loop"]) for p in points] == [(1, "normal"), (1, "overlap"), (2, "normal"), (2, "overlap")]


def test_random_points_differ_stay_inside_and_are_the_same_for_a_seed():
    space = parse_vary(["rate=0.5..50:log", "max_running=8..64", "cache=radix,none"])
    points = random_points(space, 40, seed=3)
    assert points == random_points(space, 40, seed=3) != random_points(space, 40, seed=4)
    assert len({tuple(p.values()) for p in points}) == 40
    assert all(0.5 <= p["rate"] <= 50 and 8 <= p["max_running"] <= 64 for p in points)
    assert sum(p["rate"] < 5 for p in points) > 10  # half of a logarithmic range of two decades


def test_a_random_search_of_a_small_space_is_all_of_it_once():
    points = random_points(parse_vary(["tp=1,2", "max_running=1..3"]), 100, seed=0)
    assert len(points) == 6 == len({tuple(p.values()) for p in points})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pagesize=1", "pagesize: no such setting; nearest: page_size"),
        ("qqq=1", "qqq: no such setting; `workbench simulate --help` lists them"),
        ("tp", "tp: no values; write tp=v1,v2"),
        ("tp=", "tp: no values"),
        ("tp=1,x", "tp: 'x' is not a whole number"),
        ("tp=2,2", "tp: 2 is given twice"),
        ("rate=1,nan", "rate: 'nan' is not a number"),
        ("mixed_chunk=maybe", "mixed_chunk: 'maybe' is not true or false"),
        ("gpu=1..3", "gpu: '1..3': a range needs a setting that is a number"),
        ("tp=4..2", "tp: '4..2': the range does not rise"),
        ("rate=0..2:log", "rate: '0..2:log': a logarithmic range starts above 0"),
        ("slo_ttft=1,2", "slo_ttft: cannot be varied"),
        ("policy=a,,b", "policy: an empty value"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(text, says):
    with pytest.raises(SpaceError) as caught:
        parse_vary([text])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_setting_varies_once():
    with pytest.raises(SpaceError, match="tp: varied twice"):
        parse_vary(["tp=1", "tp=2"])


def test_a_range_of_fractions_needs_steps_in_a_grid():
    with pytest.raises(SpaceError, match=r"rate: .* write 1\.\.3/5"):
        values("rate=1..3")


def test_every_gpu_file_of_a_search_that_says_a_former_key_gets_a_note(tmp_path):
    files = [tmp_path / f"{name}.toml" for name in ("varied", "pooled", "set")]
    for file in files:
        file.write_text('reaches_like = "h100"\n')
    varied, pooled, alone = files
    settings = tmp_path / "run.toml"
    settings.write_text(f'[[pool]]\ncount = 2\ngpu = "{pooled}"\n')
    vary = [f"gpu=h100,{varied}"]

    def said(base: Base, vary: list[str]) -> list[str]:
        return [note.partition(": ")[0] for note in base.renamed(vary, parse_vary(vary) if vary else [])]

    assert said(Base(None, {}), vary) == [str(varied)]
    assert said(Base(None, {"gpu": str(alone)}), []) == [str(alone)]
    assert said(Base(None, {"pool": (f"both:1,gpu={pooled}", "b=both:1,gpu=h100")}), []) == [str(pooled)]
    assert said(Base(settings, {}), vary) == [str(varied), str(pooled)]
    assert said(Base(None, {}), []) == []
