"""What ``--backend`` names, and what a server's backend is made from."""

from __future__ import annotations

import pickle

import pytest

from workbench.scheduler.config import ConfigError
from workbench.serving.backends.backend_spec import backend_spec
from workbench.serving.backends.modelled_backend import ModelledBackendSpec
from workbench.serving.backends.real_backend import RealBackendSpec
from workbench.serving.serve_settings import ServeSettings
from workbench.settings.run_settings import RunSettings


def serve_settings(**given) -> ServeSettings:
    return ServeSettings(RunSettings(), **given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backend": "tpu"}, "backend: 'tpu' is not one of auto, cpu, cuda, simulated"),
        (
            {"backend": "simulated", "load_format": "gguf"},
            "load_format: a simulated model has no weights to load",
        ),
        ({"backend": "cpu", "time_scale": 2.0}, "time_scale: is for --backend simulated"),
        (
            {"backend": "auto", "simulated_output_tokens": "200"},
            "simulated_output_tokens: is for --backend simulated",
        ),
        (
            {"backend": "simulated", "weights_dir": "here"},
            "weights_dir: a simulated model has neither a profile nor weights",
        ),
    ],
)
def test_what_one_kind_of_backend_has_no_use_for_is_refused_in_one_line(given, says):
    with pytest.raises(ConfigError) as caught:
        serve_settings(**given)
    assert str(caught.value) == says


def test_settings_say_what_the_backend_is_made_from_and_processes_get_a_copy():
    made = serve_settings(backend="simulated", time_scale=0.5, simulated_output_tokens="200").spec
    assert made == ModelledBackendSpec(0.5, "200")
    assert serve_settings(backend="cpu", load_format="dummy").spec == RealBackendSpec("cpu", "dummy")
    assert pickle.loads(pickle.dumps(made)) == made


def test_a_model_without_weights_need_not_have_a_tokenizer(tmp_path):
    model = str(tmp_path)
    without_weights = [backend_spec("simulated"), backend_spec("cpu", "dummy")]
    assert [spec.tokenizer(model) for spec in without_weights] == [None, None]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert [spec.tokenizer(model) for spec in without_weights] == [model, model]
    assert backend_spec("cpu").tokenizer("org/model") == "org/model"


def test_a_gpu_file_that_says_a_former_key_is_noted_by_a_modelled_server(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('reaches_like = "h100"\n')
    config = tmp_path / "run.toml"
    config.write_text(f'gpu = "{mine}"\n')
    note = f"{mine}: reaches_like: is called efficiency_like now; the next version no longer knows it"
    spec = backend_spec("simulated")
    assert spec.check_flags({"gpu": str(mine)}, None) == spec.check_flags({}, config) == [note]
    assert spec.check_flags({"gpu": "h100"}, config) == []


def test_a_modelled_server_says_what_it_assumes_of_links():
    spec = backend_spec("simulated")
    (said,) = spec.check(RunSettings(gpu="l40s", tp=2), "overlap")
    assert said.startswith(
        "links: l40s GPUs are taken to reach each other over PCIe, without NVLink, at 18.9GB/s and 5.31us"
    )
    assert spec.check(RunSettings(gpu="l40s", tp=2, link="16GB/s", link_latency="20us"), "overlap") == []
    with pytest.raises(ConfigError, match="tp: 3 does not divide"):
        spec.check(RunSettings(tp=3), "overlap")
