"""The self-referential weight matrix as a policy's memory, and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.layers import DeltaLayer, FakeSRLayer, Norm, SRDeltaLayer, SRWMLayer

# "paper" is what the published RL agents have: IDSIA/modern-srwm, reinforcement_learning/torchbeast/layer.py.
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
        settings: dict[str, Any] = {
            "input_softmax": input_softmax,
            "norm": norm,
            "query_init": query_init,
            "beta_init": beta_init,
            "frozen": frozen,
            "retention": retention,
            "shift_bound": shift_bound,
        }
        super().__init__(input_size, hidden_size, n_layers, n_heads, ff_size, variant, settings)

    @property
    def shift_shape(self) -> tuple[int, int, int]:
        """Shape of one layer's shift for one environment, `(H, D, 3D+4)`."""
        shape: tuple[int, int, int] = self.layers[0].shift_shape  # type: ignore[assignment]
        return shape


class SRWMNoCarryCore(SRWMCore):
    """`SRWMCore` that carries nothing from one call to the next: the paper's ablation of long memory.

    Every call, that is every unroll, starts from the slow weight, whatever state it is given. Called one step at a
    time, as the authors' RL code does and as an acting policy does, it never sees its own edits and is memoryless.
    Trained on whole unrolls it is therefore another policy than the one that acts; with `bptt` 1 the two are the same.

    Arguments as `SRWMCore`. The state it returns is zeros, in `SRWMCore`'s shape.
    """

    carries_over = False

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll from the slow weight; shapes as in `Core.forward`."""
        nothing = torch.zeros_like(state)
        return super().forward(x, nothing, episode_starts)[0], nothing


class SRDeltaCore(SRWMCore):
    """`SRWMCore` whose self-modifying heads write a delta-rule fast weight each, and read their output from that.

    The state holds, per layer, the shift of every head, then its fast weight: `S = H * D * (5D+5) + H * D * D`.
    Arguments as `SRWMCore`; see `srwm_rl.nn.layers.SRDeltaLayer`.
    """

    layer_class = SRDeltaLayer


class DeltaCore(StackCore):
    """Input projection, then Delta Net layers, each followed by a feed-forward block: the paper's nearest rival.

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
    """`SRWMCore` without the self-modification: the control that says what a task owes to it. The state is empty.

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
