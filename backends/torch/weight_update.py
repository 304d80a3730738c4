"""Other weights for a model that is being served: a checkpoint of the same shape, read into the same memory.

Where the parameters lie does not change, so CUDA graphs stay valid. Everything that can be wrong with a checkpoint is looked
for before the first write: after it, there is no way back to the old weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from backends.torch.loader import ModelNotFound, as_held, read_config, read_safetensors, safetensors_files
from backends.torch.model_config import ModelConfig, UnsupportedModel
from backends.torch.models.decoder import BadCheckpoint, Model


class HalfWritten(RuntimeError):
    """Some of the new weights are in place and some are not, in one line: nobody may be served from them."""


def check_weights(folder: str, model: Model, *, fp8: bool, max_context: int | None) -> list[Path]:
    """The weight files of ``folder``, which fit ``model`` tensor by tensor. ``fp8`` and ``max_context`` are those that it
    was loaded with. Nothing changes, and of the files hardly more than their headers is read.

    Raises ValueError, in one line.
    """
    path = Path(folder)
    try:
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{path}: not a folder with a config.json; weights are updated from a local one")
        config = as_held(read_config(path)[1], dtype=model.config.dtype, fp8=fp8, max_context=max_context)
        _check_same(config, model.config)
        files = safetensors_files(path)
        try:
            model.load_weights(read_safetensors(files), write=False)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{path}: {error}") from None
        return files
    except ValueError:
        raise
    # A server must not end for a folder that it can do without, whatever is in it.
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise UnsupportedModel(f"{path}: cannot be read: {type(error).__name__}: {line}") from error


def write_weights(files: list[Path], model: Model) -> None:
    """Fill the model from ``files``, what :func:`check_weights` has returned. Raises HalfWritten."""
    try:
        model.load_weights(read_safetensors(files))
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise HalfWritten(f"{files[0].parent}: the weights could not be written whole: {line}") from error


def _check_same(new: ModelConfig, old: ModelConfig) -> None:
    """Check that two models differ only in where they come from. Raises UnsupportedModel, naming the first difference."""
    for field in dataclasses.fields(ModelConfig):
        theirs, ours = getattr(new, field.name), getattr(old, field.name)
        if field.name != "source" and theirs != ours:
            raise UnsupportedModel(f"{new.source}: another model: {field.name} is {theirs}, not {ours}")
