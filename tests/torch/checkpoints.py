"""Small checkpoints and configurations on disk, for the tests of what is read from them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.torch.loader import load_model
from backends.torch.ops import load_ops
from tests.torch.tiny import COMMON, make

OPS = load_ops("reference")
LLAMA = {"architectures": ["LlamaForCausalLM"], **COMMON}


def write(folder, **changes):
    """A config.json of a small Llama with these changes; None takes a field away."""
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return f"{folder}/config.json"


def says(error, call, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
    assert "\n" not in message


def load(path, **options):
    return load_model(str(path), device="cpu", ops=OPS, **options)


def rewrite(folder, change):
    """Put all tensors into one file, after ``change(tensors)``."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def altered(folder, to, architecture="LlamaForCausalLM", **changes):
    """A model in ``folder``, and one of the same shape with other weights in ``to``, which is returned."""
    make(architecture, folder, **changes)
    shutil.copytree(folder, to)

    def change(tensors):
        generator = torch.Generator().manual_seed(5)
        for name, tensor in tensors.items():
            tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    rewrite(to, change)
    return to
