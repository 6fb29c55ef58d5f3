"""Copies between host and device through pinned memory; functions of observations, which may be dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ALIGNMENT = 16  # bytes, of tensors within a buffer


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


class PackedTensors:
    """Tensors that cross between the host and a device in one copy: views of a buffer on each side, pinned on the host.

    Args:
        examples: tensors in tuples and dicts, whose shapes and dtypes are taken.
        device: the other side.

    Attributes:
        on_host: the tensors on the host, arranged as `examples`, zeros at first.
        on_device: the tensors on the device.
    """

    def __init__(self, examples: Any, device: torch.device) -> None:
        leaves, structure = pytree.tree_flatten(examples)
        stops = np.cumsum([-(-leaf.nbytes // ALIGNMENT) * ALIGNMENT for leaf in leaves]).tolist()
        self._host = torch.zeros(stops[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(stops[-1], dtype=torch.uint8, device=device)
        self.on_host, self.on_device = (
            pytree.tree_unflatten(
                [
                    buffer[start : start + leaf.nbytes].view(leaf.dtype).view(leaf.shape)
                    for leaf, start in zip(leaves, [0, *stops], strict=False)
                ],
                structure,
            )
            for buffer in (self._host, self._device)
        )

    def to_device(self) -> None:
        """Copy all tensors to the device, without waiting for it."""
        self._device.copy_(self._host, non_blocking=True)

    def to_host(self) -> None:
        """Copy all tensors to the host, and wait for the work launched so far."""
        self._host.copy_(self._device, non_blocking=True)
        if self._device.is_cuda:
            torch.cuda.current_stream(self._device.device).synchronize()
