"""Small arrays from the host to the device without waiting for either."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; off CUDA, a tensor over the array itself.

    On CUDA it goes through pinned memory. From pageable memory ``.to(device)`` and ``torch.tensor(..., device=device)``
    wait for everything launched before, which would undo what the overlap loop is for. The caching host allocator hands out
    the staging memory, so a step costs no allocation once it is warm, and keeps it from reuse until the copy is done.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
