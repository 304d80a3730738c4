"""One rank: its runner, and what may be done to it between two batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backends.torch.runner import ModelRunner, Output
from backends.torch.step_profile import StepProfile, check_folder, trace_path
from backends.torch.weight_update import check_weights, write_weights
from workbench.scheduler.batch import ModelWorkerBatch


class Rank:
    """All of it happens in the thread that runs the rank's batches, in the order in which it is asked for. What cannot be
    done raises ValueError, in one line."""

    def __init__(
        self, runner: ModelRunner, number: int = 0, *, fp8: bool = False, max_context: int | None = None
    ) -> None:
        """``fp8`` and ``max_context`` are those that the runner's model was loaded with."""
        self.runner, self.number = runner, number
        self._fp8, self._max_context = fp8, max_context
        self._files: list[Path] = []
        self.profile: StepProfile | None = None

    def run(
        self,
        batch: ModelWorkerBatch,
        hidden: Tensor | None = None,
        known: np.ndarray | None = None,
        begin: Callable[[], object] = lambda: None,
    ) -> Output:
        """:meth:`ModelRunner.run`; :meth:`ran` is to be called once the result is on its way."""
        if self.profile is None:
            return self.runner.run(batch, hidden, known, begin)
        with self.profile.around(batch):
            return self.runner.run(batch, hidden, known, begin)

    def sample(self, masks: np.ndarray | None) -> Output:
        """:meth:`ModelRunner.sample`."""
        return self.runner.sample(masks)

    def ran(self) -> None:
        """A batch was run. A profile that has seen enough of them is written."""
        if self.profile is not None and self.profile.ran():
            self.close()

    def check_weights(self, folder: str) -> None:
        """Look whether the checkpoint in ``folder`` can take the place of the model's weights. Raises ValueError."""
        self._files = check_weights(folder, self.runner.model, fp8=self._fp8, max_context=self._max_context)

    def write_weights(self) -> None:
        """Put the weights that were looked at last in their place. Raises HalfWritten."""
        write_weights(self._files, self.runner.model)
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)

    def check_profile(self, folder: str) -> None:
        """Look whether a profile can begin whose trace goes to ``folder``. Raises ValueError."""
        if self.profile is not None:
            raise ValueError(f"a profile is running already, for {self.profile.path.parent}")
        check_folder(folder)

    def start_profile(self, folder: str, steps: int | None) -> None:
        """Profile from the next batch on, ``steps`` of them or until it is stopped."""
        self.profile = StepProfile(trace_path(folder, self.number), steps, self.runner.device)

    def stop_profile(self) -> str:
        """End the profile, write it and return where it is. Raises ValueError when there is none, or no place for it."""
        found, self.profile = self.profile, None
        if found is None:
            raise ValueError("no profile is running")
        found.stop()
        return str(found.path)

    def close(self) -> None:
        """End a profile, if there is one, with nobody there to be told but stderr."""
        if self.profile is None:
            return
        try:
            print(f"profile: {self.stop_profile()}", file=sys.stderr)
        except ValueError as error:
            print(f"profile: {error}", file=sys.stderr)
