"""The norm of a gradient, and clipping by it: in one operation where its parts lie side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_norm(weights: Sequence[Tensor], in_parts: bool = False) -> Tensor:
    """Return the norm of the weights' gradients, all of them together.

    Args:
        weights: whose gradients they are.
        in_parts: take the norm of the gradients' norms, as torch does, also where they are the parts of one tensor,
            whose own norm is found faster and may differ in its last bit.
    """
    grads = [each.grad for each in weights if each.grad is not None]
    whole = None if in_parts else _whole(grads)
    return torch.nn.utils.get_total_norm(grads) if whole is None else torch.linalg.vector_norm(whole)


def clip_gradient(weights: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale the weights' gradients down to a norm, as `torch.nn.utils.clip_grads_with_norm_` does.

    Args:
        weights: whose gradients they are.
        max_norm: to which one.
        norm: which they have.
    """
    whole = _whole([each.grad for each in weights if each.grad is not None])
    if whole is None:
        torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
    else:
        whole.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def _whole(grads: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor of which gradients are all the parts: one operation on it is quicker than one on each."""
    whole = grads[0]._base if grads else None
    if whole is None or any(each._base is not whole or not each.is_contiguous() for each in grads):
        return None
    end = whole.storage_offset()
    for begin, size in sorted((each.storage_offset(), each.numel()) for each in grads):
        if begin != end:  # they overlap, or leave something out
            return None
        end += size
    return whole if whole.is_contiguous() and end == whole.storage_offset() + whole.numel() else None
