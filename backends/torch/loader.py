"""The way from a name to a model: its files, what they say, and the weights straight into this rank's share.

A model is built without memory, gets the memory of its own share on its device, and is filled one checkpoint tensor at a
time, read from mapped files: at no moment are there two copies of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from backends.torch.fp8 import Fp8
from backends.torch.gguf_file import GGUFFile
from backends.torch.layers import Fp8Source
from backends.torch.model_config import Fields, ModelConfig, UnsupportedModel
from backends.torch.models import model_class
from backends.torch.models.decoder import BadCheckpoint, Model
from backends.torch.parallel import SINGLE, Parallel
from ground.errors import InputError
from ground.json_file import read_json

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
FORMATS = ("auto", "safetensors", "gguf", "dummy")
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
"""What a model needs of its repository besides weights."""
DUMMY_STD = 0.02


class ModelNotFound(InputError):
    """There is no such model, or its files are not all there."""


def load_config(name_or_path: str) -> ModelConfig:
    """The configuration of a model: a folder, a config.json, a GGUF file, or a Hugging Face id.

    Raises ModelNotFound, or UnsupportedModel when the layers here do not compute such a model.
    """
    return read_config(_locate(name_or_path, weights=False))[1]


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str,
    ops: ModuleType,
    parallel: Parallel = SINGLE,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    max_context: int | None = None,
    fp8: bool = False,
) -> tuple[Model, ModelConfig]:
    """This rank's share of a model, filled and on ``device``, and its configuration with the dtype it is held in.

    ``dtype`` None: as saved; where no file says, float32 on a CPU and bfloat16 on a GPU. ``load_format`` "auto" takes the
    weights that are there; "dummy" needs a configuration alone and draws weights from ``seed``: the same for every split
    of the model, on devices of the same kind.

    ``max_context``: tokens a sequence may have, if fewer than the model allows; the rotary table is made for so many.

    ``fp8``: hold the projections of attention and MLPs in FP8, with a scale for each tensor, whatever they were saved in.
    A checkpoint in FP8 stays as it is.

    Raises ModelNotFound, UnsupportedModel, BadCheckpoint, or ValueError for an unknown ``load_format``.
    """
    if load_format not in FORMATS:
        raise ValueError(f"load_format: {load_format!r} is not one of {', '.join(FORMATS)}")
    path = _locate(name_or_path, weights=load_format != "dummy")
    fields, config, gguf = read_config(path)
    if dtype is None:
        dtype = config.dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    config = as_held(config, dtype=dtype, fp8=fp8, max_context=max_context)
    if config.fp8 is not None and load_format == "dummy":
        config = replace(config, fp8=replace(config.fp8, saved=False))
    if load_format == "safetensors" and gguf is not None:
        raise ModelNotFound(f"{path}: is a GGUF file; load_format says safetensors")
    if load_format == "gguf" and gguf is None:
        raise ModelNotFound(f"{path}: has no GGUF file")

    family = model_class(fields)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = family(config, ops, parallel)
    finally:
        torch.set_default_dtype(previous)
    if load_format == "dummy":
        model.place(device)
        _fill_dummy(model, seed)
        return model.eval(), config
    # Files are listed before memory is taken, so that a missing one costs nothing.
    files = [] if gguf is not None else safetensors_files(path)
    model.place(device)
    try:
        model.load_weights(read_safetensors(files) if gguf is None else gguf.tensors())
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from None
    return model.eval(), config


def as_held(config: ModelConfig, *, dtype: torch.dtype | None, fp8: bool, max_context: int | None) -> ModelConfig:
    """A checkpoint's configuration as it is held when :func:`load_model` is asked for these. Raises UnsupportedModel."""
    config = replace(config, dtype=dtype)
    if fp8 and config.fp8 is None:
        if config.experts:
            raise UnsupportedModel(f"{config.source}: FP8 is not supported for experts")
        config = replace(config, fp8=Fp8())
    if max_context is not None:
        if not 1 <= max_context <= config.max_context:
            raise UnsupportedModel(
                f"{config.source}: a context of {max_context} tokens is not within 1 to {config.max_context}, what the "
                "model allows"
            )
        config = replace(config, max_context=max_context)
    return config


def load_tokenizer(name_or_path: str) -> Any:
    """The transformers tokenizer of a model, with its chat template: from its folder, its GGUF file or a Hugging Face id.

    Raises ModelNotFound when there is none.
    """
    from transformers import AutoTokenizer

    path = _locate(name_or_path, weights=False)
    folder = path if path.is_dir() else path.parent
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(folder), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelNotFound(f"{path}: no tokenizer that can be read ({_first_line(error)})") from None


def _locate(name_or_path: str, *, weights: bool) -> Path:
    """A folder with a config.json, a config.json, or a .gguf file. Raises ModelNotFound."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix not in (".gguf", ".json"):
            raise ModelNotFound(f"{path}: neither a config.json nor a .gguf file")
        return path
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        if ggufs:
            raise ModelNotFound(f"{path}: has {len(ggufs)} GGUF files, name one of them: {ggufs[0].name}, ...")
        raise ModelNotFound(f"{path}: has neither a config.json nor a .gguf file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) or name_or_path.startswith("."):
        raise ModelNotFound(f"{name_or_path}: no such file or folder")
    return _from_hub(name_or_path, weights)


def _from_hub(name: str, weights: bool) -> Path:
    """The folder of a Hugging Face repository: from the local cache if it is whole there, else fetched."""
    import huggingface_hub

    patterns = HUB_FILES + ["*.safetensors"] * weights
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if (folder / "config.json").is_file():
            if weights:
                safetensors_files(folder)
            return folder
    except (OSError, ValueError):
        pass  # not in the cache, or not whole: the attempt below completes it or says why it cannot
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    # The hub's client raises errors of its own, of its HTTP library and of the operating system.
    except Exception as error:
        raise ModelNotFound(
            f"{name}: not a file or folder, not whole in the local Hugging Face cache, and not to be had online "
            f"({type(error).__name__})"
        ) from None
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{name}: this Hugging Face repository has no config.json")
    return folder


def read_config(path: Path) -> tuple[Fields, ModelConfig, GGUFFile | None]:
    """Return what a folder with a config.json, a config.json or a .gguf file says. Raises UnsupportedModel."""
    gguf = None
    if path.suffix == ".gguf":
        gguf = GGUFFile(path)
        fields = gguf.fields()
    else:
        file = path / "config.json" if path.is_dir() else path
        fields = Fields(read_json(file, UnsupportedModel), str(file))
    config = model_class(fields).read_config(fields)
    # generation_config.json may know more tokens that end an answer; as in transformers, it wins.
    extra = path / "generation_config.json"
    if path.is_dir() and extra.is_file():
        ids = Fields(read_json(extra, UnsupportedModel), str(extra)).token_ids("eos_token_id")
        config = replace(config, eos_token_ids=ids or config.eos_token_ids)
    return fields, config, gguf


def safetensors_files(path: Path) -> list[Path]:
    """The weight files of a folder, all of which exist. Raises ModelNotFound."""
    if path.is_file():
        raise ModelNotFound(f"{path}: a configuration alone has no weights (load_format dummy draws random ones)")
    index = path / INDEX
    if index.is_file():
        names = read_json(index, UnsupportedModel).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelNotFound(f"{index}: weight_map is missing")
        files = [path / name for name in sorted(set(names.values()))]
    elif (path / SINGLE_FILE).is_file():
        files = [path / SINGLE_FILE]
    else:
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            found = "pytorch_model.bin is not read" if any(path.glob("*.bin")) else "no *.safetensors"
            raise ModelNotFound(f"{path}: no weights ({found}); load_format dummy draws random ones")
    for file in files:
        if not file.is_file():
            raise ModelNotFound(f"{file}: missing, though {INDEX} names it")
    return files


def read_safetensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, mapped: its values are read when they are used. Raises BadCheckpoint."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise BadCheckpoint(f"{file.name}: {_first_line(error)}") from None


@torch.no_grad()
def _fill_dummy(model: Model, seed: int) -> None:
    """Random weights, each tensor from its own name, so that every split of the model holds parts of the same."""
    for source in model.sources():
        into = source.into
        generator = torch.Generator(into.device).manual_seed(_seed(seed, source.name))
        # FP8 weights are drawn in the model's dtype and quantised like others.
        dtype = model.config.dtype if isinstance(source, Fp8Source) else into.dtype
        whole = torch.empty(source.shape, dtype=dtype, device=into.device)
        whole.normal_(1.0 if source.name.endswith("norm.weight") else 0.0, DUMMY_STD, generator=generator)
        source.fill(whole)


def _seed(seed: int, name: str) -> int:
    # The CPU's generator looks at 32 bits only: all of them have to depend on both.
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest(), "little")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
