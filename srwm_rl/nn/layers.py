"""The layers of the cores: multi-head memories with fast weights, and the feed-forward block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.ops import delta_scan, srwm_scan
from srwm_rl.ops.checks import check_bound

Norm = Literal["none", "residual", "pre"]
NORMS: tuple[Norm, ...] = ("none", "residual", "pre")
COLUMN_GROUPS = ("y", "query", "key", "beta")  # of an SRWM's weight, in this order
_RETENTION_INIT = (0.98, 0.999)  # of the first and the last head: edits have half-lives of 34 and 693 steps


class MemoryLayer(nn.Module, ABC):
    """Base class of multi-head memories: norm, split into heads, output projection and residual path.

    A subclass sets `state_size` and implements `recur`.

    Args:
        hidden_size: width of the layer; `hidden_size = n_heads * head_size`.
        n_heads: H, number of heads.
        input_softmax: apply a softmax to each head's input slice, as the published SRWM layer for RL does.
        norm: "none": `x + out(x)`, as published for RL; "residual": `LayerNorm(x) + out(x)`, as in the authors'
            supervised code; "pre": `x + out(LayerNorm(x))`.

    Attributes:
        head_size: D.
        state_size: floats of state per environment.
        input_shape: of one step of `recur`, `(H, D)`.

    Raises:
        UserError: `hidden_size` is no multiple of `n_heads`, or `norm` is unknown.
    """

    state_size: int = 0

    def __init__(self, hidden_size: int, n_heads: int, *, input_softmax: bool, norm: Norm) -> None:
        super().__init__()
        if hidden_size % n_heads:
            raise UserError(f"hidden_size {hidden_size} is no multiple of n_heads {n_heads}; choose one that is")
        if norm not in NORMS:
            raise UserError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
        self.n_heads, self.head_size = n_heads, hidden_size // n_heads
        self.input_shape = (n_heads, self.head_size)
        self.input_softmax, self.norm = input_softmax, norm
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.layer_norm = nn.LayerNorm(hidden_size) if norm != "none" else nn.Identity()

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Map `x` `[T, B, hidden]`, `state` `[B, state_size]`, `episode_starts` `[T, B]` to output and new state."""
        normed = self.layer_norm(x)
        heads = (normed if self.norm == "pre" else x).unflatten(-1, (self.n_heads, self.head_size))
        if self.input_softmax:
            heads = heads.softmax(-1)
        y, state = self.recur(heads, state, episode_starts)
        return (normed if self.norm == "residual" else x) + self.out(y.flatten(2)), state

    @abstractmethod
    def recur(self, heads: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Map the heads' inputs `[T, B, H, D]` and `state` `[B, state_size]` to their outputs and the new state."""


class SRWMLayer(MemoryLayer):
    """Multi-head self-referential weight matrix; the state is the shift, `H * D * (E+2D+4)`.

    Irie et al., ICML 2022, eqs. 5-9 and section 3 (https://arxiv.org/abs/2202.05780).

    `hidden_size`, `n_heads`, `input_softmax` and `norm` are those of `MemoryLayer`.

    Args:
        query_init: initial standard deviation of the query columns, as a multiple of `1/sqrt(head_size)`.
            A small one makes the first queries uniform, and so the first edits small.
        beta_init: initial mean of the beta columns. Under `input_softmax` it is the mean of the rates' initial
            pre-activations as well: 0 makes the untrained rates 1/2 on average.
        key_init: initial standard deviation of the key columns, as a multiple of `1/sqrt(head_size)`.
        identity_init: c, a multiple of the identity that is added to each head's initial key columns and subtracted
            from its query columns. Keys begin as `softmax(c x + ...)`, so that a read with `x` weighs earlier edits by
            the similarity of their inputs: an associative memory before any training. 0: as published.
        edit_lr_multiplier: factor on the optimizer's steps of the trained query, key and beta columns, as of a
            parameter group with that multiple of the learning rate. `SRWMPolicy` applies it to its optimizer,
            `srwm_rl.nn.optimizer_hooks.scale_edit_columns` to any other.
        frozen: column groups of the slow weight that are not trained, among "query", "key", "beta": a list, or one
            string with commas. A control: how much is learnt without learning the self-modification.
        retention: multiply the shift at each step by a gate in (0, 1) per head, computed from the layer's input,
            initially .98 to .999 depending on the head. The gate of Gated DeltaNet (Yang, Kautz, Hatamizadeh, ICLR
            2025, https://arxiv.org/abs/2412.06464), applied to the shift, so that it decays to the slow weight.
        shift_bound: the largest Frobenius norm of a head's shift, to which longer ones are scaled back after each
            step's edit, against diverging edits. None: unbounded. A new head's weight has a norm of about
            `sqrt(E+2D+4)`.

    Raises:
        UserError: as `MemoryLayer`, or `frozen` names an unknown group, or `shift_bound` or `edit_lr_multiplier` is
            out of range.
    """

    frozen_weight: Tensor | None
    _columns: Tensor

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        *,
        input_softmax: bool,
        norm: Norm,
        query_init: float,
        beta_init: float,
        key_init: float = 1.0,
        identity_init: float = 0.0,
        edit_lr_multiplier: float = 1.0,
        frozen: str | Sequence[str] = (),
        retention: bool = False,
        shift_bound: float | None = None,
    ) -> None:
        super().__init__(hidden_size, n_heads, input_softmax=input_softmax, norm=norm)
        self.query_init, self.key_init, self.beta_init = query_init, key_init, beta_init
        self.identity_init = identity_init
        self.edit_lr_multiplier, self.shift_bound = edit_lr_multiplier, shift_bound
        if not 0 <= edit_lr_multiplier < math.inf:
            raise UserError(f"edit_lr_multiplier must be a finite number of at least 0, not {edit_lr_multiplier!r}")
        if shift_bound is not None:
            check_bound(shift_bound)
        size = self.head_size
        read_size, other_state = self._read_and_extra_sizes()
        self.widths = (read_size, size, size, 4)  # of COLUMN_GROUPS
        self.shift_shape = (n_heads, size, sum(self.widths))  # [H, D, E+2D+4]
        self.shift_size = n_heads * size * sum(self.widths)
        self.state_size = self.shift_size + other_state
        self.frozen = _column_groups(frozen)
        self._add_weight()
        self.gate = nn.Linear(hidden_size, n_heads) if retention else None
        self.reset_parameters()

    def _read_and_extra_sizes(self) -> tuple[int, int]:
        """Return E, the width of each head's output, and the floats of state beside the shift."""
        return self.head_size, 0

    def _add_weight(self) -> None:
        """Allocate the slow weight: trained columns as a parameter, frozen ones as a buffer.

        A buffer is saved like a parameter, but not changed by an optimizer's weight decay.
        """
        frozen = [group in self.frozen for group, n in zip(COLUMN_GROUPS, self.widths, strict=True) for _ in range(n)]
        trained_first = torch.tensor(frozen).sort(stable=True).indices
        heads, size, columns = self.shift_shape
        self.weight = nn.Parameter(torch.empty(heads, size, columns - sum(frozen)))
        self.register_buffer("frozen_weight", torch.empty(heads, size, sum(frozen)) if self.frozen else None)
        self.register_buffer("_columns", trained_first.argsort(), persistent=False)  # where each column is stored

    def reset_parameters(self) -> None:
        """Initialise the slow weight, its frozen columns too, and the retention gate."""
        weight = torch.empty(self.shift_shape).normal_(std=self.head_size**-0.5)
        _, query, key, beta = weight.split(self.widths, -1)
        identity = self.identity_init * torch.eye(self.head_size)
        query.mul_(self.query_init).sub_(identity)
        key.mul_(self.key_init).add_(identity)
        beta += self.beta_init
        trained, frozen = weight[..., self._columns.cpu().argsort()].tensor_split((self.weight.shape[-1],), dim=-1)
        with torch.no_grad():
            self.weight.copy_(trained)
            if self.frozen_weight is not None:
                self.frozen_weight.copy_(frozen)
            if self.gate is not None:
                self.gate.weight.zero_()
                self.gate.bias.copy_(torch.linspace(*_RETENTION_INIT, self.n_heads).logit())

    def slow_weight(self) -> Tensor:
        """Return the slow weight `[H, D, E+2D+4]`, trained and frozen columns in order."""
        if self.frozen_weight is None:
            return self.weight
        return torch.cat((self.weight, self.frozen_weight), -1).index_select(-1, self._columns)

    def edit_columns(self) -> Tensor:
        """Return the trained query, key and beta columns `[H, D, n]`, a detached view of `weight`."""
        return self.weight.detach()[..., self.widths[0] :]

    def recur(self, heads: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run the self-modifying heads: `[T, B, H, D]` to `[T, B, H, E]`."""
        retention = None if self.gate is None else self.gate(heads.flatten(2)).sigmoid()  # [T, B, H]
        shift = state.unflatten(-1, self.shift_shape)
        y, shift = srwm_scan(
            heads, self.slow_weight(), shift, episode_starts, retention=retention, shift_bound=self.shift_bound
        )
        return y, shift.flatten(1)


class SRDeltaLayer(SRWMLayer):
    """An SRWM whose outputs are the keys, queries, values and rates of a delta-rule fast weight.

    The "SR-Delta" of Irie et al., ICML 2022. The state is the shift, then the fast weight:
    `H * D * (5D+5) + H * D * D`. Arguments as `SRWMLayer`; a retention gate and a bound act on the SRWM's shift alone.
    """

    def _read_and_extra_sizes(self) -> tuple[int, int]:
        return 3 * self.head_size + 1, self.n_heads * self.head_size**2

    def recur(self, heads: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run the SRWM, then the fast weight on its outputs: `[T, B, H, D]` to the same shape."""
        shift, fast = state.tensor_split((self.shift_size,), dim=-1)
        read, shift = super().recur(heads, shift, episode_starts)  # [T, B, H, 3D+1]
        query, key, value, beta = read.split((*[self.head_size] * 3, 1), dim=-1)
        y, fast = delta_scan(
            key.softmax(-1),
            value,
            query.softmax(-1),
            beta.squeeze(-1).sigmoid(),
            fast.unflatten(-1, (self.n_heads, self.head_size, self.head_size)),
            episode_starts,
        )
        return y, torch.cat((shift, fast.flatten(1)), dim=-1)


class DeltaLayer(MemoryLayer):
    """Delta Net: a trained slow net writes a fast weight by the delta rule; the state is `H * D * D`.

    Schlag, Irie, Schmidhuber, ICML 2021 (https://arxiv.org/abs/2102.11174), with the feature map of its RL version in
    Irie et al., NeurIPS 2021 (https://arxiv.org/abs/2106.06295): `elu + 1`, divided by its sum.

    `hidden_size`, `n_heads`, `input_softmax` and `norm` are those of `MemoryLayer`.

    Args:
        query_init: factor on the slow net's initial query rows.
        beta_init: added to the pre-activation of every rate; 0 makes the untrained rates 1/2 on average.
        key_init: factor on the slow net's initial key rows.
        identity_init: c, a multiple of the identity that is added to each head's initial query and key rows, so that a
            read weighs earlier writes by the similarity of their inputs before any training. 0: as published.
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
        key_init: float = 1.0,
        identity_init: float = 0.0,
    ) -> None:
        super().__init__(hidden_size, n_heads, input_softmax=input_softmax, norm=norm)
        size = self.head_size
        self.beta_init = beta_init
        self.fast_shape = (n_heads, size, size)
        self.state_size = n_heads * size * size
        self.slow_net = nn.Linear(hidden_size, n_heads * (3 * size + 1), bias=False)
        with torch.no_grad():
            rows = self.slow_net.weight.unflatten(0, (n_heads, -1))
            rows[:, :size] *= query_init
            rows[:, size : 2 * size] *= key_init
            identity = identity_init * torch.eye(hidden_size).unflatten(0, (n_heads, size))  # [H, D, hidden]
            rows[:, : 2 * size] += torch.cat((identity, identity), 1)

    def recur(self, heads: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Write and read the fast weights: `[T, B, H, D]` to the same shape."""
        outputs = self.slow_net(heads.flatten(2)).unflatten(-1, (self.n_heads, -1))  # [T, B, H, 3D+1]
        query, key, value, beta = outputs.split((*[self.head_size] * 3, 1), dim=-1)
        rate = (beta.squeeze(-1) + self.beta_init).sigmoid()
        fast = state.unflatten(-1, self.fast_shape)
        y, fast = delta_scan(_positive(key), value, _positive(query), rate, fast, episode_starts)
        return y, fast.flatten(1)


class FakeSRLayer(MemoryLayer):
    """The SRWM layer without self-modification: each head is one matrix `[D, D]`, without state."""

    def __init__(self, hidden_size: int, n_heads: int, *, input_softmax: bool, norm: Norm) -> None:
        super().__init__(hidden_size, n_heads, input_softmax=input_softmax, norm=norm)
        size = self.head_size
        self.weight = nn.Parameter(torch.empty(n_heads, size, size).normal_(std=size**-0.5))

    def recur(self, heads: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply each head's input by its matrix; the empty state passes through."""
        return torch.einsum("tbhi,hij->tbhj", heads, self.weight), state


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


def _positive(x: Tensor) -> Tensor:
    """Apply the Delta Net's feature map: positive numbers `[..., D]` that sum to (almost) 1."""
    positive = F.elu(x) + 1
    return positive / (positive.sum(-1, keepdim=True) + 1e-5)


def _column_groups(frozen: str | Sequence[str]) -> tuple[str, ...]:
    """Parse the setting `frozen`; return its groups in the columns' order."""
    names = [name.strip() for name in frozen.split(",") if name.strip()] if isinstance(frozen, str) else list(frozen)
    for name in names:
        if name not in COLUMN_GROUPS[1:]:
            raise UserError(f"frozen: unknown column group {name!r}{did_you_mean(str(name), COLUMN_GROUPS[1:])}")
    return tuple(name for name in COLUMN_GROUPS if name in names)
