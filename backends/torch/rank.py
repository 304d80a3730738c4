"""One rank: its runner, and what may be done to it between two batches."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backends.torch.kv_pages import KVShare, weights_sample
from backends.torch.layers import kv_head_share
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

    def kv_share(self) -> KVShare:
        """What this rank holds of the KV of its model."""
        runner = self.runner
        assert runner.kv_pages is not None
        layers = runner.parallel.layers(runner.config.layers)
        head, heads = kv_head_share(runner.config, runner.parallel)
        return KVShare(layers.start, layers.stop, head, head + heads, runner.kv_pages.page_bytes)

    def head_dim(self) -> int:
        """Size of a head."""
        return self.runner.config.head_dim

    def weights_sample(self) -> list[str]:
        """Hashes of samples of its layers' weights; nothing on any but the first rank of a stage."""
        return [] if self.runner.parallel.tp_rank else weights_sample(self.runner.model.layers)

    def config_text(self) -> str:
        """Everything that its configuration says of what a model computes."""
        config = dataclasses.replace(self.runner.config, source="", max_context=0, dtype=None, fp8=None)
        return repr(config)

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
