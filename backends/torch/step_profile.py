"""torch's profiler around the batches of one rank. Not yet run on a GPU.

It sees the thread that it is started in, which has to be the one that runs the batches.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from workbench.scheduler.batch import ModelWorkerBatch


class StepProfile:
    """A profile that has begun. Every batch is a span in it, with the operators below; :meth:`stop` writes it."""

    def __init__(self, path: Path, steps: int | None, device: torch.device) -> None:
        """``path``: of the Chrome trace to write. ``steps``: batches to see; None: all until it is stopped.

        Raises ValueError, in one line, when torch cannot.
        """
        self.path = path
        self._left = steps
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
        try:
            self._profiler.start()
        except RuntimeError as error:
            raise ValueError(f"torch's profiler does not start: {str(error).splitlines()[0]}") from error

    def around(self, batch: ModelWorkerBatch) -> AbstractContextManager[object]:
        """Marks what runs in it as the work of a batch."""
        return record_function(f"step {batch.step}: {batch.mode}, {len(batch.rows)} requests")

    def ran(self) -> bool:
        """Count a batch. Whether it was the last one to see."""
        if self._left is not None:
            self._left -= 1
        return self._left == 0

    def stop(self) -> None:
        """Write the trace, whole or not at all. Raises ValueError, in one line, when that cannot be."""
        partial = self.path.with_name(f".partial-{self.path.name}")
        try:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(partial))
            if self.path.exists():
                raise ValueError(f"output_dir: {self.path} has come to exist and is not overwritten")
            partial.rename(self.path)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"output_dir: {self.path}: cannot be written: {why.splitlines()[0]}") from error
        finally:
            partial.unlink(missing_ok=True)


def trace_path(folder: str, rank: int) -> Path:
    """Return where the trace of a rank goes."""
    return Path(folder) / f"rank-{rank}.json.gz"


def check_folder(folder: str) -> None:
    """Make ``folder`` if need be. Raises ValueError, in one line, when no trace can be written there, or one lies there."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = sorted(path.glob("rank-*.json.gz"))
        if found:
            raise ValueError(f"output_dir: {found[0]} exists and is not overwritten; name another folder")
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"output_dir: {path}: cannot be written: {error.strerror or error}") from error
