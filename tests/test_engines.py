"""Engine presets: what they set, and that what is said wins over them."""

from __future__ import annotations

import pytest

from backends.simulated.host import HostModel
from tests.cost.profiles import batch, linear_profile
from workbench.cluster.resolve import resolve
from workbench.scheduler.config import ConfigError
from workbench.settings.engines import engine_names, load_engine, short_names
from workbench.settings.loading import SETTINGS, settings_from
from workbench.settings.run_settings import RunSettings


@pytest.mark.parametrize("name", engine_names())
def test_every_preset_is_made_of_known_settings_and_phases(name):
    engine = load_engine(name)
    settings = settings_from(None, {"engine": name})
    for field, value in engine.settings.items():
        assert getattr(settings, field) == SETTINGS[field].meant(value)
    HostModel(**engine.host)
    assert resolve(settings, settings.loops[0]).scheduler.batching == settings.batching


def test_flags_and_files_win_over_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('engine = "vllm-0.19"\nmax_running = 100\npage_size = 32\n')
    settings = settings_from(file, {"page_size": 8})
    assert (settings.batching, settings.max_running, settings.page_size) == ("mixed", 100, 8)
    assert settings_from(None, {}) == RunSettings()


def test_graphs_of_vllm_hold_every_decode_batch_and_small_mixed_steps():
    engine = load_engine("vllm-0.19")
    assert engine.capture_sizes(128) == [1, 2, 4, *range(8, 129, 8)]
    assert engine.mixed_capture_sizes(128) == [1, 2, 4, *range(8, 257, 8)]
    assert engine.mixed_capture_sizes(1000)[-1] == 512
    assert engine.capture_sizes(100)[-1] == 104
    assert load_engine("sglang-0.5").mixed_capture_sizes(128) == []


def test_vllm_sends_whole_rows_of_its_page_table_before_every_step(tmp_path):
    folder = linear_profile(tmp_path / "p")

    def beside(requests: int, **flags: object) -> float:
        settings = settings_from(
            None, {"cost": f"profile:{folder}", "kv_tokens": 100_000, "max_context": 32_000, **flags}
        )
        cost = resolve(settings, "overlap").cost
        return cost.beside_s(batch([100] * requests))

    # 32,000 tokens are 2,000 pages of four bytes a request, over PCIe 5.0.
    row_s = 2000 * 4 / 64e9
    vllm = {"engine": "vllm-0.19"}
    assert beside(200, **vllm) - beside(100, **vllm) == pytest.approx(100 * row_s)
    assert beside(200, **vllm, page_size=32) - beside(100, **vllm, page_size=32) == pytest.approx(50 * row_s)
    assert beside(200) == beside(100), "ours keeps its table on the GPU"


def test_an_unknown_engine_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"engine: 'vllm-0' is not known; nearest: vllm-0\.33"):
        settings_from(None, {"engine": "vllm-0"})


def test_a_short_name_stands_for_one_version_and_the_settings_hold_that():
    assert settings_from(None, {"engine": "vllm-0.19"}).engine == "vllm-0.19.0"
    for short, exact in short_names().items():
        assert exact.startswith(short) and settings_from(None, {"engine": short}) == settings_from(
            None, {"engine": exact}
        )


def test_a_preset_has_what_the_one_it_extends_has_but_for_what_it_says():
    above, below = load_engine("vllm-0.33.0"), load_engine("vllm-0.19.0")
    assert (
        below.graphs == above.graphs and below.host == above.host and below.page_entry_bytes == above.page_entry_bytes
    )
    assert below.settings.keys() >= above.settings.keys()
