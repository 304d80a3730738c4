"""What the tests of real runners share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama."""
    from tests.torch.tiny import make

    folder = tmp_path_factory.mktemp("model")
    make("LlamaForCausalLM", folder)
    return folder
