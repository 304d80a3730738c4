"""Clients name paths below a folder that the server was started with, and none beyond."""

from __future__ import annotations

import pytest

from workbench.scheduler.config import ConfigError
from workbench.serving.folders import profile_folder, weights_folder, with_folders
from workbench.serving.http.errors import api_error
from workbench.serving.refusals import Refusal
from workbench.serving.serve_settings import ServeSettings
from workbench.settings.run_settings import RunSettings


def settings(**given):
    return ServeSettings(RunSettings(), backend="cpu", **given)


@pytest.fixture
def place(tmp_path):
    """``root`` beside ``outside``, with links that lead out, in, and around."""
    (tmp_path / "outside").mkdir()
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "in").symlink_to("real")
    (root / "around").symlink_to("around")
    return tmp_path


@pytest.mark.parametrize(
    "given",
    [
        "",
        "/tmp/x",
        "..",
        "../outside",
        "real/../../outside",
        "real/..",
        "out",
        "out/deeper",
        "around/x",
        "a\0b",
        "//x",
    ],
)
def test_a_path_that_leaves_the_folder_is_a_400_that_names_the_field(place, given):
    bound = with_folders(settings(profile_dir=place / "root", weights_dir=place / "root"))
    for find, root, param in (
        (profile_folder, bound.profile_dir, "output_dir"),
        (weights_folder, bound.weights_dir, "model_path"),
    ):
        with pytest.raises(Refusal, match=rf"^{param}: [^\n]+$") as caught:
            find(root, given)
        error = api_error(caught.value)
        assert (error.status, error.body["error"]["param"]) == (400, param)
    assert list((place / "outside").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "found"), [("a", "a"), ("a/b", "a/b"), ("in/x", "real/x"), (".", ""), ("a..b", "a..b")]
)
def test_a_path_below_the_folder_is_found_in_it(place, given, found, monkeypatch):
    monkeypatch.chdir(place)
    bound = with_folders(settings(profile_dir=place / "root" / ".." / "root")).profile_dir
    assert profile_folder(bound, given) == str((place / "root" / found).resolve())
    (place / "linked").symlink_to("root")
    assert profile_folder(with_folders(settings(profile_dir=place / "linked")).profile_dir, given) == profile_folder(
        bound, given
    )


def test_without_a_folder_no_profile_is_written_and_weights_come_from_anywhere():
    with pytest.raises(Refusal, match="--profile-dir"):
        profile_folder(settings().profile_dir, "x")
    assert weights_folder(settings().weights_dir, "/models/new") == "/models/new"


def test_a_folder_that_cannot_be_had_is_refused_at_the_start_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for given in (
        {"profile_dir": tmp_path / "file"},
        {"weights_dir": tmp_path / "file"},
        {"weights_dir": tmp_path / "none"},
    ):
        with pytest.raises(ConfigError, match=rf"^{next(iter(given))}: [^\n]+$"):
            with_folders(settings(**given))
    with pytest.raises(ConfigError, match="profile_dir: "):
        ServeSettings(RunSettings(), backend="simulated", profile_dir=tmp_path)
