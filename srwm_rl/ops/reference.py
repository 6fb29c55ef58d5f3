"""The recurrence in plain PyTorch: reads like the paper, runs anywhere, and is what fast twins are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def srwm_scan_reference(
    x: Tensor, weight: Tensor, shift: Tensor | None, episode_starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step through the unroll; arguments and results as in `srwm_rl.ops.srwm_scan`, unchecked."""
    n_steps, batch, heads, size = x.shape
    columns = weight.shape[-1]
    # Heads and batch share one axis, so that every product of a step is a single batched call.
    slow = weight.expand(batch, heads, size, columns).reshape(batch * heads, size, columns)  # [BH, D, 3D+4]
    shift = torch.zeros_like(slow) if shift is None else shift.reshape(batch * heads, size, columns)
    inputs = x.reshape(n_steps, batch * heads, 1, size)  # [T, BH, 1, D]
    keep = [None] * n_steps if episode_starts is None else _keep_masks(episode_starts, heads, x.dtype)

    rate_of_column = torch.arange(columns, device=x.device).div(size, rounding_mode="floor").clamp(max=3)

    ys = []
    for t in range(n_steps):
        mask = keep[t]
        if mask is not None:
            shift = shift * mask
        y, shift = _step(inputs[t], slow, shift, rate_of_column)
        ys.append(y)
    return torch.stack(ys).view(n_steps, batch, heads, size), shift.reshape(batch, heads, size, columns)


def _step(x: Tensor, slow: Tensor, shift: Tensor, rate_of_column: Tensor) -> tuple[Tensor, Tensor]:
    """Read from the fast weight, then let what was read rewrite it: `x` `[BH, 1, D]`, weights `[BH, D, 3D+4]`."""
    size = x.shape[-1]
    fast = slow + shift
    y, query, key, beta = torch.bmm(x, fast).split((size, size, size, 4), dim=-1)  # [BH, 1, .]
    query, key, rate = query.softmax(-1), key.softmax(-1), beta.sigmoid()
    target = torch.bmm(query - key, fast)  # [BH, 1, 3D+4]: what the query reads minus what the key reads
    edit = target * rate.index_select(-1, rate_of_column)
    return y, torch.baddbmm(shift, key.transpose(1, 2), edit)


def _keep_masks(episode_starts: Tensor, heads: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Return for each step `[BH, 1, 1]` zeros and ones, or None where no episode starts, to skip the product there."""
    keep = (episode_starts == 0).to(dtype)  # [T, B]
    starts = (keep == 0).any(dim=1).tolist()
    masks = keep.repeat_interleave(heads, dim=1)[..., None, None]  # [T, BH, 1, 1]
    return [masks[t] if starts[t] else None for t in range(len(starts))]
