"""The folder of a run's record among those of its command."""

from __future__ import annotations

from pathlib import Path


def run_folder(out: Path, name: str) -> Path:
    """The folder of the run called ``name`` in the output folder ``out``. A loop of one's own, ``module:function``, becomes
    ``module.function``: not every system takes a colon."""
    return out / name.replace(":", ".")
