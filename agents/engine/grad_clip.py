"""Gradient norm and clipping, in one operation where the gradients are views of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_norm(parameters: Sequence[Tensor], in_parts: bool = False) -> Tensor:
    """Return the norm `[]` of all gradients together.

    Args:
        parameters: whose `.grad` they are.
        in_parts: take the norm of the gradients' norms, as torch does, even where they are views of one tensor, whose
            own norm is faster and may differ in its last bit.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = None if in_parts else _flat(grads)
    return torch.nn.utils.get_total_norm(grads) if flat is None else torch.linalg.vector_norm(flat)


def clip_gradient(parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients down to a norm, as `torch.nn.utils.clip_grads_with_norm_` does.

    Args:
        parameters: whose `.grad` they are.
        max_norm: the norm afterwards, at most.
        norm: `[]`, the present one.
    """
    flat = _flat([parameter.grad for parameter in parameters if parameter.grad is not None])
    if flat is None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    else:
        flat.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def _flat(grads: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor that the gradients cover as views, without gaps or overlaps; None if there is none."""
    base = grads[0]._base if grads else None
    if base is None or any(grad._base is not base or not grad.is_contiguous() for grad in grads):
        return None
    end = base.storage_offset()
    for offset, size in sorted((grad.storage_offset(), grad.numel()) for grad in grads):
        if offset != end:
            return None
        end += size
    return base if base.is_contiguous() and end == base.storage_offset() + base.numel() else None
