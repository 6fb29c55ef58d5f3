"""Between host and device, through pinned memory: nothing waits that need not."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array's numbers on a device: on a CPU in their own memory; on a GPU nobody waits for them."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # torch keeps the pinned copy until it has crossed
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Return tensors of one device as arrays, waiting for it once; those of a CPU in their own memory."""
    device = tensors[0].device
    if device.type != "cuda":
        return [each.cpu().numpy() for each in tensors]
    copies = [torch.empty_like(each, device="cpu", pin_memory=True) for each in tensors]
    for copy, each in zip(copies, tensors, strict=True):
        copy.copy_(each, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return [copy.numpy() for copy in copies]
