"""Copies between host and device through pinned memory; functions of observations, which may be dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def map_obs(function: Callable[..., Any], *obs: Any) -> Any:
    """Return a function of observations; of dicts key by key."""
    if isinstance(obs[0], dict):
        return {key: function(*[part[key] for part in obs]) for key in obs[0]}
    return function(*obs)


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
