"""Copies between host and device through pinned memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device: on a CPU without a copy, on a GPU without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # torch keeps the pinned copy until it is transferred
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Return tensors of one device as arrays, waiting for it once; on a CPU without a copy."""
    device = tensors[0].device
    if device.type != "cuda":
        return [tensor.cpu().numpy() for tensor in tensors]
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return [copy.numpy() for copy in copies]
