"""What would make the host wait for a GPU, seen on a CPU: operators that read values back, and numbers assigned through an
index, which are sent to the device first."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READ_BACK = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.bincount,
    aten.unique_consecutive,
    aten._unique2,
    aten.repeat_interleave,
}


class WouldWait(AssertionError):
    """An operator would make the host wait."""


class NoWaits(TorchDispatchMode):
    """Raise :class:`WouldWait` at such an operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket
        if kind in READ_BACK:
            raise WouldWait(f"{func} reads a value back")
        if kind in (aten.index, aten.index_put, aten.index_put_):
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                raise WouldWait(f"{func} by a mask counts what it selects")
            if kind is not aten.index and args[2].dim() == 0:
                raise WouldWait(f"{func} assigns a number")
        return func(*args, **(kwargs or {}))
