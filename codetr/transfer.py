"""Small tensors on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_on(device: torch.device, values: Sequence, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)`` that does not wait for the device.

    Torch's own copies from memory that a GPU cannot read by itself, and waits until all that was
    queued before it is done: with a few of them in each loss the GPU runs dry.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor.to(device)`` of a tensor on the host, as :func:`tensor_on` without waiting."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
