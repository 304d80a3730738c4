"""A profile of the batches that a runner runs: a trace a rank, and the one line that is said when it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.torch.checkpoints import write  # noqa: E402
from tests.torch.live import backend_of, greedy, messages, serve, spans  # noqa: E402
from tests.torch.tiny import prompts  # noqa: E402


def ask(backend: Any, new: int) -> None:
    assert len(serve(backend, [messages(prompts((9, 5)), greedy(new))], "overlap", max_running=8).ended) == 2


def broken(profiler: Any) -> None:
    raise RuntimeError("it is in use\nat the moment")


def test_a_profile_is_of_the_batches_between_its_start_and_its_end_and_never_overwrites_another(
    tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    write(tmp_path)
    backend = backend_of(f"{tmp_path}/config.json", load_format="dummy")
    ask(backend, 2)
    one, two, three, four = (tmp_path / "profiles" / name for name in ("one", "two", "three", "four"))
    with pytest.raises(ValueError, match=r"^no profile is running$"):
        backend.stop_profile()

    backend.start_profile(str(one), None)
    with pytest.raises(ValueError, match=rf"^a profile is running already, for {one}$"):
        backend.start_profile(str(two), 1)
    ask(backend, 3)
    assert backend.stop_profile() == [f"{one}/rank-0.json.gz"]
    assert spans(one / "rank-0.json.gz") == [
        "step 0: prefill, 2 requests",
        "step 1: decode, 2 requests",
        "step 2: decode, 2 requests",
    ]
    assert not two.exists()

    with pytest.raises(ValueError, match=rf"^output_dir: {one}/rank-0.json.gz exists and is not overwritten"):
        backend.start_profile(str(one), 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"^output_dir: {tmp_path}/file: cannot be written: File exists$"):
        backend.start_profile(f"{tmp_path}/file", 1)

    with monkeypatch.context() as patched:
        patched.setattr(torch.profiler.profile, "start", broken)
        with pytest.raises(ValueError, match=r"^torch's profiler does not start: it is in use$"):
            backend.start_profile(str(two), 1)

    # It ends by itself, and the next may begin.
    backend.start_profile(str(two), 2)
    ask(backend, 5)
    assert spans(two / "rank-0.json.gz") == ["step 0: prefill, 2 requests", "step 1: decode, 2 requests"]
    with pytest.raises(ValueError, match=r"^no profile is running$"):
        backend.stop_profile()

    # Somebody else's trace has come meanwhile.
    backend.start_profile(str(three), None)
    (three / "rank-0.json.gz").write_text("theirs")
    with pytest.raises(ValueError, match=rf"^output_dir: {three}/rank-0.json.gz has come to exist"):
        backend.stop_profile()
    assert [(path.name, path.read_text()) for path in three.iterdir()] == [("rank-0.json.gz", "theirs")]

    backend.start_profile(str(four), 100)
    ask(backend, 2)
    backend.close()
    assert len(spans(four / "rank-0.json.gz")) == 2, "a profile that still runs at the end is written"
    said = capfd.readouterr().err
    assert f"profile: {two}/rank-0.json.gz\n" in said and f"profile: {four}/rank-0.json.gz\n" in said
