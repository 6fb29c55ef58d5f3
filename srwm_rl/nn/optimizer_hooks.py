"""Step sizes of an SRWM's query, key and beta columns that differ from the other weights', under any optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from srwm_rl.nn.layers import SRWMLayer

_MARK = "_scales_edit_columns"


def scale_edit_columns(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Make an optimizer's steps of query, key and beta columns `edit_lr_multiplier` times as long.

    Equal, up to rounding, to a parameter group with that multiple of the learning rate, weight decay included. The
    columns stay part of one parameter, which files and the C library know as a whole; the change that a step makes in
    them is multiplied after it. `SRWMPolicy` calls this for its optimizer; call it for an optimizer of your own. A
    second call does nothing, nor does one without such layers.

    Args:
        optimizer: of the module's parameters. A copy of it (`deepcopy`, pickle) has no hooks.
        module: with `SRWMLayer`s in it, such as a core or a policy.
    """
    layers = [m for m in module.modules() if isinstance(m, SRWMLayer) and m.edit_lr_multiplier != 1]
    if not layers or hasattr(optimizer, _MARK):
        return
    steps = _EditColumnSteps(layers)
    optimizer.register_step_pre_hook(steps.record)
    optimizer.register_step_post_hook(steps.scale)
    setattr(optimizer, _MARK, True)


class _EditColumnSteps:
    """The hooks around a step, and the columns `[H, D, n]` of each layer before it."""

    def __init__(self, layers: list[SRWMLayer]) -> None:
        self.layers = layers
        self.before: list[Tensor] = []

    def record(self, *_: Any) -> None:
        self.before = [layer.edit_columns().clone() for layer in self.layers]

    def scale(self, *_: Any) -> None:
        for layer, before in zip(self.layers, self.before, strict=True):
            # after - (before - after) * (multiplier - 1); where a step was skipped the columns stay bit for bit
            layer.edit_columns().lerp_(before, 1 - layer.edit_lr_multiplier)
        self.before = []
