"""The self-referential weight matrix (SRWM) as a policy's memory, its ablations and the Delta Net.

The variant "paper" is that of the published RL agents: IDSIA/modern-srwm, reinforcement_learning/torchbeast/layer.py.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.layers import DeltaLayer, FakeSRLayer, SRDeltaLayer, SRWMLayer


class SRWMCore(StackCore):
    """Input projection, then layers of self-modifying heads, each followed by a feed-forward block.

    The state holds, per layer, the shift of every head: `S = H * D * (3D+4)`. Its settings are those of
    `srwm_rl.nn.layers.SRWMLayer`; `frozen`, `retention`, `shift_bound` and `identity_init` are off in both variants,
    `key_init` and `edit_lr_multiplier` are 1.
    """

    layer_class = SRWMLayer
    variants: ClassVar = {
        "default": {"input_softmax": False, "norm": "pre", "query_init": 0.01, "beta_init": 0.0},
        "paper": {"input_softmax": True, "norm": "none", "query_init": 1.0, "beta_init": 0.0},
    }


class SRWMNoCarryCore(SRWMCore):
    """`SRWMCore` without state between calls: the paper's ablation of long memory.

    Every call starts from the slow weight, whatever the state argument. Called one step at a time, as by an acting
    policy and by the authors' RL code, it never reads its own edits and is memoryless. Over a whole unroll in one call
    it computes another policy than the one that acts: `srwm_rl.nn.cores.unroll.run_core` evaluates steps apart.

    Arguments as `SRWMCore`. The state it returns is zeros, in `SRWMCore`'s shape.
    """

    carries_over = False

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll from the slow weight; shapes as in `Core.forward`."""
        zeros = torch.zeros_like(state)
        return super().forward(x, zeros, episode_starts)[0], zeros


class SRDeltaCore(SRWMCore):
    """`SRWMCore` whose heads each write a delta-rule fast weight and read their output from it.

    The state holds, per layer, the shift of every head, then its fast weight: `S = H * D * (5D+5) + H * D * D`.
    Arguments as `SRWMCore`; see `srwm_rl.nn.layers.SRDeltaLayer`.
    """

    layer_class = SRDeltaLayer


class DeltaCore(StackCore):
    """Input projection, then Delta Net layers, each followed by a feed-forward block: the paper's strongest baseline.

    The state holds, per layer, the fast weight of every head: `S = H * D * D`. Its settings are those of
    `srwm_rl.nn.layers.DeltaLayer`; both variants are the published layer.
    """

    layer_class = DeltaLayer
    variants: ClassVar = {
        name: {"input_softmax": False, "norm": "pre", "query_init": 1.0, "beta_init": 0.0}
        for name in ("default", "paper")
    }


class FakeSRCore(StackCore):
    """`SRWMCore` without self-modification: the control that measures its benefit. The state is empty.

    Its settings are those of `srwm_rl.nn.layers.FakeSRLayer`.
    """

    layer_class = FakeSRLayer
    variants: ClassVar = {
        "default": {"input_softmax": False, "norm": "pre"},
        "paper": {"input_softmax": False, "norm": "none"},
    }
