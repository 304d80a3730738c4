"""The part of the model that this process holds, and its way to talk to the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Parallel:
    """One rank of ``tp`` x ``pp``: ranks of a tensor-parallel group are neighbours, stages follow one another."""

    tp: int = 1
    tp_rank: int = 0
    pp: int = 1
    stage: int = 0
    tp_group: Any = None

    @property
    def first_stage(self) -> bool:
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        return self.stage == self.pp - 1

    def layers(self, count: int) -> range:
        """The layers of this stage: as even as possible, earlier stages take the remainder."""
        least, more = divmod(count, self.pp)
        start = self.stage * least + min(self.stage, more)
        return range(start, start + least + (self.stage < more))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel group, in place."""
        if self.tp > 1:
            dist.all_reduce(x, group=self.tp_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last axis over the tensor-parallel group."""
        if self.tp == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.tp)]
        dist.all_gather(parts, x.contiguous(), group=self.tp_group)
        return torch.cat(parts, dim=-1)


SINGLE = Parallel()
