"""The machine that instances stand in: settings of its links, and the TOML file that describes it (``--machine``).

Links belong to the machine, not to the GPU: two boxes with the same card differ by three times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ground.errors import InputError
from ground.link import parse_latency, parse_rate
from ground.value_file import read_toml
from workbench.scheduler.config import ConfigError
from workbench.scheduler.settings import HARDWARE, setting, settings_of


def _together(settings: Any, loop: str) -> bool:
    return bool(settings.tp * settings.pp > 1 or settings.ep > 1)


_of_several = partial(
    setting,
    None,
    group=HARDWARE,
    needs="GPUs that work together: tp, pp or ep of 2 or more",
    acts=_together,
)
_of_links = partial(_of_several, idle={"real": "the links are the machine's"})
"""Declares a setting of the links between GPUs that work together. None: as the GPU's entry says."""


def with_unit(name: str, parse: Callable[[object], float]) -> Callable[[object], str]:
    """Check a text for a number and its unit; it is kept as it was written."""

    def read(written: object) -> str:
        try:
            parse(written)
        except InputError as error:
            raise ConfigError(f"{name}: {error}") from None
        return str(written).strip()

    return read


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Settings of GPUs and of the machines that they stand in. None: as the GPU's entry of the catalogue or file says."""

    gpu: str = setting(
        "h100",
        group=HARDWARE,
        help="GPU of the catalogue or a TOML file. Default {default}.",
        idle={"real": "the GPU is the machine's"},
    )
    machine: str | None = setting(
        None,
        group=HARDWARE,
        help="TOML file of a machine: gpu, gpus-per-node, and the flags of links below. Flags win.",
        idle={"real": "the machine is the one it runs on"},
    )
    link: str | None = _of_links(
        help="What collectives achieve between GPUs of a machine, one direction, with its unit: 16GB/s. "
        "Default: the GPU's.",
        read=with_unit("link", parse_rate),
    )
    link_latency: str | None = _of_links(
        help="What a collective between GPUs of a machine takes whatever its size: 20us. Default: the GPU's.",
        read=with_unit("link_latency", parse_latency),
    )
    gpus_per_node: int | None = _of_links(
        least=1,
        help="GPUs of a machine. Default: the GPU's.",
    )
    nodes: int | None = _of_several(
        least=1,
        help="Machines over which GPUs that work together spread evenly. Default: as few as hold them; of a real model "
        "one.",
        idle={"replayed": "it runs on one machine"},
    )
    node_link: str | None = _of_links(
        help="The same of one GPU to those of other machines: 50GB/s, 400Gbit/s. Default: the GPU's.",
        read=with_unit("node_link", parse_rate),
    )
    node_link_latency: str | None = _of_links(
        help="What a collective between machines takes whatever its size: 20us. Default: the GPU's.",
        read=with_unit("node_link_latency", parse_latency),
    )


FACTS = tuple(name for name in settings_of(MachineSettings) if name not in ("machine", "nodes"))
"""Keys of a machine's file: settings by their names, with dashes or underscores."""


def read_machine(file: str) -> dict[str, Any]:
    """The settings that a machine's file implies, the GPU's file being looked for beside it. Raises ConfigError in one line
    that names file and key."""
    path, declared = Path(file), settings_of(MachineSettings)
    found: dict[str, Any] = {}
    for dashed, value in read_toml(path, ConfigError).items():
        name = dashed.replace("-", "_")
        if name not in FACTS:
            raise ConfigError(f"{path}: {dashed}: no such key of a machine; there are {', '.join(FACTS)}")
        if name in found:
            raise ConfigError(f"{path}: {dashed}: given twice")
        if name == "gpu":
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{path}: gpu: {value!r} is not a name or a file")
            beside = path.parent / value
            found[name] = str(beside) if value.endswith(".toml") and beside.is_file() else value
            continue
        if not declared[name].fits(value) or value is None:
            raise ConfigError(f"{path}: {dashed}: {value!r} is not {declared[name].kind.__name__}")
        try:
            found[name] = declared[name].meant(value)
            declared[name].check(found[name])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return found
