"""The SRWM layer and the feed-forward block that follows it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from srwm_rl.errors import UserError
from srwm_rl.ops import srwm_scan

Norm = Literal["none", "residual", "pre"]
NORMS: tuple[Norm, ...] = ("none", "residual", "pre")


class SRWMLayer(nn.Module):
    """Multi-head self-referential weight matrix with an output projection and a residual path.

    Irie et al., ICML 2022, eqs. 5-9 and section 3 (https://arxiv.org/abs/2202.05780).

    Args:
        hidden_size: width of the layer; `hidden_size = n_heads * head_size`.
        n_heads: number of heads, each with a self-referential matrix of its own.
        input_softmax: feed each head the softmax of its slice of the input (the published RL layer does).
        norm: "none": `x + out(x)`, as published for RL; "residual": `LayerNorm(x) + out(x)`, as in the authors'
            supervised code; "pre": `x + out(LayerNorm(x))`.
        query_init: initial standard deviation of the query columns, as a multiple of `1/sqrt(head_size)`.
            A small one makes the first queries uniform, so that the first edits are gentle.
        beta_init: mean of the four rates' initial pre-activations; 0 makes the untrained rates 1/2 on average.

    Raises:
        UserError: `hidden_size` is no multiple of `n_heads`, or `norm` is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        *,
        input_softmax: bool,
        norm: Norm,
        query_init: float,
        beta_init: float,
    ) -> None:
        super().__init__()
        if hidden_size % n_heads:
            raise UserError(f"hidden_size {hidden_size} is no multiple of n_heads {n_heads}; choose one that is")
        if norm not in NORMS:
            raise UserError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
        self.n_heads, self.head_size = n_heads, hidden_size // n_heads
        self.input_softmax, self.norm = input_softmax, norm
        self.query_init, self.beta_init = query_init, beta_init
        self.weight = nn.Parameter(torch.empty(n_heads, self.head_size, 3 * self.head_size + 4))  # [H, D, 3D+4]
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.layer_norm = nn.LayerNorm(hidden_size) if norm != "none" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the slow weight afresh."""
        size = self.head_size
        with torch.no_grad():
            self.weight.normal_(std=size**-0.5)
            self.weight[..., size : 2 * size] *= self.query_init
            self.weight[..., 3 * size :] += self.beta_init

    def forward(self, x: Tensor, shift: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Map `x` `[T, B, hidden]`, `shift` `[B, H, D, 3D+4]`, `episode_starts` `[T, B]` to output and new shift."""
        n_steps, batch, hidden = x.shape
        normed = self.layer_norm(x)
        heads = (normed if self.norm == "pre" else x).view(n_steps, batch, self.n_heads, self.head_size)
        if self.input_softmax:
            heads = heads.softmax(-1)
        y, shift = srwm_scan(heads, self.weight, shift, episode_starts)
        out = self.out(y.reshape(n_steps, batch, hidden))
        return (normed if self.norm == "residual" else x) + out, shift


class FeedForwardBlock(nn.Module):
    """Pre-norm residual block `x + W_2 relu(W_1 LayerNorm(x))`; `[..., hidden]` to the same shape."""

    def __init__(self, hidden_size: int, ff_size: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, ff_size)
        self.down = nn.Linear(ff_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., hidden]` to `[..., hidden]`."""
        inner: Tensor = self.down(torch.relu(self.up(self.layer_norm(x))))
        return x + inner
