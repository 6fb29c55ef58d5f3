"""The self-referential weight matrix (SRWM) as a policy's memory, its ablations and the Delta Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.layers import DeltaLayer, FakeSRLayer, Norm, SRDeltaLayer, SRWMLayer

# The variant "paper" is that of the published RL agents: IDSIA/modern-srwm, reinforcement_learning/torchbeast/layer.py.
_PUBLISHED_DELTA = {"input_softmax": False, "norm": "pre", "query_init": 1.0, "beta_init": 0.0}


class SRWMCore(StackCore):
    """Input projection, then layers of self-modifying heads, each followed by a feed-forward block.

    The state holds, per layer, the shift of every head: `S = H * D * (3D+4)`.

    Args:
        input_size: I.
        hidden_size: width of the layers and of the output.
        n_layers: L.
        n_heads: H; `D = hidden_size / H`.
        ff_size: inner width of the feed-forward blocks; None: four times `hidden_size`, as published.
        variant: "default", or "paper" for the published layer exactly; sets the four settings below where None.
        input_softmax, norm, query_init, beta_init: see `srwm_rl.nn.layers.SRWMLayer`.
        frozen, retention, shift_bound: options of the same layer, off in both variants.

    Raises:
        UserError: an unknown variant, norm or column group, a bound not above 0, or sizes that do not divide.
    """

    layer_class = SRWMLayer
    variants: ClassVar = {
        "default": {"input_softmax": False, "norm": "pre", "query_init": 0.01, "beta_init": 0.0},
        "paper": {"input_softmax": True, "norm": "none", "query_init": 1.0, "beta_init": 0.0},
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 128,
        n_layers: int = 2,
        n_heads: int = 8,
        ff_size: int | None = None,
        variant: str = "default",
        input_softmax: bool | None = None,
        norm: Norm | None = None,
        query_init: float | None = None,
        beta_init: float | None = None,
        frozen: str | Sequence[str] = (),
        retention: bool = False,
        shift_bound: float | None = None,
    ) -> None:
        settings: dict[str, Any]
        settings = {"input_softmax": input_softmax, "norm": norm, "query_init": query_init, "beta_init": beta_init}
        settings |= {"frozen": frozen, "retention": retention, "shift_bound": shift_bound}
        super().__init__(input_size, hidden_size, n_layers, n_heads, ff_size, variant, settings)


class SRWMNoCarryCore(SRWMCore):
    """`SRWMCore` without state between calls: the paper's ablation of long memory.

    Every call starts from the slow weight, whatever the state argument. Called one step at a time, as by an acting
    policy and by the authors' RL code, it never reads its own edits and is memoryless. Over a whole unroll in one call
    it computes another policy than the one that acts; `srwm_rl.nn.policy.run_core` therefore evaluates steps apart.

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

    The state holds, per layer, the fast weight of every head: `S = H * D * D`.

    Args:
        input_size, hidden_size, n_layers, n_heads, ff_size: see `SRWMCore`.
        variant: "default" and "paper" are the same: the published layer.
        input_softmax, norm, query_init, beta_init: see `srwm_rl.nn.layers.DeltaLayer`.

    Raises:
        UserError: an unknown variant or norm, or sizes that do not divide.
    """

    layer_class = DeltaLayer
    variants: ClassVar = {"default": _PUBLISHED_DELTA, "paper": _PUBLISHED_DELTA}

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 128,
        n_layers: int = 2,
        n_heads: int = 8,
        ff_size: int | None = None,
        variant: str = "default",
        input_softmax: bool | None = None,
        norm: Norm | None = None,
        query_init: float | None = None,
        beta_init: float | None = None,
    ) -> None:
        settings = {"input_softmax": input_softmax, "norm": norm, "query_init": query_init, "beta_init": beta_init}
        super().__init__(input_size, hidden_size, n_layers, n_heads, ff_size, variant, settings)


class FakeSRCore(StackCore):
    """`SRWMCore` without self-modification: the control that measures its benefit. The state is empty.

    Args:
        input_size, hidden_size, n_layers, n_heads, ff_size: see `SRWMCore`.
        variant: "default", or "paper" for the published layer exactly; sets the two settings below where None.
        input_softmax, norm: see `srwm_rl.nn.layers.MemoryLayer`.

    Raises:
        UserError: an unknown variant or norm, or sizes that do not divide.
    """

    layer_class = FakeSRLayer
    variants: ClassVar = {
        "default": {"input_softmax": False, "norm": "pre"},
        "paper": {"input_softmax": False, "norm": "none"},
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 128,
        n_layers: int = 2,
        n_heads: int = 8,
        ff_size: int | None = None,
        variant: str = "default",
        input_softmax: bool | None = None,
        norm: Norm | None = None,
    ) -> None:
        settings = {"input_softmax": input_softmax, "norm": norm}
        super().__init__(input_size, hidden_size, n_layers, n_heads, ff_size, variant, settings)
