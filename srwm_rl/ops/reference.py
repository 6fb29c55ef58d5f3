"""The recurrences in plain PyTorch, written as in the papers; the fused backends are tested against them."""

from __future__ import annotations

import torch
from torch import Tensor


def srwm_scan_reference(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    episode_starts: Tensor | None,
    retention: Tensor | None = None,
    shift_bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Step through the unroll; arguments and results as in `srwm_rl.ops.srwm_scan`, unchecked."""
    n_steps, batch, heads, size = x.shape
    columns = weight.shape[-1]
    widths = (columns - 2 * size - 4, size, size, 4)  # E, D, D, 4
    # Heads and batch share one axis, so that every product of a step is a single batched call.
    slow = weight.expand(batch, heads, size, columns).reshape(batch * heads, size, columns)  # [BH, D, E+2D+4]
    shift = torch.zeros_like(slow) if shift is None else shift.reshape(batch * heads, size, columns)
    inputs = x.reshape(n_steps, batch * heads, 1, size)  # [T, BH, 1, D]
    fresh = _fresh(episode_starts, n_steps, heads)
    alphas = None if retention is None else retention.reshape(n_steps, batch * heads, 1, 1)

    ys = []
    for t in range(n_steps):
        starts = fresh[t]
        if starts is not None:
            shift = shift.masked_fill(starts, 0)
        y, key, edit = _step(inputs[t], slow + shift, widths)
        shift = torch.baddbmm(shift if alphas is None else alphas[t] * shift, key.transpose(1, 2), edit)
        if shift_bound is not None:
            shift = _bounded(shift, shift_bound)
        ys.append(y)
    y = torch.stack(ys).view(n_steps, batch, heads, widths[0])
    return y, shift.reshape(batch, heads, size, columns)


def _step(x: Tensor, fast: Tensor, widths: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Map `x` `[BH, 1, D]` by the fast weight `[BH, D, E+2D+4]` to the output, the key and the edit."""
    y, query, key, beta = torch.bmm(x, fast).split(widths, dim=-1)  # [BH, 1, .]
    query, key, rates = query.softmax(-1), key.softmax(-1), beta.sigmoid().split(1, dim=-1)
    target = torch.bmm(query - key, fast)  # [BH, 1, E+2D+4]: what the query reads minus what the key reads
    rate_of_column = torch.cat([rate.expand(-1, -1, width) for rate, width in zip(rates, widths, strict=True)], dim=-1)
    return y, key, target * rate_of_column


def _bounded(shift: Tensor, bound: float) -> Tensor:
    """Scale each `[D, C]` of `shift` `[BH, D, C]` whose Frobenius norm is above `bound` back to it.

    The norm is clamped before the division: that of zeros would give a gradient of 0 * inf.
    """
    norm: Tensor = torch.linalg.vector_norm(shift, dim=(1, 2), keepdim=True)
    return shift * (bound / norm.clamp(min=bound))


def delta_scan_reference(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    rate: Tensor,
    weight: Tensor | None,
    episode_starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step through the unroll; arguments and results as in `srwm_rl.ops.delta_scan`, unchecked."""
    n_steps, batch, heads, size = key.shape
    pairs = batch * heads
    keys, values, queries = (x.reshape(n_steps, pairs, 1, size) for x in (key, value, query))  # [T, BH, 1, D]
    rates = rate.reshape(n_steps, pairs, 1, 1)
    fast = key.new_zeros(pairs, size, size) if weight is None else weight.reshape(pairs, size, size)
    fresh = _fresh(episode_starts, n_steps, heads)

    ys = []
    for t in range(n_steps):
        starts = fresh[t]
        if starts is not None:
            fast = fast.masked_fill(starts, 0)
        edit = rates[t] * (values[t] - torch.bmm(keys[t], fast))  # [BH, 1, D]
        fast = torch.baddbmm(fast, keys[t].transpose(1, 2), edit)
        ys.append(torch.bmm(queries[t], fast))
    return torch.stack(ys).view(n_steps, batch, heads, size), fast.view(batch, heads, size, size)


def _fresh(episode_starts: Tensor | None, n_steps: int, heads: int) -> list[Tensor | None]:
    """Return a mask of the states to zero for each step, `[BH, 1, 1]`, or None where no episode starts.

    States are masked, not multiplied by zero: the old episode's may be infinite. None is returned on the CPU only:
    other devices would have to be synchronised, and a captured graph must not depend on the flags.
    """
    if episode_starts is None:
        return [None] * n_steps
    starts = episode_starts != 0  # [T, B]
    masks = starts.repeat_interleave(heads, dim=1)[..., None, None]  # [T, BH, 1, 1]
    if masks.device.type != "cpu" or torch.compiler.is_exporting():
        return [*masks]
    return [masks[t] if any_start else None for t, any_start in enumerate(starts.any(dim=1).tolist())]
